"""Both towers under ONNX Runtime: transformers' recorded embeddings, and FLIP's own."""

import dataclasses
import json
import re
import subprocess
import sys

import helpers
import numpy as np
import pytest
import tokenizers
from flax import nnx
from helpers import FIXTURES, REPO, make_encoder, save
from PIL import Image

from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import onnx_towers
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip

LIMIT = 1e-4


def run(folder, name, rows):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    whole = session.run(None, {name: rows})[0]
    np.testing.assert_allclose(session.run(None, {name: rows[:1]})[0], whole[:1], atol=1e-6)  # of any batch
    return whole


@pytest.mark.parametrize("name", ["clip_largest", "clip_eos", "siglip", "siglip2"])
def test_recorded_embeddings_are_given_by_files_alone(name, tmp_path):
    pytest.importorskip("onnx")
    recorded = np.load(FIXTURES / "transformers" / name / "outputs.npz")
    source, out = FIXTURES / "transformers" / name, tmp_path / "out"
    assert flip.main(["convert", "export", str(source), str(out), "--format=onnx"]) == 0
    # From here on as a program does that has neither JAX nor this package.
    settings = json.loads((out / "config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.enable_truncation(settings["context_length"])
    tokenizer.enable_padding(length=settings["context_length"], pad_id=settings["padding_id"])
    ids = np.array([tokenizer.encode(text).ids for text in recorded["texts"].tolist()], np.int32)
    z_image, z_text = run(out, "image", recorded["image"]), run(out, "text", ids)
    np.testing.assert_allclose(z_image, recorded["z_image"], atol=LIMIT)
    np.testing.assert_allclose(z_text, recorded["z_text"], atol=LIMIT)
    logits = settings["logit_scale"] * z_image @ z_text.T + settings["logit_bias"]
    np.testing.assert_allclose(logits, recorded["logits"], atol=settings["logit_scale"] * LIMIT)


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_pool": "patches", "image_pre_norm": True, "text_pool": "mean", "text_mask_padding": True}],
)
def test_flip_itself_is_exported(changes, tmp_path):
    """The mean over all tokens, fixed positions, a bias of patches; and what open_clip has no place for."""
    pytest.importorskip("onnx")
    settings = dataclasses.replace(helpers.model_with(**changes), activation="gelu_tanh")
    model = FLIP(settings, nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    params["image"]["patch_bias"] += 0.1
    model = nnx.merge(graphdef, params)
    image, text = helpers.batch(3)
    onnx_towers.export_model(tmp_path, settings, params, Tokenizer({"[PAD]": 0, "[UNK]": 1}))
    np.testing.assert_allclose(run(tmp_path, "image", image), model.encode_image(image), atol=LIMIT)
    np.testing.assert_allclose(run(tmp_path, "text", text), model.encode_text(text), atol=LIMIT)


def test_the_example_of_the_docs_needs_neither_jax_nor_this_package(tmp_path):
    """Run as printed, in a process that can import neither."""
    pytest.importorskip("onnxruntime")
    (example,) = re.findall(r"```python\n(import json.*?)```", (REPO / "docs" / "hub.md").read_text(), re.DOTALL)
    encoder = make_encoder()
    save(encoder, tmp_path / "run" / "checkpoints" / "1")
    out = tmp_path / "served"
    assert flip.main(["convert", "export", str(tmp_path / "run"), str(out), "--format=onnx"]) == 0
    pixels = helpers.batch(1)[0]
    Image.fromarray(pixels[0]).save(tmp_path / "cat.png")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['jax', 'flax', 'flip_jax', 'torch', 'transformers']))\n"
    done = subprocess.run([sys.executable, "-P", "-c", blocked + example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cosines = np.asarray(encoder.encode_image(pixels)) @ encoder.encode_text(["a photo of a cat", "a photo of a dog"]).T
    scores = np.exp(encoder.scale() * cosines)
    printed = np.array(done.stdout.strip("[] \n").split(), float)
    np.testing.assert_allclose(printed, (scores / scores.sum())[0], atol=encoder.scale() * LIMIT)


def test_large_weights_are_a_file_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr(onnx_towers, "LARGE", 1)
    encoder = make_encoder()
    onnx_towers.export_model(tmp_path, encoder.config.model, encoder.params, encoder.tokenizer)
    assert {"image.onnx.data", "text.onnx.data"} < {path.name for path in tmp_path.iterdir()}
    image, _ = helpers.batch(2)
    assert run(tmp_path, "image", image).shape == (2, 16)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch, capsys):
    def absent(_):
        raise ImportError("no onnx")

    monkeypatch.setattr(onnx_towers._Graph, "__init__", absent)
    save(make_encoder(), tmp_path / "checkpoints" / "1")
    assert flip.main(["convert", "export", str(tmp_path), str(tmp_path / "out"), "--format=onnx"]) == 1
    assert 'needs the package onnx: pip install -e ".[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs the package onnx"):
        onnx_towers.export_model(tmp_path, None, {}, None)
