"""Run the notebook from top to bottom, and check that its outputs are not committed."""

import json
import re

import nbclient
import nbformat
import pytest
from helpers import REPO, environment, make_encoder, metrics

from flip_jax import checkpoint

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


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    """Train briefly and use a converted model; everything else runs as a user would run it."""
    encoder = make_encoder()
    checkpoint.write(tmp_path / "converted", encoder.params, encoder.tokenizer, encoder.config)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = environment() | {
        "FLIP_JAX_NOTEBOOK_DIR": str(tmp_path / "work"),
        "FLIP_JAX_NOTEBOOK_SAMPLES": str(SAMPLES),
        "FLIP_JAX_CONVERTED": str(tmp_path / "converted"),
    }
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=env)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 6  # masks, data, curve, classes, hits, time and memory
    found = re.search(r"zero-shot top-1 ([\d.]+) % top-5 ([\d.]+) % over 1890 classes", text)
    losses = [line["loss"] for line in metrics(tmp_path / "work" / f"run_{SAMPLES}") if "loss" in line]
    assert found and 0 < float(found[2]) < 100 and losses[-1] < losses[0]
    memory = [float(share) for share in re.findall(r"mask [\d.]+ .* of the time, ([\d.]+) of the memory", text)]
    assert len(memory) == 3 and memory[0] == 1 > memory[1] > memory[2]
    shares = [float(share) for share in re.findall(r"([\d.]+)%  cosine [-\d.]+  a photo of", text)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
    assert json.loads((tmp_path / "work" / f"run_{SAMPLES}" / "index" / "index.json").read_text())["rows"] == 1890
