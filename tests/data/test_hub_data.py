"""Data of the hub: webdataset and Parquet at hf://datasets/..., read as it comes from a stand-in."""

import io
import subprocess
import sys

import pyarrow
import pytest
from helpers import REPO, environment, png, records, samples, summary, write_tar
from hub_stand_in import Hub
from huggingface_hub import HfFileSystem, constants
from pyarrow import parquet

from flip_jax.config import Config, DataConfig
from flip_jax.data import pipeline, sources
from flip_jax.runtime import UserError

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
PLACE = "hf://datasets/org/pairs"


def table(start, captions):
    """A Parquet file with the hub's image column."""
    images = [{"bytes": png(i), "path": None} for i in range(start, start + len(captions))]
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": pyarrow.array(images, STRUCT), "caption": captions}), out)
    return out.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    files = {}
    for i in range(2):
        path = write_tar(tmp_path / f"{i}.tar", samples(3, 3 * i))
        files[f"data/{i}.tar"] = open(path, "rb").read()
    files["data/train-0.parquet"] = table(0, pyarrow.array([["a", "b"], ["c"]]))
    files["data/val-0.parquet"] = table(2, pyarrow.array(["d", "d", "e"]).dictionary_encode())
    hub.add("datasets/org/pairs", files)
    hub.add("datasets/org/pairs", {"other.tar": files["data/1.tar"]}, "v1")
    hub.add("datasets/org/closed", files)
    hub.private.add("datasets/org/closed")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    HfFileSystem.clear_instance_cache()
    yield hub
    HfFileSystem.clear_instance_cache()
    hub.close()


def test_tars_are_read_as_they_come(hub, tmp_path):
    found = records("webdataset", f"{PLACE}/data/*.tar")
    assert summary(found) == [(f"{i // 3}.tar/{i:05}", [f"picture {i}"], None) for i in range(6)]
    assert [record["image"] for record in found] == [png(i) for i in range(6)]
    assert summary(records("webdataset", f"{PLACE}/data/{{0..1}}.tar")) == summary(found)
    assert summary(records("webdataset", f"{PLACE}@v1/other.tar"))[0][0] == "other.tar/00003"
    assert hub.ranges  # parts, never a whole file at once
    assert not (tmp_path / "cache").exists()  # nothing is kept


def test_parquet_of_several_splits_has_lists_and_dictionaries_of_captions(hub):
    train = records("parquet", f"{PLACE}/data/train-*.parquet")
    assert [(r["image"], r["texts"]) for r in train] == [(png(0), ["a", "b"]), (png(1), ["c"])]
    val = records("parquet", f"{PLACE}/data/val-*.parquet")
    assert [(r["image"], r["texts"]) for r in val] == [(png(2), ["d"]), (png(3), ["d"]), (png(4), ["e"])]
    both = f"parquet:{PLACE}/data/train-*.parquet;parquet:{PLACE}/data/val-*.parquet"
    mixture = pipeline.open_mixture(Config(data=DataConfig(train=both)))
    assert [len(source) for _, source in mixture] == [1, 1]


def test_a_command_finds_the_hub_by_its_usual_variable(hub, tmp_path):
    """In a process of its own, without any change to huggingface_hub."""
    env = environment() | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "flip_jax", "inspect", f"webdataset:{PLACE}/data/*.tar", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "6 records read: 6 usable" in done.stdout, done.stderr


@pytest.mark.parametrize("place", ["hf://datasets/org/closed/*.tar", "hf://datasets/org/none/*.tar"])
def test_data_that_is_not_there_or_closed_is_refused(hub, place):
    with pytest.raises(UserError, match="cannot be listed|shards are missing"):
        sources.open_source(f"webdataset:{place}", DataConfig())


def test_a_shard_that_is_missing_is_a_bad_record(hub, no_waiting):
    ((key, texts, bad),) = summary(records("webdataset", f"{PLACE}/data/7.tar"))
    assert (key, texts, bad) == ("7.tar", None, "unreadable shard")
