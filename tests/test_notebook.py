"""Run the notebook from top to bottom, and check that its outputs are not committed."""

import ast
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import nbclient
import nbformat
import pytest
from helpers import REPO, environment, make_encoder, metrics, png

from flip_jax import weights

NOTEBOOK = REPO / "colab" / "flip_demo.ipynb"
SAMPLES = 2560


def test_no_outputs_are_committed():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None and not cell.metadata for cell in cells)
    assert notebook.metadata.keys() <= {"kernelspec", "language_info", "colab"}
    assert not re.search(r"/(work|home|root|tmp|content)/", text)


def install(folder, monkeypatch, run, repository=""):
    """Runs the cell that finds or fetches the source, in a folder; returns the checkout that it found."""
    (cell,) = (c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if "REPOSITORY =" in c.source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    names = {}
    exec(cell.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), names)
    return names["root"]


def source(folder):
    """Writes what the notebook looks for in a checkout."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "flip_emoji.py").write_text("")
    return folder


def failing(command, **_):
    return types.SimpleNamespace(returncode=1)


def test_it_uses_the_checkout_that_it_lies_in(monkeypatch):
    assert install(REPO / "colab", monkeypatch, None) == REPO


def test_an_address_is_cloned(tmp_path, monkeypatch):
    def clone(command, check):
        assert command[:3] == ["git", "clone", "--depth=1"] and command[3] == "https://host/flip_jax" and check
        source(pathlib.Path(command[4]))

    assert install(tmp_path, monkeypatch, clone, "https://host/flip_jax") == tmp_path / "flip_jax"


def test_without_an_address_the_source_is_that_of_the_package_index(tmp_path, monkeypatch):
    def download(command):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "flip_jax"
        (out,) = (pathlib.Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        source(tmp_path / "made" / "flip_jax-1.0")
        shutil.make_archive(out / "flip_jax-1.0", "gztar", tmp_path / "made")
        return types.SimpleNamespace(returncode=0)

    assert install(tmp_path, monkeypatch, download) == tmp_path / "flip_jax" / "flip_jax-1.0"


@pytest.mark.parametrize("prefix", ["", "flip_jax-main"])
def test_colab_asks_for_an_archive_that_the_index_does_not_have(tmp_path, monkeypatch, capsys, prefix):
    source(tmp_path / "made" / prefix)

    def upload():
        shutil.make_archive(tmp_path / "archive", "zip", tmp_path / "made")
        return {"archive.zip": b""}

    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert install(tmp_path, monkeypatch, failing) == tmp_path / "flip_jax" / prefix
    assert "Upload an archive of its repository: .zip or .tar.gz" in capsys.readouterr().out


def test_without_any_source_the_three_ways_are_named(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="in a checkout, set REPOSITORY to the address .* or upload an archive"):
        install(tmp_path, monkeypatch, failing)


def test_it_names_only_what_our_modules_have():
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for source in cells for node in ast.walk(ast.parse(source))]
    modules = {
        alias.name: importlib.import_module(f"{node.module}.{alias.name}")
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flip_jax")
        for alias in node.names
        if not alias.name[0].isupper()
    }
    used = [
        (node.value.id, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    used = [(name, attribute) for name, attribute in used if name in modules]
    assert len(used) > 10
    assert not [f"{name}.{attribute}" for name, attribute in used if not hasattr(modules[name], attribute)]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    """Train briefly and use a converted model; everything else runs as a user would run it."""
    encoder = make_encoder()
    weights.write(tmp_path / "converted", encoder.params, encoder.tokenizer, encoder.config)
    (tmp_path / "own").mkdir()
    for i in range(3):
        (tmp_path / "own" / f"{i}.png").write_bytes(png(i))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = environment() | {
        "FLIP_JAX_NOTEBOOK_DIR": str(tmp_path / "work"),
        "FLIP_JAX_NOTEBOOK_SAMPLES": str(SAMPLES),
        "FLIP_JAX_CONVERTED": str(tmp_path / "converted"),
        "FLIP_JAX_NOTEBOOK_IMAGES": str(tmp_path / "own"),
    }
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=env)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 7  # masks, data, curve, classes, hits, time and memory, own images
    found = re.search(r"zero-shot top-1 ([\d.]+) % top-5 ([\d.]+) % over 1890 classes", text)
    losses = [line["loss"] for line in metrics(tmp_path / "work" / f"run_{SAMPLES}") if "loss" in line]
    assert found and 0 < float(found[2]) < 100 and losses[-1] < losses[0]
    memory = [float(share) for share in re.findall(r"mask [\d.]+ .* of the time, ([\d.]+) of the memory", text)]
    assert len(memory) == 3 and memory[0] == 1 > memory[1] > memory[2]
    shares = [float(share) for share in re.findall(r"([\d.]+)%  cosine [-\d.]+  a photo of", text)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
    for index, rows in (("index", 1890), ("own_index", 3)):
        assert json.loads((tmp_path / "work" / f"run_{SAMPLES}" / index / "index.json").read_text())["rows"] == rows
