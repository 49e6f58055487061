"""What goes to TensorBoard and Weights & Biases: to stand-ins that note what they get, and to the real ones."""

import dataclasses
import importlib.util
import json
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

from flip_jax import sharding, train, writers
from flip_jax.config import CheckpointConfig, DataConfig, EvalConfig, LogConfig, MeshConfig
from flip_jax.evaluators import snapshot
from flip_jax.models.flip import FLIP


class Recorder:
    """A writer of clu's that only remembers."""

    made = []

    def __init__(self, folder):
        self.folder, self.calls, self.closed = folder, [], False
        Recorder.made.append(self)

    def __getattr__(self, name):
        if not name.startswith("write_"):
            raise AttributeError(name)
        return lambda step, values: self.calls.append((name, step, dict(values)))

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    """clu's TensorBoard writer, stood in for."""
    monkeypatch.setattr(Recorder, "made", [])
    module = types.ModuleType("clu.metric_writers")
    module.SummaryWriter = Recorder
    tensorflow, hidden = types.ModuleType("tensorflow"), []
    tensorflow.__spec__ = importlib.util.spec_from_loader("tensorflow", None)
    tensorflow.config = types.SimpleNamespace(set_visible_devices=lambda *what: hidden.append(what))
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    clu = types.ModuleType("clu")
    clu.metric_writers = module
    monkeypatch.setitem(sys.modules, "clu", clu)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", module)
    yield Recorder.made
    assert hidden == [([], "GPU")]


@pytest.fixture
def wandb(monkeypatch):
    """The package wandb, stood in for: `calls` holds what `init` and then `log` got."""
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


def test_a_run_writes_scalars_histograms_and_masks(shards, tmp_path, tensorboard, wandb):
    train.train(settings(shards, log=LogConfig(every_steps=1, wandb="project")), tmp_path / "seen")
    (board,) = tensorboard
    assert board.folder == str(tmp_path / "seen") and board.closed
    scalars = [(step, values) for name, step, values in board.calls if name == "write_scalars"]
    lines = [json.loads(line) for line in (tmp_path / "seen" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in scalars] == lines
    assert [step for step, values in scalars if "loss" in values] == [1, 2, 3, 4]
    drawn = {(name, step): values for name, step, values in board.calls if name != "write_scalars"}
    assert list(drawn) == [(name, step) for step in (2, 4) for name in ("write_histograms", "write_images")]
    for step in (2, 4):
        histograms, images = drawn["write_histograms", step], drawn["write_images", step]
        assert {name: array.shape for name, array in histograms.items()} == {
            "logits/pairs": (16,),
            "logits/others": (16 * 15,),
        }
        assert images["masks"].shape == (8, 32, 32, 3) and images["masks"].dtype == np.uint8
    start, *logged, last = wandb.calls
    assert last == "finish" and start["mode"] == "offline" and start["project"] == "project"
    assert start["config"]["model.image.width"] == 32 and start["dir"] == str(tmp_path / "seen")
    assert [(step, values) for step, values in logged if "samples_seen" in values] == scalars
    assert (4, {"logits/pairs": ("histogram", 16), "logits/others": ("histogram", 240)}) in logged
    assert (4, {"masks": [("image", (32, 32, 3))] * 8}) in logged


@pytest.mark.slow
def test_a_run_that_is_looked_at_learns_the_same(shards, tmp_path, tensorboard, monkeypatch):
    train.train(settings(shards), tmp_path / "seen")
    monkeypatch.setitem(sys.modules, "clu", None)  # as if it were not installed
    train.train(settings(shards), tmp_path / "unseen")
    (board,) = tensorboard
    assert any(name == "write_images" for name, *_ in board.calls)
    for one, other in zip(*(leaves(final_params(tmp_path / name, 4)) for name in ("seen", "unseen")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_of_weights_and_biases_goes_on_under_its_name(tmp_path, wandb, monkeypatch):
    config = dataclasses.replace(helpers.CONFIG, log=LogConfig(wandb="project"))
    for mode in ("offline", "online"):
        writers.WeightsAndBiases(epath.Path(tmp_path), config).close()
        monkeypatch.setenv("WANDB_MODE", "online")
        assert wandb.calls[-2]["mode"] == mode
    first, second = (call for call in wandb.calls if call != "finish")
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_weights_and_biases_that_is_not_installed_is_refused_before_the_run(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="config.log.wandb 'p' needs .* not installed: pip install wandb"):
        train.train(settings(shards, log=LogConfig(wandb="p")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"image_mask_ratio": 0.75}, 4), ({"image_mask_ratio": 0.0}, 16)],
)
def test_the_pictures_show_what_the_mask_leaves(changes, kept):
    image, text = helpers.batch()
    image = np.minimum(image, 200)  # no patch looks like a removed one
    _, images = taken(shallow(**changes), image, text, 1)
    assert images["masks"].shape == (8, 32, 32, 3)
    for shown, whole in zip(images["masks"], image, strict=False):
        patches = [x.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1) for x in (shown, whole)]
        same = np.all(patches[0] == patches[1], axis=1)
        assert same.sum() == kept and np.all(patches[0][~same] == snapshot.GREY)


def test_a_resized_picture_is_shown_at_its_size():
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
import numpy as np
from etils import epath
from flip_jax import config, metrics
workdir = epath.Path(sys.argv[1])
writer = metrics.Writer(workdir, 0, config.Config(log=config.Log(wandb=sys.argv[2])))
writer.write(7, {"loss": 1.5})
writer.draw(7, {"logits": np.arange(100.0)}, {"masks": np.arange(384).astype(np.uint8).reshape(2, 8, 8, 3)})
writer.close()
"""


def write_for_real(workdir, project=""):
    command = [sys.executable, "-c", REAL, str(workdir), project]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def test_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorflow")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    write_for_real(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    (loss,), (logits,), (masks,) = (events.Tensors(name) for name in ("loss", "logits", "masks"))
    assert loss.step == 7 and make_ndarray(loss.tensor_proto) == 1.5
    left, right, count = make_ndarray(logits.tensor_proto).T
    assert count.sum() == 100 and left[0] == 0 and right[-1] == 99
    width, height, *pictures = make_ndarray(masks.tensor_proto)
    assert (width, height, len(pictures)) == (b"8", b"8", 2)


def test_weights_and_biases_writes_offline(tmp_path):
    pytest.importorskip("wandb")
    write_for_real(tmp_path, "project")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert len(list(folder.glob("files/media/images/masks_*.png"))) == 2
