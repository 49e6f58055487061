"""`flip merge`: the mixtures, what evaluation says of them, the weights that it writes, and what it refuses."""

import argparse
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import WORDS, leaves, make_encoder, png, save, write_samples
from PIL import Image

import flip_jax
from flip_jax import config, evaluators, saved_step, weights
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip
from flip_jax.tools import merge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of two models with different weights, their encoders, and a task."""
    folder, encoders = tmp_path_factory.mktemp("models"), [make_encoder(seed=seed) for seed in (0, 1)]
    for name, encoder in zip("ab", encoders, strict=True):
        save(encoder, folder / name)
    labels = np.random.default_rng(0).integers(0, 5, 30)
    write_samples(folder / "0.tar", [{"png": png(i), "cls": b"%d" % label} for i, label in enumerate(labels)])
    (folder / "classnames.txt").write_text("".join(f"picture {i}\n" for i in range(5)))
    return folder, encoders, f"zeroshot/webdataset:{folder}/0.tar"


def run(*arguments):
    return flip.main(["merge", *map(str, arguments)])


def test_alphas_as_people_write_them():
    assert merge.alphas("0:1:0.1") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert merge.alphas("0.5,0.75") == [0.5, 0.75] and merge.alphas("0.2:0.5:0.2") == [0.2, 0.4]
    for text in ("", "a", "0:1", "0:1:0", "1:0:0.5", "0:1.1:0.1", "-0.5", "0:1:1e-9"):
        with pytest.raises(argparse.ArgumentTypeError, match="FIRST:LAST:STEP"):
            merge.alphas(text)


def test_the_ends_are_the_models_and_the_middle_is_neither(models, tmp_path, capsys):
    folder, encoders, task = models
    out, chart = tmp_path / "out.json", tmp_path / "chart.png"
    files = (f"--json={out}", f"--chart={chart}", "--batch_size=32", f"--classnames={folder}/classnames.txt")
    assert not run(folder / "a", folder / "b", "--alpha=0:1:0.5", f"--tasks={task}", *files)
    printed = [line.split() for line in capsys.readouterr().out.partition("\nalpha ")[2].splitlines() if line.strip()]
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["0", "0.5", "1"] == [row[0] for row in printed[1:]]
    assert printed[1][1] == printed[1][2] == f"{results['0'][task]['top1']:.2f}"
    settings = config.EvalConfig(batch_size=32, classnames=str(folder / "classnames.txt"))
    mixed = jax.tree.map(lambda x, y: (x + y) / 2, encoders[0].params, encoders[1].params)
    for alpha, params in (("0", encoders[0].params), ("0.5", mixed), ("1", encoders[1].params)):
        encoder = encoders[0].with_params(params)
        with jax.set_mesh(encoder.mesh):
            expected = evaluators.evaluate(encoder, task, dataclasses.replace(encoder.config, eval=settings))
        assert results[alpha][task] == expected

    with Image.open(chart) as image:
        assert min(image.size) > 100


def test_one_mixture_is_written_as_weights(models, tmp_path, capsys):
    folder, encoders, _ = models
    assert not run(folder / "a", folder / "b", "--alpha=0.25", f"--out={tmp_path}/merged")
    merged = flip_jax.load(tmp_path / "merged")
    for value, a, b in zip(*(leaves(x.params) for x in (merged, *encoders)), strict=True):
        np.testing.assert_allclose(value, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-7)
    assert merged.tokenizer.to_json() == encoders[0].tokenizer.to_json()
    card = json.loads((tmp_path / "merged" / "card.json").read_text())
    assert card["origin"] == f"0.75 of the weights of {folder}/a and 0.25 of those of {folder}/b"
    assert run(folder / "a", folder / "b", "--alpha=0.25", f"--out={tmp_path}/merged")
    assert "merged exists already; use another folder" in capsys.readouterr().err
    assert run(folder / "a", folder / "b", f"--out={tmp_path}/other")
    assert "--out takes one --alpha, got 11: choose one" in capsys.readouterr().err


def test_models_that_do_not_fit_together_are_refused_with_the_differences(models):
    _, (a, b), _ = models
    names, model = ("runs/a", "runs/b"), a.config.model
    merge.check_alike(names, (a, b))
    masked = dataclasses.replace(model, dtype="bfloat16", image=dataclasses.replace(model.image, mask_ratio=0.0))
    other = b.with_params(b.params)
    other.config = dataclasses.replace(b.config, model=masked)
    merge.check_alike(names, (a, other))  # neither changes what a weight means
    wide = dataclasses.replace(model, activation="gelu", image=dataclasses.replace(model.image, image_size=64))
    other.config = dataclasses.replace(b.config, model=wide)
    other.tokenizer = make_encoder(words=(*WORDS, "blue")).tokenizer
    with pytest.raises(UserError) as caught:
        merge.check_alike(names, (a, other))
    assert str(caught.value).splitlines()[:4] == [
        "runs/a and runs/b cannot be merged, because they differ in",
        "  config.model.activation: 'gelu_tanh' and 'gelu'",
        "  config.model.image.image_size: 32 and 64",
        "  their tokenizers",
    ]


def test_a_damaged_checkpoint_is_refused(models, tmp_path, capsys):
    folder, _, _ = models
    shutil.copytree(folder / "b", tmp_path / "b")
    largest = max((tmp_path / "b" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1])
    assert run(folder / "a", tmp_path / "b", "--alpha=0.5", f"--out={tmp_path}/out")
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_classifier_keeps_its_classes(models, tmp_path):
    folder, (a, _), _ = models
    out = tmp_path / "classifier"
    weights.write(out, a.params, None, a.config, ("cat", "dog"))
    assert weights.read_class_names(out) == ("cat", "dog")
    assert saved_step.tokenizer(out) is None
