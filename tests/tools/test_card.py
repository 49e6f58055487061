"""`flip card`: model cards of runs, of converted models and of exported ones."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from helpers import REPO, environment
from huggingface_hub import ModelCard

import flip_jax
from flip_jax import weights
from flip_jax.config import DataConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError
from flip_jax.tools import card, convert

WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "fox": 3}
CONFIG = dataclasses.replace(helpers.CONFIG, data=DataConfig(train="3*webdataset:/a/*.tar;tfds:emoji/train"))


@pytest.fixture
def workdir(tmp_path):
    """A run of 10 steps whose metrics have a truncated last line and a line of a step that was lost."""
    folder = tmp_path / "fox"
    params = nnx.to_pure_dict(nnx.split(FLIP(helpers.MODEL, nnx.Rngs(0)))[1])
    weights.write(folder / "checkpoints" / "10", params, Tokenizer(WORDS), CONFIG)
    lines = [
        {"step": 5, "samples_seen": 80, "zeroshot/emoji/top1": 3.0, "zeroshot/mean": 3.0},
        {"step": 10, "loss": 2.5, "samples_seen": 160, "data/read": 163, "data/used": 160, "data/bad/no text": 3},
        {"step": 10, "samples_seen": 160, "zeroshot/emoji/top1": 12.34567, "zeroshot/mean": 12.34567},
        {"step": 15, "samples_seen": 240, "zeroshot/emoji/top1": 99.0, "zeroshot/mean": 99.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    return folder


def test_a_card_describes_the_model_and_its_training_data(workdir, tmp_path):
    command = [sys.executable, "-m", "flip_jax", "card", f"--model={workdir}", "--license=mit"]
    subprocess.run(command, cwd=REPO, env=environment(), check=True, timeout=200)
    content = json.loads((workdir / "card.json").read_text())
    assert (content["step"], content["samples_seen"], content["license"]) == (10, 160, "mit")
    assert content["config"]["model.image.mask_ratio"] == 0.5
    params = flip_jax.load(workdir).params
    assert content["parameters"]["all"] == sum(x.size for x in jax.tree.leaves(params))
    assert content["parameters"]["text"] == sum(x.size for x in jax.tree.leaves(params["text"]))
    saved = json.dumps(Tokenizer(WORDS).to_json(), sort_keys=True).encode()
    assert content["tokenizer"] == {
        "kind": "WordPiece",
        "entries": 4,
        "from": "trained on the captions",
        "sha256": hashlib.sha256(saved).hexdigest(),
    }
    assert content["data"]["train"] == CONFIG.data.train
    assert content["data"]["records"] == {"read": 163, "used": 160, "bad/no text": 3}
    assert content["evaluation"]["results"] == {"zeroshot/emoji/top1": 12.34567, "zeroshot/mean": 12.34567}

    read = ModelCard.load(workdir / "README.md")  # as the hub does
    assert read.data.library_name == "flip_jax" and read.data.license == "mit"
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("emoji", "top1", 12.3457)
    for fact in (
        "160, in 10 steps of 16",
        "8 of 16 patches (random), 8 of 8 tokens |",
        "3*webdataset:/a/*.tar",
        "3 bad/no text",
    ):
        assert fact in read.text

    report = {
        "model": str(workdir),
        "results": {"retrieval/coco": {"mean_recall": 7.0}},
        "means": {"retrieval/mean": 7.0},
    }
    (tmp_path / "coco.json").write_text(json.dumps(report))
    card.update(workdir, str(tmp_path / "coco.json"))
    content = json.loads((workdir / "card.json").read_text())
    assert content["license"] == "mit" and content["samples_seen"] == 160
    assert content["evaluation"]["results"] == {"retrieval/coco/mean_recall": 7.0, "retrieval/mean": 7.0}
    assert card.from_model(workdir / "checkpoints" / "10") == content  # an export uses this
    (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "15")  # the run has continued
    later = card.from_model(workdir)
    assert later["evaluation"]["results"]["zeroshot/mean"] == 99.0 and later["license"] == "mit"


def test_exported_and_converted_models_have_cards(workdir, tmp_path):
    exported, back = tmp_path / "exported", tmp_path / "back"
    convert.export(str(workdir), str(exported), "open_clip")
    content = json.loads((exported / "card.json").read_text())
    assert (content["library"], content["samples_seen"]) == ("open_clip", 160)
    assert content["evaluation"]["results"]["zeroshot/emoji/top1"] == 12.34567
    front = (exported / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "open_clip" and "license" not in yaml.safe_load(front)
    assert 'get_tokenizer("local-dir:FOLDER")' in (exported / "README.md").read_text()

    params = jax.tree.map(np.asarray, flip_jax.load(workdir).params)
    weights.write(back, params, Tokenizer(WORDS), CONFIG)
    card.write(back, card.describe(CONFIG, Tokenizer(WORDS), "converted from somewhere"))
    card.update(back, license_name="mit")
    content = json.loads((back / "card.json").read_text())
    assert (content["origin"], content["license"]) == ("converted from somewhere", "mit")
    assert content["samples_seen"] is content["data"] is content["evaluation"] is None
    assert "samples seen | unknown" in (back / "README.md").read_text()
    flip_jax.load(back)  # the files next to the weights do not disturb it


def test_folders_and_evaluations_that_cannot_be_used_are_refused(workdir, tmp_path):
    (tmp_path / "no.json").write_text("[1]")
    for folder, evaluation, message in (
        (tmp_path, None, "holds no checkpoint"),
        (workdir, tmp_path / "no.json", "is not a file that `flip evaluate --json` writes"),
        (workdir, tmp_path / "absent.json", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message):
            card.update(folder, evaluation and str(evaluation))
    assert not (workdir / "README.md").exists()
    (workdir / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is no model card; move it away"):
        card.write(workdir, card.from_model(workdir))
    assert (workdir / "README.md").read_text() == "mine"
