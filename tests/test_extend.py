"""The examples of docs/extend.md, run exactly as printed, each in the file that the page names."""

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
from flip_jax.data import shards as shard_kinds
from flip_jax.data import sources, vocabulary
from flip_jax.evaluators import datasets
from flip_jax.inference import Encoder
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError

PAGE = (REPO / "docs" / "extend.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def add(monkeypatch):
    """Returns a function that runs an example as if it stood at the end of its module, until the test ends."""

    def run(file, module, table=None):
        if table:
            monkeypatch.setattr(module, table, dict(getattr(module, table)))
        names = dict(vars(module))
        exec(compile(EXAMPLES[file], file, "exec"), names)
        for name in names.keys() - vars(module).keys():
            monkeypatch.setattr(module, name, names[name], raising=False)

    return run


@pytest.fixture
def add_file(monkeypatch):
    """Returns a function that imports an example as a new module, until the test ends."""

    def run(file):
        name = file.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        exec(compile(EXAMPLES[file], file, "exec"), vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return run


def test_page_has_one_example_of_each():
    assert list(EXAMPLES) == [
        "flip_jax/masking.py",
        "flip_jax/evaluators/alignment.py",
        "flip_jax/evaluators/__init__.py",
        "flip_jax/data/shards.py",
        "flip_jax/data/sources.py",
        "configs/flip_b32.py",
    ]


def test_masking_strategy(add):
    add("flip_jax/masking.py", masking, "STRATEGIES")
    images, _ = helpers.batch()  # of 4 x 4 patches

    def kept(mask_ratio):
        config = helpers.model_with(image_mask="corners", image_mask_ratio=mask_ratio).image
        _, position_BxK = masking.see_image(config, jax.random.key(0), images)
        return np.sort(np.asarray(position_BxK), axis=1)

    np.testing.assert_array_equal(kept(0.75), np.tile([0, 3, 12, 15], (16, 1)))
    assert all(len(set(row)) == 8 and {0, 3, 12, 15} < set(row) for row in kept(0.5))
    assert len({tuple(row) for row in kept(0.5)}) > 1


def test_evaluator(add, add_file, shards):
    add_file("flip_jax/evaluators/alignment.py")
    add("flip_jax/evaluators/__init__.py", evaluators, "EVALUATORS")
    task = f"alignment/webdataset:{shards}/00000.tar"
    config = dataclasses.replace(helpers.CONFIG, eval=EvalConfig(tasks=(task,), batch_size=64))
    tokenizer = vocabulary.train(["a red green blue white square frame"], 64)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        graphdef, params = nnx.split(FLIP(helpers.MODEL, nnx.Rngs(0)))
        encoder = Encoder(graphdef, nnx.to_pure_dict(params), tokenizer, config)
        results = dict(evaluators.run(encoder, config))
        (batch,) = datasets.batches(task.partition("/")[2], config, with_text=True)
        image_BxE = np.asarray(encoder.encode_image(batch["image"]))
        text_BxE = encoder.encode_text([texts[0] for texts in batch["texts"]])
    cosine = 100 * np.trace(image_BxE @ text_BxE.T) / 64
    assert results == {f"{task}/cosine": pytest.approx(cosine), "alignment/mean": pytest.approx(cosine)}
    with pytest.raises(UserError, match="alignment/cifar10=.*cifar10 has classes but no captions"):
        evaluators.find(f"alignment/cifar10=webdataset:{shards}/00000.tar", config)


def test_data_format(add, tmp_path):
    add("flip_jax/data/shards.py", shard_kinds)
    add("flip_jax/data/sources.py", sources, "KINDS")
    png = io.BytesIO()
    Image.new("RGB", (4, 4), (250, 0, 0)).save(png, "PNG")
    image = base64.b64encode(png.getvalue()).decode()
    lines = [
        json.dumps({"image": image, "caption": "a red square"}),
        "{",
        json.dumps({"image": image}),
        json.dumps({"image": "?", "caption": "x"}),
        json.dumps(["not a record"]),
        json.dumps({"image": image, "caption": "once more"}),
    ]
    (tmp_path / "0.jsonl").write_text("".join(line + "\n" for line in lines))
    source = sources.open_source(f"jsonl:{tmp_path}/*.jsonl", DataConfig())
    records = list(source.read([(0, 0)]))
    found = [record.get("bad") or record["texts"] for record, _ in records]
    assert found == [["a red square"], "damaged line", [], "damaged line", "damaged line", ["once more"]]
    assert records[0][0]["image"] == png.getvalue()
    rest = list(source.read([(0, 0)], offset=records[1][1]))
    assert [record for record, _ in rest] == [record for record, _ in records[2:]]


def test_recipe(add_file):
    config = config_check.from_config_dict(add_file("configs/flip_b32.py").get_config("seed=1"))
    assert (config.seed, config.total_steps, config.model.image.visible_patches) == (1, 78_125, 12)
