"""A run resumes with its files, wherever they are, and refuses others; what it says at its start."""

import dataclasses
import json
import os
import shutil

import fsspec
import jax.numpy as jnp
import pytest
from etils import epath
from helpers import CONFIG, png, samples, write_tar

from flip_jax import checkpoint, saved_config, saved_step, weights
from flip_jax.config import Config, DataConfig, ImageConfig, ModelConfig, TextConfig
from flip_jax.data import fingerprint, pipeline, vocabulary
from flip_jax.runtime import UserError

TOKENIZER = vocabulary.train([f"picture {i}" for i in range(200)], 100)
MODEL = ModelConfig(image=ImageConfig(image_size=16, patch_size=8), text=TextConfig(vocab_size=100, context_length=6))


def batches(train, rows=8, **data):
    settings = Config(global_batch_size=rows, model=MODEL, data=DataConfig(train=train, shuffle_window=20, **data))
    return iter(pipeline.train_dataset(settings, TOKENIZER, process_index=0, process_count=1))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        write_tar(tmp_path / "a" / f"{i}.tar", samples(20, start=20 * i))
    return tmp_path


def test_a_run_resumes_after_its_shards_moved(folder):
    started = batches(f"webdataset:{folder}/a/{{0..2}}.tar")
    next(started)
    state = json.loads(json.dumps(started.get_state()))
    truth = [next(started)["keys"] for _ in range(5)]
    shutil.move(folder / "a", folder / "elsewhere")
    resumed = batches(f"webdataset:{folder}/elsewhere/[012].tar")
    resumed.set_state(state)
    assert [next(resumed)["keys"] for _ in range(5)] == truth


@pytest.mark.parametrize("change", ["size", "head", "tail", "name", "order", "weight"])
def test_other_data_is_refused_with_what_differs(folder, change):
    train, path = f"webdataset:{folder}/a/{{0..2}}.tar", folder / "a" / "1.tar"
    state = batches(train).get_state()
    content = bytearray(path.read_bytes())
    if change == "size":
        path.write_bytes(content + bytes(512))
    elif change in ("head", "tail"):
        content[600 if change == "head" else -600] ^= 1
        path.write_bytes(content)
    elif change == "name":
        path.rename(folder / "a" / "5.tar")
        train = f"webdataset:{folder}/a/*.tar"
    elif change == "order":
        train = f"webdataset:{folder}/a/{{1,0,2}}.tar"
    else:
        train = f"2*{train}"
    message = {
        "size": f"1.tar: {len(content):,} bytes, now {len(content) + 512:,}",
        "head": "1.tar: other content of the same size",
        "tail": "1.tar: other content of the same size",
        "name": "1.tar, now 2.tar",
        "order": "0.tar, now 1.tar",
        "weight": "source 1: weight 1.0, now 2.0",
    }[change]
    with pytest.raises(UserError, match=f"saved with other data in config.data.train:(.|\n)*{message}"):
        batches(train).set_state(state)


def test_a_position_of_an_earlier_version_resumes(folder):
    train = f"webdataset:{folder}/a/{{0..2}}.tar"
    started = batches(train)
    next(started)
    state = {key: value for key, value in started.get_state().items() if key != "sources"}
    resumed = batches(train)
    resumed.set_state(state)
    assert next(resumed)["keys"] == next(started)["keys"]


def test_of_many_files_some_are_looked_at(folder):
    files = [f"{folder}/a/{i % 3}.tar" for i in range(1000)]
    found = fingerprint.of(files)
    assert (found["files"], len(found["some"])) == (1000, 16)
    assert [name for name, _, _ in found["some"]][::15] == ["0.tar", "0.tar"]  # the first and the last
    assert found["names"] != fingerprint.of(files[1:] + files[:1])["names"]
    missing = fingerprint.of([*files[:2], "/nowhere/2.tar"])["some"]
    assert missing[2] == ["2.tar", None, None] and None not in missing[0]


def test_the_size_of_files_that_are_not_looked_at_counts(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.tar").write_bytes(b"x" * 1024)
    files = sorted(map(str, tmp_path.iterdir()))
    then = fingerprint.of(files)
    assert then["bytes"] == 40 * 1024 and "01.tar" not in [name for name, _, _ in then["some"]]
    (tmp_path / "01.tar").write_bytes(b"x" * 1025)
    with pytest.raises(UserError, match="source 1: 40,960 bytes in all, now 40,961"):
        fingerprint.compare([then], [fingerprint.of(files)])


def test_data_that_cannot_be_read_is_one_line_at_start(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Anonymous caller does not have storage.objects.get access: 401")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", refuse)
    with pytest.raises(UserError, match="b/0.tar cannot be read: PermissionError.*gcloud auth .*aws configure"):
        batches("webdataset:memory://b/{0..3}.tar")


def test_the_captions_are_described_and_a_batch_above_the_source_is_warned_of(folder, caplog):
    caplog.set_level("INFO")
    (folder / "pairs.csv").write_text("image,title\n" + "".join(f'{i}.png,"say \x07 {i}"\n' for i in range(6)))
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(i))
    iterator = batches(f"csv:{folder}/pairs.csv")
    for _ in range(6):
        next(iterator)
    assert "6 records; captions come from column 'title', one text in the first, such as 'say \\x07 " in caplog.text
    assert "8 samples of a batch are more than the 6 usable records" in caplog.text
    caplog.clear()
    iterator = batches(f"webdataset:{folder}/a/{{0..2}}.tar")
    for _ in range(40):
        next(iterator)
    assert "captions come from text file (.txt), one text" in caplog.text and "more than" not in caplog.text


def test_only_a_checkpoint_that_knows_its_files_resumes_under_another_name(tmp_path):
    (tmp_path / "data").mkdir()
    for state, knows in (({"sources": []}, True), ({"shards": [3]}, False)):
        (tmp_path / "data" / "process_0-of-1.json").write_text(json.dumps(state))
        assert saved_config._knows_data(epath.Path(tmp_path)) == knows


@pytest.mark.parametrize("name", ["run[v2]", "what?", "a*b"])
def test_a_workdir_that_orbax_cannot_read_back_is_refused_at_start(tmp_path, name):
    with pytest.raises(UserError, match="a checkpoint cannot be read from a path with"):
        checkpoint.Checkpoints(tmp_path / name, 1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["run {a}", "läuf 日本", "#1 % & ' x", "trailing/"])
def test_a_workdir_with_other_characters_is_read_back(tmp_path, name):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = f"{tmp_path}/link/{name}"
    weights.write(folder, {"a": jnp.arange(3.0)}, TOKENIZER, dataclasses.replace(CONFIG, seed=9))
    assert saved_config.read(saved_step.newest(folder)).seed == 9
