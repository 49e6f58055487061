"""Files and texts that strangers may have made: pipes, sizes, control characters, Markdown, implausible models."""

import dataclasses
import json
import logging
import os
import re
import shutil
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from helpers import CONFIG, command, make_encoder, records, save

import flip_jax
from flip_jax import config_check, manifest, runtime, saved_config, saved_step, stored_arrays, untrusted
from flip_jax.data import vocabulary
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.evaluators import class_file
from flip_jax.runtime import UserError
from flip_jax.tools import card
from flip_jax.tools.index import Index

EVIL = "a\x1b[2Jb\x07\x9b31m\u202ec\u2028d | `e` <img src=x> [f](http://g) *h* \udc80"


def test_a_terminal_is_shown_what_it_would_obey(capsys, caplog):
    shown = r"a\x1b[2Jb\x07\x9b31m\u202ec\u2028d | `e`"
    assert (
        untrusted.plain(EVIL).startswith(shown)
        and untrusted.plain("a\n\tb é 画 \U0001f600") == "a\n\tb é 画 \U0001f600"
    )
    assert untrusted.plain("a\r\nb\n c", lines=False) == "a b c"

    def fail():
        logging.getLogger("flip_jax.any").warning("key %s", EVIL)
        raise UserError(f"key {EVIL}")

    factory = logging.getLogRecordFactory()
    try:
        assert runtime.run(fail) == 1
    finally:
        logging.setLogRecordFactory(factory)
    printed = capsys.readouterr().err
    assert f"error: key {shown}" in printed and f"key {shown}" in caplog.text
    assert not re.search(r"[^\n -~]", printed)


def test_cards_show_what_markdown_would_obey():
    assert untrusted.markdown("a|b`c`<i>[d](e)\n# f") == r"a\|b\`c\`\<i\>\[d\](e) \# f"
    assert untrusted.markdown("a_b _c_ __d__") == r"a_b \_c\_ \_\_d\_\_"
    assert untrusted.code("a|b`c`\n|\x1b") == r"`a\|b'c' \|\x1b`"
    config = dataclasses.replace(CONFIG, init_from=EVIL, data=dataclasses.replace(CONFIG.data, vocab=EVIL, train=EVIL))
    made = card.describe(config, Tokenizer({"[PAD]": 0, "[UNK]": 1}), EVIL)
    made |= {
        "step": 1,
        "samples_seen": 16,
        "license": EVIL.encode(errors="ignore").decode(),
        "data": {"train": EVIL, "captions": [], "records": {EVIL: 1}},
        "evaluation": {"model": EVIL, "results": {f"zeroshot/{EVIL}/top1": 1.0}},
    }
    _, front, text = card.markdown(made, EVIL).split("---\n", 2)
    assert not re.search(r"[^\n -~]", text)
    for line in text.splitlines():
        bare = re.sub(r"`[^`]*`", "", re.sub(r"\\.", "", line))  # without what is escaped, and without code
        assert not re.search(r"[<>]|\]\(", bare), line
        assert bare.count("|") in (0, 3), line
    assert "\x1b" not in front and "<img" not in front.split("license")[0]


def test_pipes_devices_and_large_files_are_not_read(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(UserError, match="is not a regular file"):
            untrusted.read_file(path)
    (tmp_path / "card.json").symlink_to(pipe)
    (tmp_path / "index.json").symlink_to(pipe)
    for read in (
        lambda: vocabulary.read(pipe),
        lambda: card.from_model(tmp_path),
        lambda: card.add_evaluation({}, str(pipe)),
        lambda: records("karpathy", f"{pipe}#train"),
        lambda: class_file.read(str(pipe)),
        lambda: Index(tmp_path),
    ):
        with pytest.raises(UserError, match=r"regular file|existing file|not a file|has no index.json"):
            read()
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(UserError, match=r"large has more than the 100 bytes that are read"):
        untrusted.read_file(tmp_path / "large", 100)
    assert untrusted.read_file(tmp_path / "large", 101) == bytes(101)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.image.width", 2**40),
        ("model.image.image_size", 2**20),
        ("model.text.depth", 10**9),
        ("model.text.vocab_size", 10**12),
        ("model.embed_dim", 2**30),
        ("eval.batch_size", 10**10),
        ("data.threads", 10**6),
    ],
)
def test_sizes_in_configs_are_bounded(key, value):
    with pytest.raises(UserError, match=f"config.{key} must be at most .*got {value}"):
        saved_config.from_flat(config_check.flatten(CONFIG) | {key: value})


def test_the_number_of_patches_is_bounded():
    changes = {"model.image.image_size": 4096, "model.image.patch_size": 2}
    with pytest.raises(UserError, match="4194304 patches of 2 px are more than 65536"):
        saved_config.from_flat(config_check.flatten(CONFIG) | changes)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"model": None},
        {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": 2**40}}},
        {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": -1}}},
        {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": "2"}}},
        {"model": {"type": "BPE", "merges": {"a": "b"}}},
        {"model": {"type": "BPE", "merges": ["ab"]}},
        {"model": {"type": "BPE", "merges": [[1, 2]]}},
        {"model": {"type": "BPE", "merges": [["a", "b", "c"]]}},
    ],
)
def test_damaged_tokenizers_are_refused(content):
    with pytest.raises(UserError, match="tokenizer of the checkpoint is damaged|does not join two earlier tokens"):
        Tokenizer.from_json(content)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "1"
    save(make_encoder(), folder)
    return folder


def test_ids_above_the_vocabulary_are_refused(step):
    encoder = flip_jax.load(step)
    name = step.parent / "ids"
    encoder.tokenizer = Tokenizer({"[PAD]": 0, "[UNK]": 1, "a": CONFIG.model.text.vocab_size})
    save(encoder, name)
    with pytest.raises(UserError, match="tokenizer has ids up to 64, above config.model.text.vocab_size 64"):
        flip_jax.load(name)


def test_chunks_larger_than_their_array_are_refused_before_they_are_read(step, tmp_path):
    params = flip_jax.load(step).params
    for item in ("config", "tokenizer"):
        shutil.copytree(step / item, tmp_path / item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params})
    manifest.write(epath.Path(tmp_path))  # a stranger's manifest may suit the files
    assert flip_jax.load(tmp_path)
    (array,) = (tmp_path / "state").glob("*image.patch_kernel/.zarray")
    content = json.loads(array.read_text())
    array.write_text(json.dumps(content | {"chunks": [2**34, *content["chunks"][1:]]}))
    (tmp_path / manifest.NAME).unlink()
    manifest.write(epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"image.patch_kernel of shape \(.*\) is stored in chunks of \(17179869184"):
        flip_jax.load(tmp_path)
    array.write_text("{}")
    (tmp_path / manifest.NAME).unlink()
    manifest.write(epath.Path(tmp_path))
    with pytest.raises(UserError, match="has no weights, or says nothing of their shapes"):
        flip_jax.load(tmp_path)


def test_weights_far_larger_than_their_files_are_refused(tmp_path):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/state/params.a/"}}
    tensorstore.open(spec, create=True, dtype=tensorstore.float32, shape=[2**20, 2**12]).result()  # 16 GB of zeros
    stored = types.SimpleNamespace(shape=(2**20, 2**12), dtype=np.dtype("f4"), storage=None)
    with pytest.raises(UserError, match=r"weights of 17,179,869,184 bytes are stored in \d{2,3}, at most 64 times"):
        stored_arrays.checked(tmp_path, {"params": {"a": stored}})


def test_a_step_with_a_pipe_or_huge_settings_is_refused(step, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_SETTINGS", 1000)
    with pytest.raises(UserError, match=r"manifest.json has .* bytes, at most 1,000 are read"):
        saved_step.newest(str(step))
    monkeypatch.undo()
    os.mkfifo(step / "config" / "pipe")
    try:
        with pytest.raises(UserError, match="pipe is not a regular file: the checkpoint is damaged"):
            saved_step.newest(str(step))
    finally:
        (step / "config" / "pipe").unlink()


@pytest.mark.parametrize("name", ["../../secret", "/etc/part-000000-0000", "part-000000-0000/../x", "part-0\n"])
def test_the_parts_of_an_index_stay_in_its_folder(tmp_path, name):
    (tmp_path / "index.json").write_text(json.dumps({"parts": {name: 1}}))
    with pytest.raises(UserError, match="names parts that `flip embed` does not write"):
        Index(tmp_path)


def test_an_error_of_a_command_is_one_plain_message(tmp_path):
    done = command("inspect", source=f"webdataset:{tmp_path}/\x1b[2J.tar")
    assert done.returncode == 1 and "\x1b" not in done.stderr and r"\x1b[2J.tar" in done.stderr
