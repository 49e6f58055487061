"""The metrics of a run: metrics.jsonl, parameters.txt, TensorBoard as it reads them, a stand-in for wandb."""

import dataclasses
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import types

import helpers
import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from helpers import REPO, environment, final_params, leaves
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flip_jax import metrics, metrics_file, sharding, trackers, train, train_step
from flip_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, LogConfig, MeshConfig
from flip_jax.evaluators import snapshot
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError


def board(workdir):
    """The event files of a workdir, as TensorBoard reads them."""
    return EventAccumulator(str(workdir), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()


def tiles(event):
    """The image of an event as its images [N, S, S, 3]: up to eight in a row."""
    row = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    return row.reshape(len(row), -1, len(row), 3).swapaxes(0, 1)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package wandb: `calls` holds the arguments of `init` and then of each `log`."""
    module = types.ModuleType("wandb", "a stand-in")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: module.calls.append((step, values)), finish=lambda: module.calls.append("finish")
    )
    module.init = lambda **settings: module.calls.append(settings) or run
    module.Histogram, module.Image = lambda array: ("histogram", np.size(array)), lambda array: ("image", array.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def shallow(**changes):
    return helpers.model_with(image_depth=1, text_depth=1, unroll=True, **changes)


def settings(shards, **changes):
    config = dataclasses.replace(
        helpers.CONFIG,
        total_samples=64,
        model=shallow(text_vocab_size=100),
        data=DataConfig(train=f"webdataset:{shards}/{{00000..00001}}.tar", shuffle_window=50),
        eval=EvalConfig(every_steps=2, batch_size=16),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    return dataclasses.replace(config, **changes)


def test_a_run_writes_scalars_histograms_and_masks(shards, tmp_path, wandb, capsys):
    train.train(settings(shards, log=LogConfig(every_steps=1, wandb="project")), tmp_path / "seen")
    lines = metrics_file.read(epath.Path(tmp_path / "seen"))
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    used, following = ([line[f"{name}learning_rate"] for line in lines if "loss" in line] for name in ("", "next_"))
    assert used[0] == 0 and used[1:] == following[:-1]
    said = capsys.readouterr().out
    assert f"  lr {used[1]:.3g}  " in next(line for line in said.splitlines() if line.startswith("step 1/4"))
    assert re.search(r"saving step 4 \.\.\.\nsaved step 4 \([\d.e-]+ GB, \d+ s\)\n", said)
    events = board(tmp_path / "seen")
    for name in {name for line in lines for name in line} - {"step"}:
        wanted = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted, name
    for name, count in (("logits/pairs", 16), ("logits/others", 16 * 15)):
        assert [(event.step, event.histogram_value.num) for event in events.Histograms(name)] == [
            (2, count),
            (4, count),
        ]
    assert [(event.step, tiles(event).shape) for event in events.Images("masks")] == [
        (2, (8, 32, 32, 3)),
        (4, (8, 32, 32, 3)),
    ]
    start, *logged, last = wandb.calls
    assert last == "finish" and start["mode"] == "offline" and start["project"] == "project"
    assert start["config"]["model.image.width"] == 32 and start["dir"] == str(tmp_path / "seen")
    assert [{"step": step, **values} for step, values in logged if "samples_seen" in values] == lines
    assert (4, {"logits/pairs": ("histogram", 16), "logits/others": ("histogram", 240)}) in logged
    assert (4, {"masks": [("image", (32, 32, 3))] * 8}) in logged


@pytest.mark.slow
def test_a_tracked_run_learns_the_same(shards, tmp_path, monkeypatch):
    train.train(settings(shards), tmp_path / "seen")
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [])
    train.train(settings(shards), tmp_path / "unseen")
    assert board(tmp_path / "seen").Images("masks") and not list((tmp_path / "unseen").glob("events*"))
    for one, other in zip(*(leaves(final_params(tmp_path / name, 4)) for name in ("seen", "unseen")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_tensorboardx_only_metrics_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        write(tmp_path, 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "TensorBoard is off: pip install tensorboardX" in caplog.text


def write(workdir, resumed, *steps):
    """Writes a loss of 1 / step after resuming at a step."""
    writer = metrics.Writer(epath.Path(workdir), resumed, Config())
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


@pytest.mark.parametrize("kept", [1, 2], ids=["within a line", "before the end of a line"])
def test_lines_of_lost_steps_and_lines_cut_by_a_kill_are_dropped(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [])
    path = epath.Path(tmp_path / "metrics.jsonl")
    write(tmp_path, 0, 1, 2)
    path.write_text(path.read_text()[: -5 if kept == 1 else -1])
    assert [line["step"] for line in metrics_file.read(epath.Path(tmp_path))] == [1, 2][:kept]
    write(tmp_path, 2, 4, 8)
    write(tmp_path, 4, 5)
    lines = [{"step": step, "loss": 1 / step} for step in [1, 2][:kept] + [4, 5]]
    assert metrics_file.read(epath.Path(tmp_path)) == lines
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in lines)


DAMAGE = [b"\xff\xfe", b"\0" * 4096, b"[" * 100_000, b"null", b"3", b"[1, 2]", b'"step"', b"{}", b'{"step": "3"}']
DAMAGE += [
    b'{"step": NaN}',
    b'{"step": null, "loss": 1}',
    b'{"step": 1, "loss": [1]}',
    b'{"step": 1} {"step": 2}',
    b"\r",
]


def test_damaged_lines_are_dropped_and_counted_and_the_file_is_replaced_in_one_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [])
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, 0, 1, 2)
    first, second = path.read_bytes().splitlines(keepends=True)
    content = first + b"".join(line + b"\n" for line in DAMAGE) + second
    path.write_bytes(content)
    os.link(path, tmp_path / "before")
    assert [line["step"] for line in metrics_file.read(epath.Path(tmp_path))] == [1, 2]
    capsys.readouterr()
    write(tmp_path, 2, 3)
    assert capsys.readouterr().out == f"{path}: dropped {len(DAMAGE)} damaged lines of {len(DAMAGE) + 2}\n"
    assert [line["step"] for line in metrics_file.read(epath.Path(tmp_path))] == [1, 2, 3]
    assert path.read_bytes().startswith(first + second)
    assert (tmp_path / "before").read_bytes() == content  # nothing was written into the old file
    assert sorted(os.listdir(tmp_path)) == ["before", "metrics.jsonl"]


def test_tensorboard_hides_the_events_of_lost_steps(tmp_path, monkeypatch):
    write(tmp_path, 0, 2, 4)
    # The name of an event file has its second.
    (first,) = tmp_path.glob("events*")
    first.rename(tmp_path / "events.out.tfevents.0")
    write(tmp_path, 2, 3)
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("loss")] == [
        (2, 0.5),
        (3, np.float32(1 / 3)),
    ]


def test_parameters_are_listed_once_by_the_first_process(tmp_path, monkeypatch):
    config = dataclasses.replace(helpers.CONFIG, mesh=MeshConfig(fsdp=2))
    program = train_step.make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:2]))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    metrics.write_parameters(epath.Path(tmp_path), program.state.params)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    metrics.write_parameters(epath.Path(tmp_path), program.state.params)
    text = (tmp_path / "parameters.txt").read_text()
    sizes = [leaf.size for leaf in leaves(nnx.to_pure_dict(nnx.state(FLIP(config.model, nnx.Rngs(0)))))]
    assert text.splitlines()[-1] == f"Total: {sum(sizes):,} -- {4 * sum(sizes):,} bytes"
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "float32" in line]
    assert len(rows) == len(sizes) and sorted(int(row[4].replace(",", "")) for row in rows) == sorted(sizes)
    (projection,) = (row for row in rows if row[1] == "image_projection/kernel")
    assert projection[2] == "(32, 16)" and "fsdp" in projection[5]


def test_a_resumed_run_keeps_its_name_in_weights_and_biases(tmp_path, wandb, monkeypatch):
    config = dataclasses.replace(helpers.CONFIG, log=LogConfig(wandb="project"))
    for mode in ("offline", "online"):
        trackers.WeightsAndBiases(epath.Path(tmp_path), config).close()
        monkeypatch.setenv("WANDB_MODE", "online")
        assert wandb.calls[-2]["mode"] == mode
    first, second = (call for call in wandb.calls if call != "finish")
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_missing_weights_and_biases_is_refused_before_the_run(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="config.log.wandb 'p' needs .* not installed: pip install wandb"):
        train.train(settings(shards, log=LogConfig(wandb="p")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"image_mask_ratio": 0.75}, 4), ({"image_mask_ratio": 0.0}, 16)],
)
def test_the_images_show_the_patches_that_stay(changes, kept):
    image, text = helpers.batch()
    image = np.minimum(image, 200)  # no patch looks like a removed one
    _, images = taken(shallow(**changes), image, text, 1)
    assert images["masks"].shape == (8, 32, 32, 3)
    for shown, whole in zip(images["masks"], image, strict=False):
        patches = [x.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1) for x in (shown, whole)]
        same = np.all(patches[0] == patches[1], axis=1)
        assert same.sum() == kept and np.all(patches[0][~same] == snapshot.GREY)


def test_a_resized_image_is_shown_at_its_size():
    image, text = helpers.batch()
    _, images = taken(shallow(image_mask="resize", image_mask_ratio=0.75), image, text, 1)
    assert images["masks"].shape == (8, 16, 16, 3)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_the_logits_are_those_of_the_embeddings_on_any_layout(loss):
    image, text = helpers.batch()
    model = shallow(loss=loss, image_mask_ratio=0.0)
    flip = FLIP(model, nnx.Rngs(0))
    by_hand = 1 / 0.07 * np.asarray(flip.encode_image(image)) @ np.asarray(flip.encode_text(text)).T
    by_hand += -10.0 if loss == "sigmoid" else 0.0
    for devices in (1, 8):
        histograms, _ = taken(model, image, text, devices)
        # Embeddings within 5e-6 move both sides of a cosine, and 1 / 0.07 multiplies it.
        np.testing.assert_allclose(histograms["logits/pairs"], np.diag(by_hand), rtol=0, atol=1e-4)
        np.testing.assert_allclose(histograms["logits/others"], by_hand[~np.eye(16, dtype=bool)], rtol=0, atol=1e-4)


def taken(model, image, text, devices):
    """The snapshot of a fresh model on that many devices."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    graphdef, params = nnx.split(FLIP(model, nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        look = snapshot.Snapshot(graphdef, dataclasses.replace(helpers.CONFIG, model=model), mesh)
        return look(nnx.to_pure_dict(params), {"image": image, "text": text}, 5)


REAL = """
import pathlib, sys
sys.modules["tensorflow"] = None  # as if it were not installed
import numpy as np
from etils import epath
from flip_jax import config, metrics
workdir = epath.Path(sys.argv[1])
writer = metrics.Writer(workdir, 0, config.Config(log=config.LogConfig(wandb=sys.argv[2])))
writer.write(7, {"loss": 1.5})
writer.draw(7, {"logits": np.arange(100.0)}, {"masks": np.arange(384).astype(np.uint8).reshape(2, 8, 8, 3)})
writer.close()
"""


def write_in_a_process(workdir, project=""):
    command = [sys.executable, "-c", REAL, str(workdir), project]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_tensorboard_reads_what_is_written_without_tensorflow(tmp_path):
    write_in_a_process(tmp_path)
    events = board(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 1.5)]
    (event,) = events.Histograms("logits")
    histogram = event.histogram_value
    assert (event.step, histogram.min, histogram.max, histogram.num) == (7, 0, 99, 100)
    assert (histogram.sum, histogram.sum_squares) == (4950, 328350)
    # The buckets hold as many of 0 ... 99 as lie below their limits.
    below = [np.sum(np.arange(100) < limit) for limit in histogram.bucket_limit]
    np.testing.assert_array_equal(np.cumsum(histogram.bucket)[:-1], below[:-1])
    (masks,) = events.Images("masks")
    np.testing.assert_array_equal(tiles(masks), np.arange(384).astype(np.uint8).reshape(2, 8, 8, 3))


def test_weights_and_biases_writes_offline(tmp_path):
    pytest.importorskip("wandb")
    write_in_a_process(tmp_path, "project")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert len(list(folder.glob("files/media/images/masks_*.png"))) == 2


@pytest.mark.parametrize("rate, said", [(0.44, " 0.4 images/s"), (9.5, " 9.5 images/s"), (1234.4, " 1,234 images/s")])
def test_slow_steps_are_shown_with_a_decimal(rate, said):
    scalars = {"loss": 1.0, "samples_seen": 1, "next_learning_rate": 0.1, "images_per_second": rate, "seconds_left": 3}
    assert said in metrics.progress_line(1, 2, scalars)


@pytest.mark.parametrize(
    ("every", "saves", "due"),
    [(4, [4], 2), (4, [], 0), (5, [5], 1), (3, [3], 3), (0, [], 0)],
    ids=["8 and 10 are due", "none was seen", "10 is due", "6, 9 and 10 are due", "only the last step, not seen"],
)
def test_the_time_left_counts_what_is_still_due(monkeypatch, every, saves, due):
    """Ten steps of two seconds; a save takes 3 seconds, and the first evaluation 30 and the second one 10."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = metrics.Progress(0, 10)
    progress.begin(1.0, 16, 10)
    for step, seconds in ((1, 30), (2, 10), (3, 0), (4, 0), (5, 0)):
        now[0] += 2
        if step in (1, 2):
            with progress.pause("evaluation", 1):
                now[0] += seconds
        if step in saves:
            with progress.pause("save", every):
                now[0] += 3
    now[0] += 2
    report = progress.report(6)
    assert report["images_per_second"] == pytest.approx(16 / 2)
    # Steps 7 to 10, the evaluations of steps 6 to 10, and the saves.
    assert report["seconds_left"] == pytest.approx(4 * 2 + 5 * 20 + due * 3)
    now[0] += 8
    # The last step is done, and its evaluation and save are not.
    assert progress.report(10)["seconds_left"] == pytest.approx(20 + 3 * bool(saves))


def test_the_time_left_counts_later_stages_by_their_flops(monkeypatch):
    """Four steps of 16 samples, one FLOP each, take 8 seconds; 2 steps are left, and 96 FLOPs of later stages."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    progress = metrics.Progress(0, 12)
    progress.begin(1.0, 16, 6, later_flops=96)
    now[0] = 8
    assert progress.report(4)["seconds_left"] == pytest.approx(2 * 2 + 96 / (16 / 2))
    now[0] = 12
    progress.report(6)
    now[0] = 50  # between two stages
    progress.begin(3.0, 8, 10)
    now[0] = 53
    report = progress.report(8)
    assert report["images_per_second"] == pytest.approx(2 * 8 / 3)
    assert report["seconds_left"] == pytest.approx(3)
