"""`flip push`: what goes to the hub, what it asks, and what it refuses."""

import pytest
from helpers import make_encoder, save
from hub_stand_in import Hub
from huggingface_hub import constants

import flip_jax
from flip_jax.tools import __main__ as flip
from flip_jax.tools import push


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    save(make_encoder(), root / "run" / "checkpoints" / "1")
    assert flip.main(["convert", "export", str(root / "run"), str(root / "out")]) == 0
    (root / "out" / "notes.txt").write_text("mine")
    (root / "out" / "pytorch_model.bin").write_bytes(b"pickle")
    return root / "out"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


WANTED = {"README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json"}


def test_a_dry_run_lists_what_would_go_and_contacts_nobody(folder, hub, capsys):
    assert flip.main(["push", str(folder), "org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WANTED) and "these stay: notes.txt, pytorch_model.bin" in out
    assert not hub.requests


def test_a_folder_is_uploaded_and_loaded_from_there(folder, hub, capsys, monkeypatch):
    # Nobody is at the terminal.
    assert flip.main(["push", str(folder), "org/name"]) == 1
    assert "org/name was not made: give --private, or --public" in capsys.readouterr().err
    assert not hub.created
    assert flip.main(["push", str(folder), "org/name", "--private"]) == 0
    assert hub.created[0]["visibility"] == "private" and f"{hub.url}/org/name" in capsys.readouterr().out
    assert set(hub.repositories["org/name"]["main"]) == WANTED
    assert flip_jax.load("hf://org/name").config == flip_jax.load(folder).config
    assert flip.main(["push", str(folder), "org/name"]) == 0  # it exists now, and nothing is asked
    assert len(hub.created) == 1

    monkeypatch.setattr(push.sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code in (("n", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert flip.main(["push", str(folder), "org/public"]) == code
    assert hub.created[1]["visibility"] == "public"


def test_what_cannot_be_pushed_is_refused(folder, hub, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    hub.add("org/closed", {})
    hub.private.add("org/closed")
    for arguments, message in (
        ([str(folder.parent / "run"), "org/name"], "is a run: flip convert export"),
        ([str(tmp_path / "empty"), "org/name"], "holds no checkpoint"),
        ([str(tmp_path / "none"), "org/name"], "is no folder"),
        ([str(folder), "name"], "is no name of a repository: write ORG/NAME"),
        ([str(folder), "../name"], "is no name of a repository"),
    ):
        assert flip.main(["push", *arguments]) == 1
        assert message in capsys.readouterr().err
    (folder / "README.md").rename(folder / "saved.md")
    assert flip.main(["push", str(folder), "org/name"]) == 1
    assert "has no model card: write one, flip card --model=" in capsys.readouterr().err
    (folder / "saved.md").rename(folder / "README.md")
