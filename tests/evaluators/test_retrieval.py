"""Retrieval: ranks and recalls against NumPy in float64, in blocks, on 1 and 8 devices, and every file layout."""

import json

import jax
import numpy as np
import pytest
from helpers import Known, eval_config, picture, reference_ranks, unit, write_samples

from flip_jax import evaluators, sharding
from flip_jax.config import MeshConfig
from flip_jax.evaluators import needs, retrieval
from flip_jax.evaluators.datasets import Dataset
from flip_jax.runtime import UserError


@pytest.fixture
def pairs():
    """Embeddings of 37 images with 0 to 7 captions each, noisy enough for all ranks to occur; some are duplicates."""
    rng = np.random.default_rng(1)
    image_NxE = unit(rng.normal(size=(37, 8)))
    image_NxE[5] = image_NxE[6]
    owner_M = np.repeat(np.arange(37), rng.integers(0, 8, 37)).astype(np.int32)
    text_MxE = unit(image_NxE[owner_M] + 0.6 * rng.normal(size=(len(owner_M), 8)))
    text_MxE[3] = text_MxE[40]
    return image_NxE.astype(np.float32), text_MxE.astype(np.float32), owner_M


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("images, texts", [(2048, 8192), (16, 10), (8, 1)])
def test_ranks_in_blocks_match_the_full_matrix(pairs, monkeypatch, devices, images, texts):
    monkeypatch.setattr(retrieval, "IMAGES", images)
    monkeypatch.setattr(retrieval, "TEXTS", texts)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    for found, expected in zip(retrieval.ranks(*pairs, mesh), reference_ranks(*pairs), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_model_with_constant_output_scores_zero(value):
    image_NxE, text_MxE = np.full((30, 4), value, np.float32), np.full((60, 4), value, np.float32)
    found = retrieval.ranks(image_NxE, text_MxE, np.repeat(np.arange(30), 2), sharding.make_mesh(MeshConfig()))
    assert set(retrieval.recalls(*found).values()) == {0.0}


def captions(owner_M):
    return {i: [f"caption {m}" for m in np.flatnonzero(owner_M == i)] for i in range(37)}


def write_karpathy(folder, texts, subfolder):
    """Writes Karpathy's JSON with its images in a subfolder (as COCO) or next to it, and one image of another split."""
    images = [{"split": "train", "filename": "none.jpg", "sentences": [{"raw": "nothing"}]}]
    (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for i in texts:
        (folder / subfolder / f"{i}.png").write_bytes(picture(i))
        image = {"split": "test", "filename": f"{i}.png", "sentences": [{"raw": text} for text in texts[i]]}
        images.append(image | ({"filepath": subfolder} if subfolder else {}))
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    return path


@pytest.mark.parametrize("layout", ["clip_benchmark", "coco", "karpathy", "karpathy and a folder"])
def test_recalls_in_every_file_layout(pairs, tmp_path, layout):
    image_NxE, text_MxE, owner_M = pairs
    texts = captions(owner_M)
    if layout == "clip_benchmark":  # captions are the lines of one file
        samples = [{"png": picture(i)} | ({"txt": "\n".join(texts[i]).encode()} if texts[i] else {}) for i in texts]
        write_samples(tmp_path / "test" / "0.tar", samples[:20])
        write_samples(tmp_path / "test" / "1.tar", samples[20:])
        name = f"webdataset:{tmp_path}/test/{{0..1}}.tar"
    elif layout == "coco":
        write_karpathy(tmp_path / "coco", texts, "val2014")
        name = "coco"
    elif layout == "karpathy":
        name = f"karpathy:{write_karpathy(tmp_path, texts, '')}#test"
    else:
        name = f"flickr30k=karpathy:{write_karpathy(tmp_path, texts, 'x/pictures')}#test#{tmp_path}"
    encoder = Known(image_NxE, {f"caption {m}": text_MxE[m] for m in range(len(text_MxE))})
    found = dict(evaluators.run(encoder, eval_config(f"retrieval/{name}", tfds_dir=tmp_path)))
    rank_N, rank_M = reference_ranks(*pairs)
    expected = {f"text_recall@{k}": 100 * np.mean(rank_N[rank_N >= 0] < k) for k in (1, 5, 10)}
    expected |= {f"image_recall@{k}": 100 * np.mean(rank_M < k) for k in (1, 5, 10)}
    expected["mean_recall"] = np.mean(list(expected.values()))
    assert found.pop("retrieval/mean") == pytest.approx(expected["mean_recall"])
    assert found == pytest.approx({f"retrieval/{name}/{key}": value for key, value in expected.items()})
    assert 5 < expected["image_recall@1"] < 95  # all ranks occur


def test_unusable_images_are_skipped_with_their_captions(pairs, tmp_path, caplog):
    image_NxE, text_MxE, owner_M = pairs
    path = write_karpathy(tmp_path, captions(owner_M), "val2014")
    (tmp_path / "val2014" / "3.png").write_bytes(b"not an image")
    (tmp_path / "val2014" / "7.png").unlink()
    encoder = Known(image_NxE, {f"caption {m}": text_MxE[m] for m in range(len(text_MxE))})
    caplog.set_level("WARNING")
    found = dict(evaluators.run(encoder, eval_config(f"retrieval/karpathy:{path}#test")))
    keep_N = ~np.isin(np.arange(37), [3, 7])
    keep_M = keep_N[owner_M]
    number = np.cumsum(keep_N) - 1
    rank_N, rank_M = reference_ranks(image_NxE[keep_N], text_MxE[keep_M], number[owner_M[keep_M]])
    assert found["retrieval/mean"] == pytest.approx(retrieval.recalls(rank_N, rank_M)["mean_recall"])
    assert "2 skipped (1 image does not decode, 1 no image) of the images that this process read" in caplog.text


def test_datasets_without_captions_are_refused(tmp_path):
    with pytest.raises(UserError, match="cifar10 has classes but no captions; use zeroshot/cifar10"):
        needs.captions(Dataset("cifar10", "folder:/x", metric="top1"), eval_config())
    write_samples(tmp_path / "0.tar", [{"png": picture(i), "txt": b" "} for i in range(3)])
    with pytest.raises(UserError, match="none of its 3 usable images has a caption"):
        dict(evaluators.run(Known(np.ones((3, 4)), {}), eval_config(f"retrieval/webdataset:{tmp_path}/0.tar")))
    (tmp_path / "bad.json").write_text('{"images": [{"split": "test"}]}')
    with pytest.raises(UserError, match="bad.json.*filename"):
        evaluators.find(f"retrieval/karpathy:{tmp_path}/bad.json#test", eval_config())
    path = write_karpathy(tmp_path, {0: ["a"]}, "")
    with pytest.raises(UserError, match="no split 'val'.* test, train"):
        evaluators.find(f"retrieval/karpathy:{path}#val", eval_config())
