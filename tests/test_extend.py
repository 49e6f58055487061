"""The examples of docs/extend.md, each run as it stands where the page says that it belongs."""

import base64
import dataclasses
import io
import json
import re
import sys
import types

import helpers
import jax
import numpy as np
import pytest
from flax import nnx
from helpers import REPO
from PIL import Image

from flip_jax import config_check, evaluators, masking, sharding
from flip_jax.config import DataConfig, EvalConfig, MeshConfig
from flip_jax.data import shards as shard_files
from flip_jax.data import sources
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.inference import Encoder
from flip_jax.models import vit
from flip_jax.models.flip import FLIP

BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", (REPO / "docs" / "extend.md").read_text(), re.DOTALL)
EXAMPLES = {file: code for file, code in BLOCKS}


def run_in(monkeypatch, module, file):
    """Runs the page's lines for a file as if they stood at its end; the test leaves no trace of them."""
    names = dict(vars(module))
    for table in ("STRATEGIES", "KINDS"):
        if table in names:
            monkeypatch.setattr(module, table, dict(names[table]))
            names[table] = vars(module)[table]
    exec(compile(EXAMPLES[file], file, "exec"), names)
    return names


def test_the_page_has_one_example_of_each():
    assert list(EXAMPLES) == [
        "flip_jax/masking.py",
        "flip_jax/evaluators/alignment.py",
        "flip_jax/data/shards.py",
        "configs/flip_b32.py",
    ]


def test_the_masking_strategy(monkeypatch):
    run_in(monkeypatch, masking, "flip_jax/masking.py")
    settings = dataclasses.replace(helpers.MODEL.image, mask="corners", mask_ratio=0.75)
    patches = vit.patchify(helpers.batch()[0], settings.patch_size)
    kept = np.sort(np.asarray(vit.visible(settings, jax.random.key(0), patches)), axis=1)
    np.testing.assert_array_equal(kept, np.tile([0, 3, 12, 15], (16, 1)))  # of 4 x 4
    settings = dataclasses.replace(settings, mask_ratio=0.5)
    kept = np.asarray(vit.visible(settings, jax.random.key(0), patches))
    assert all(len(set(row)) == 8 and {0, 3, 12, 15} < set(row) for row in kept)
    assert len({tuple(sorted(row)) for row in kept}) > 1


def test_the_evaluator(monkeypatch, shards):
    module = types.ModuleType("flip_jax.evaluators.alignment")
    exec(compile(EXAMPLES["flip_jax/evaluators/alignment.py"], "alignment.py", "exec"), vars(module))
    monkeypatch.setitem(evaluators.EVALUATORS, "alignment", module)
    task = f"alignment/webdataset:{shards}/00000.tar"
    config = dataclasses.replace(helpers.CONFIG, eval=EvalConfig(tasks=(task,), batch_size=64))
    tokenizer = Tokenizer.train(["a red green blue white square frame"], 64)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        graphdef, params = nnx.split(FLIP(helpers.MODEL, nnx.Rngs(0)))
        encoder = Encoder(graphdef, nnx.to_pure_dict(params), tokenizer, config)
        results = dict(evaluators.run(encoder, config))
        (batch,) = evaluators.datasets.batches(task.partition("/")[2], config, with_text=True)
        image_BxE = np.asarray(encoder.encode_image(batch["image"]))
        text_BxE = encoder.encode_text([texts[0] for texts in batch["texts"]])
    cosine = 100 * np.trace(image_BxE @ text_BxE.T) / 64
    assert results == {f"{task}/cosine": pytest.approx(cosine), "alignment/mean": pytest.approx(cosine)}
    with pytest.raises(ValueError, match="alignment/cifar10"):
        evaluators.find("alignment/cifar10=webdataset:x.tar", config)


def test_the_data_format(monkeypatch, tmp_path):
    formats_ = run_in(monkeypatch, shard_files, "flip_jax/data/shards.py")
    monkeypatch.setattr(sources, "KINDS", formats_["KINDS"])
    png = io.BytesIO()
    Image.new("RGB", (4, 4), (250, 0, 0)).save(png, "PNG")
    picture = base64.b64encode(png.getvalue()).decode()
    lines = [
        json.dumps({"image": picture, "caption": "a red square"}),
        "{",
        json.dumps({"image": picture}),
        json.dumps({"image": "?", "caption": "x"}),
        json.dumps({"image": picture, "caption": "once more"}),
    ]
    (tmp_path / "0.jsonl").write_text("".join(line + "\n" for line in lines))
    source = sources.open_source(f"jsonl:{tmp_path}/*.jsonl", DataConfig())
    records = list(source.read([(0, 0)]))
    found = [record.get("bad") or record["texts"] for record, _ in records]
    assert found == [["a red square"], "damaged line", [], "damaged line", ["once more"]]
    assert records[0][0]["image"] == png.getvalue()
    rest = list(source.read([(0, 0)], offset=records[1][1]))
    assert [record for record, _ in rest] == [record for record, _ in records[2:]]


def test_the_recipe(monkeypatch):
    module = types.ModuleType("configs.flip_b32")
    monkeypatch.setitem(sys.modules, "configs.flip_b32", module)
    exec(compile(EXAMPLES["configs/flip_b32.py"], "flip_b32.py", "exec"), vars(module))
    config = config_check.from_config_dict(module.get_config("seed=1"))
    assert (config.seed, config.total_steps, config.model.image.visible_patches) == (1, 78_125, 12)
