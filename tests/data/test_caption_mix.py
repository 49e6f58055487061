"""Captions drawn from several keys: shares, what a record lacks, any epoch again, and what is refused."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from helpers import CONFIG, png, write_samples
from pyarrow import parquet

from flip_jax import config_check
from flip_jax.config import DataConfig, FinetuneConfig
from flip_jax.data import samples, sources
from flip_jax.runtime import UserError

MIXED = ("1*caption", "3*synthetic", "0*txt")
FIELDS = [
    {"caption": "a", "synthetic": "b"},
    {"caption": "a"},
    {"caption": " ", "synthetic": "b"},
    {"caption": '["a", "c"]', "synthetic": "b"},
    {},
]
# Of each record: the chance of every text.
CHANCES = [{"a": 0.25, "b": 0.75}, {"a": 1.0}, {"b": 1.0}, {"a": 0.125, "c": 0.125, "b": 0.75}, {}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_samples(folder / "0.tar", [{"png": png(i), "json": json.dumps(f).encode()} for i, f in enumerate(FIELDS)])
    columns = {name: [fields.get(name) for fields in FIELDS] for name in ("synthetic", "caption")}
    parquet.write_table(pa.table({"image": [png(i) for i in range(len(FIELDS))], **columns}), folder / "0.parquet")
    (folder / "pairs.csv").write_text("filepath,caption\n0.png,a\n")
    return folder


def read(source, key="config.data.train", captions=MIXED):
    source = sources.open_source(source, DataConfig(captions=captions), key)
    return list(sources.in_order(source, iter(range(len(source)))))


@pytest.mark.parametrize("kind, name", [("webdataset", "0.tar"), ("parquet", "0.parquet")])
def test_a_key_has_its_share_among_those_that_a_record_has(folder, kind, name):
    records = read(f"{kind}:{folder}/{name}")
    assert [dict(zip(record["texts"], record.get("chances", ()), strict=True)) for record in records] == CHANCES
    plain = read(f"{kind}:{folder}/{name}", captions=("caption", "synthetic"))
    assert [record["texts"] for record in plain] == [["a"], ["a"], ["b"], ["a", "c"], []]
    assert not [record for record in plain if "chances" in record]
    evaluated = read(f"{kind}:{folder}/{name}", "source")
    assert [record["texts"] for record in evaluated] == [record["texts"] for record in plain]


def test_one_is_drawn_by_seed_epoch_and_record(folder):
    record = read(f"webdataset:{folder}/0.tar")[0]
    target = samples.Target("text", lambda record: record["texts"], list)

    def drawn(record, config=CONFIG):
        epochs = [record | {"epoch": epoch} for epoch in range(2000)]
        return [text for _, text in samples.prepare(epochs, config, target)]

    texts = drawn(record)
    assert drawn(record) == texts
    assert drawn(record | {"key": "another"}) != texts and drawn(record, dataclasses.replace(CONFIG, seed=4)) != texts
    np.testing.assert_allclose(texts.count("b") / 2000, 0.75, atol=0.04)  # 4 standard deviations


def test_a_classifier_draws_no_caption(folder):
    config = dataclasses.replace(CONFIG, finetune=FinetuneConfig(classes=3))
    record = read(f"webdataset:{folder}/0.tar")[0] | {"epoch": 0, "label": 2}
    assert samples.prepare([record], config, samples.make_target(config, None))[0][1] == 2


@pytest.mark.parametrize(
    "captions, message",
    [
        (("0.5*caption", "synthetic"), r"'synthetic' must be WEIGHT\*KEY with a weight of at least 0"),
        (("0.5*caption", "-1*synthetic"), r"'-1\*synthetic' must be"),
        (("half*caption",), r"'half\*caption' must be"),
        (("0.5*",), r"'0.5\*' must be"),
        (("nan*caption",), r"'nan\*caption' must be"),
        (("0*caption", "0*synthetic"), "all weights are 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(captions, message):
    with pytest.raises(UserError, match=f"config.data.captions.*{message}"):
        config_check.from_config_dict({"data": {"captions": captions}})


def test_a_source_of_one_key_is_refused_in_training_alone(folder):
    with pytest.raises(UserError, match="need config.data.train to be of kind webdataset, tfrecord, parquet, got csv"):
        read(f"csv:{folder}/pairs.csv")
    sources.open_source(f"csv:{folder}/pairs.csv", DataConfig(captions=MIXED))


def test_the_command_line_takes_them_as_they_are_written():
    recipe = ["--config=configs/flip_l16.py", "--config.data.captions=0.5*caption,0.5*synthetic"]
    assert config_check.read_recipe(recipe).data.captions == ("0.5*caption", "0.5*synthetic")
