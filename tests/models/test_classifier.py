"""Fine-tuning: rates by layer, mixing, the head's gradient, any layout of devices, and whole runs of main.py."""

import dataclasses
import itertools
import re
import signal
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from helpers import REPO, arguments, environment, final_params, leaves, metrics, run_command

from flip_jax import config_check, evaluators, inference, models, optim, optimizers, saved_config, sharding, train_step
from flip_jax.config import Config, DataConfig, FinetuneConfig, ImageConfig, MeshConfig, ModelConfig, OptimConfig
from flip_jax.data import pipeline
from flip_jax.models import classifier

PLAIN = FinetuneConfig(classes=5, label_smoothing=0.0, mixup=0.0, cutmix=0.0)
CONFIG = dataclasses.replace(helpers.CONFIG, model=helpers.model_with(image_mask_ratio=0.0), finetune=PLAIN)
LABEL = (np.arange(16) % 5).astype(np.int32)


def test_rates_fall_from_the_head_to_the_patches():
    """Depth 2 and a factor of 0.5, by hand: head 1, blocks 1/2 and 1/4, embedding 1/8."""
    model = models.build(CONFIG, nnx.Rngs(0))
    shares = optimizers.shares(nnx.to_pure_dict(nnx.split(model)[1]), OptimConfig(layer_decay=0.5))
    assert shares["head"] == {"kernel": 1.0, "bias": 1.0}
    assert shares["image"]["patch_kernel"] == shares["image"]["cls"] == shares["image"]["patch_bias"] == 0.125
    assert set(jax.tree.leaves(shares["image"]["transformer"]["norm"])) == {1.0}
    blocks = shares["image"]["transformer"]["blocks"]
    assert all(share.ravel().tolist() == [0.25, 0.5] for share in jax.tree.leaves(blocks))
    assert blocks["query"]["kernel"].shape == (2, 1, 1)


def test_updates_are_adamws_times_the_shares():
    params = nnx.to_pure_dict(nnx.split(models.build(CONFIG, nnx.Rngs(0)))[1])
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)

    def updates(layer_decay):
        settings = dataclasses.replace(CONFIG.optim, layer_decay=layer_decay)
        settings = dataclasses.replace(CONFIG, optim=settings, warmup_samples=0)
        optimizer = optim.make_optimizer(settings)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    whole, halved, shares = updates(1.0), updates(0.5), optimizers.shares(params, OptimConfig(layer_decay=0.5))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole)) > 1e-4
    # Shares are powers of two, which change no rounding but that of the sum with the decay.
    jax.tree.map(lambda a, b, share: np.testing.assert_allclose(b, a * share, rtol=1e-6), whole, halved, shares)


def test_the_loss_and_the_heads_gradient_are_those_of_numpy():
    """Smoothed labels; the head is not 0."""
    graphdef, params = nnx.split(models.build(CONFIG, nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    settings = dataclasses.replace(PLAIN, label_smoothing=0.1)
    image, _ = helpers.batch()
    value, grads = classifier.make_loss_and_grads(graphdef, settings)(params, image, LABEL, jax.random.key(0))
    x_BxD = np.asarray(nnx.merge(graphdef, params).features(image), np.float64)
    logits = x_BxD @ np.asarray(params["head"]["kernel"], np.float64)
    target = 0.9 * np.eye(5)[LABEL] + 0.1 / 5
    error = scipy.special.softmax(logits, axis=1) - target
    expected = -np.mean(np.sum(target * scipy.special.log_softmax(logits, axis=1), axis=1))
    # Logits near 10 are sums of 32 products: 10 x 32 x 6e-8 = 2e-5. A probability moves by a quarter of that.
    assert float(value) == pytest.approx(expected, rel=0, abs=2e-5)
    np.testing.assert_allclose(grads["head"]["kernel"], x_BxD.T @ error / 16, atol=2e-5)
    np.testing.assert_allclose(grads["head"]["bias"], error.mean(axis=0), atol=5e-6)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_pictures_and_targets_are_mixed_alike(mixup, cutmix):
    """Of black and white pictures the mean brightness is the share that the target says."""
    image = np.zeros((8, 32, 32, 3), np.uint8)
    image[:4] = 255
    target = np.eye(2, dtype=np.float32)[np.repeat([1, 0], 4)]
    mixed = jax.jit(lambda key: classifier.mix(key, image, target, mixup, cutmix))
    kinds, shares = set(), []
    for seed in range(40):
        pixels, targets = map(np.asarray, mixed(jax.random.key(seed)))
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)) / 255, targets[:, 1], atol=0.003)  # half a grey level
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        kinds.add(len(np.unique(pixels[0])) if 0.01 < targets[0, 1] < 0.99 and abs(targets[0, 1] - 0.5) > 0.01 else 0)
        shares.append(targets[0, 1])
    cut = {2} if cutmix else set()
    assert kinds - {0} == cut | ({1} if mixup else set())
    assert 0.3 < np.mean(shares) < 0.75 and np.std(shares) > 0.15


def test_nothing_is_mixed_without_being_asked_for():
    image, target = helpers.batch()[0], np.eye(5)[LABEL]
    assert classifier.mix(jax.random.key(0), image, target, 0.0, 0.0) == (image, target)


def steps(devices, mesh_settings):
    settings = dataclasses.replace(CONFIG, finetune=FinetuneConfig(classes=5), mesh=mesh_settings)
    mesh = sharding.make_mesh(mesh_settings, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = train_step.make_program(settings, mesh)
        state, losses = program.init(), []
        for step in range(3):
            image, _ = helpers.batch(seed=step)
            state, report = program.step(state, *sharding.to_devices(mesh, image, LABEL))
            losses.append(float(report["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.slow
def test_steps_are_the_same_on_any_layout():
    losses, params = steps(1, MeshConfig())
    # The head starts at 0, and the first rate is 0. A mean of 16 losses: 16 x 6e-8.
    np.testing.assert_allclose(losses[:2], np.log(5), rtol=2e-6)
    for layout in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        other_losses, other_params = steps(8, layout)
        np.testing.assert_allclose(other_losses, losses, rtol=helpers.LOSS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, other_params)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model": ModelConfig(image=ImageConfig(mask_ratio=0.5))},
            "model.image.mask_ratio 0 and microbatches 1, got 0.5",
        ),
        ({"microbatches": 2}, "set model.image.mask_ratio 0 and microbatches 1, got 0.0 and 2"),
        (
            {"optim": OptimConfig(layer_decay=1.5)},
            r"optim.layer_decay must be in \(0, 1\], got 1.5",
        ),
        ({"finetune": FinetuneConfig(classes=5, label_smoothing=1.0)}, "finetune.label_smoothing must be in"),
        ({"finetune": FinetuneConfig(classes=5, mixup=-1.0)}, "finetune.mixup must be at least 0, got -1.0"),
        ({"finetune": FinetuneConfig(classes=-1)}, "finetune.classes must be at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    settings = Config(model=ModelConfig(image=ImageConfig(mask_ratio=0.0)), finetune=FinetuneConfig(classes=5))
    saved_config.from_flat(config_check.flatten(settings))
    with pytest.raises(ValueError, match=message):
        saved_config.from_flat(config_check.flatten(dataclasses.replace(settings, **change)))


def test_the_recipe_is_mae_s(load_recipe):
    settings = load_recipe("finetune_l16")
    assert settings.model.image.width == 1024 and settings.model.image.mask_ratio == 0
    assert optim.peak_learning_rate(settings) == pytest.approx(4e-3)
    assert settings.finetune == FinetuneConfig(1000, 0.1, 0.8, 1.0) and settings.optim.layer_decay == 0.75


@pytest.fixture(scope="module")
def tuned(shards, tmp_path_factory):
    """A short contrastive run, and its tower fine-tuned on the classes of the same pictures."""
    pretrained, workdir = tmp_path_factory.mktemp("pretrained"), tmp_path_factory.mktemp("tuned")
    run_command(arguments(shards, pretrained, total_samples=64, warmup_samples=32))
    changes = {
        "model.image.mask_ratio": 0.0,
        "finetune.classes": 8,
        "init_from": pretrained,
        "eval.tasks": f"classify/webdataset:{shards}/*.tar",
        "eval.every_steps": 12,
        "eval.batch_size": 40,
    }
    return pretrained, workdir, run_command(arguments(shards, workdir, **changes))


@pytest.mark.slow
def test_a_run_learns_classes(tuned, shards):
    _, workdir, done = tuned
    assert "started from the weights in" in done.stderr and "step 24/24" in done.stdout
    top1 = [line["classify/mean"] for line in metrics(workdir) if "classify/mean" in line]
    assert len(top1) == 2 and top1[-1] > 3 * 100 / 8  # three times chance
    encoder = inference.load(workdir)
    assert encoder.encode_image(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 8)
    report = run_command([sys.executable, "-m", "flip_jax", "report", f"--model={workdir}"])
    assert re.search(r"^classify top-1 [\d.]+ % top-5 [\d.]+ %\n\Z", report.stdout, re.MULTILINE)
    assert {path.name for path in (workdir / "report").iterdir()} == {"loss.png", "classify.png"}


@pytest.mark.slow
def test_stopped_and_started_again_it_ends_with_the_same_bits(tuned, tmp_path):
    _, workdir, first = tuned
    command = [arg.replace(f"--workdir={workdir}", f"--workdir={tmp_path}") for arg in first.args]
    process = subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    assert "SIGTERM: saved step" in process.stdout.read() and process.wait(timeout=120) == 0
    assert "resumed at step" in run_command(command).stderr
    for one, other in zip(leaves(final_params(workdir)), leaves(final_params(tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_classifier_reads_no_text(tuned, shards):
    with pytest.raises(ValueError, match="a fine-tuned classifier reads no text; use classify"):
        evaluators.find(f"zeroshot/webdataset:{shards}/*.tar", CONFIG)
    with pytest.raises(ValueError, match="the model is not a classifier .config.finetune.classes is 0."):
        evaluators.find(f"classify/webdataset:{shards}/*.tar", helpers.CONFIG)
    encoder = inference.load(tuned[1])
    settings = dataclasses.replace(encoder.config, finetune=dataclasses.replace(PLAIN, classes=5))
    with pytest.raises(ValueError, match="has label [5-7], outside the 5 classes"):
        evaluators.evaluate(encoder, f"classify/webdataset:{shards}/*.tar", settings)


def test_batches_have_labels_and_what_is_above_the_classes_is_bad(shards):
    data = DataConfig(train=f"webdataset:{shards}/*.tar", shuffle_window=20, threads=2)
    settings = dataclasses.replace(CONFIG, data=data, global_batch_size=20)  # of 5 classes, and the pictures have 8
    batches = iter(pipeline.train_dataset(settings, None, process_index=0, process_count=1))
    for batch in itertools.islice(batches, 5):
        numbers = [int(key.rpartition("/")[2]) for key in batch["keys"]]
        assert batch["label"].tolist() == [(64 * (n // 1000) + n % 1000) % 8 for n in numbers]
        assert batch["label"].dtype == np.int32 and "text" not in batch
    assert batch["counts"]["used"] == 100 and batch["counts"]["bad"]["label above 4"] > 20
