"""Weights of one model as the start of another: other image and patch sizes, and what is refused."""

import dataclasses
import sys

import helpers
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from PIL import Image

import flip_jax
from flip_jax import manifest, saved_config, saved_step, sharding, weights
from flip_jax.config import DecoderConfig, FinetuneConfig, MeshConfig
from flip_jax.models.flip import FLIP
from flip_jax.models.vit import sincos_2d


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The weights of a model with a decoder, and the step's folder that holds them."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "5"
    model = FLIP(
        dataclasses.replace(helpers.MODEL, decoder=DecoderConfig(weight=1.0, width=16, depth=1, heads=2)), nnx.Rngs(1)
    )
    params = nnx.to_pure_dict(nnx.split(model)[1])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", {"params": params})
    manifest.write(epath.Path(folder))
    return params, folder


def start(folder, settings, fsdp=1):
    """What a run of a model with these settings starts from."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp))
    abstract = nnx.split(nnx.eval_shape(lambda: FLIP(settings, nnx.Rngs(0))))[1]
    return weights.read_params(saved_step.newest(folder), sharding.place(abstract, mesh), settings)


def test_the_decoder_is_left_out_and_all_else_kept(trained):
    params, folder = trained
    started = start(folder, helpers.MODEL)
    assert "decoder" not in started
    for ours, saved in zip(*map(jax.tree.leaves, (started, {k: params[k] for k in started})), strict=True):
        np.testing.assert_array_equal(ours, saved)


def test_another_image_size_gets_its_own_fixed_positions(trained):
    params, folder = trained
    started = start(folder, helpers.model_with(image_image_size=48), fsdp=2)
    np.testing.assert_array_equal(started["image"]["pos_embed"], sincos_2d(6, 32))
    np.testing.assert_array_equal(started["image"]["patch_kernel"], params["image"]["patch_kernel"])


def test_another_patch_size_gets_a_resized_kernel(trained):
    params, folder = trained
    started = start(folder, helpers.model_with(image_patch_size=16), fsdp=2)
    kernel = started["image"]["patch_kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 16, 3, 16)
    np.testing.assert_array_equal(started["image"]["pos_embed"], sincos_2d(2, 32))
    # A patch enlarged by another implementation gets the answers that the patch got.
    patch = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    large = [np.asarray(Image.fromarray(patch[..., c]).resize((16, 16), Image.BILINEAR)) for c in range(3)]
    # Sums of 768 products below 1: 768 x 6e-8 = 5e-5.
    answer = np.einsum("hwc,hwcd->d", patch, params["image"]["patch_kernel"])
    np.testing.assert_allclose(np.einsum("chw,hwcd->d", np.stack(large), kernel), answer, atol=1e-4)


def test_a_smaller_kernel_answers_to_smooth_patches_as_the_larger_did():
    kernel = np.random.default_rng(0).normal(size=(16, 16, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(
        weights.resize_patch_kernel(kernel, 14).sum((0, 1)), kernel.sum((0, 1)), rtol=0.05, atol=0.5
    )


def test_other_differences_are_refused_with_both_sides(trained):
    with pytest.raises(ValueError, match=r"image_projection.kernel: checkpoint \(32, 16\), model \(32, 8\)"):
        start(trained[1], helpers.model_with(embed_dim=8))
    settings = dataclasses.replace(helpers.MODEL, loss="sigmoid")
    with pytest.raises(ValueError, match=r"logit_bias: checkpoint None, model \(1,\)"):
        start(trained[1], settings)


def test_an_image_tower_alone_starts_the_image_tower(trained, tmp_path):
    """As LiT does (arXiv 2111.07991) with a classifier's."""
    folder = epath.Path(tmp_path) / "checkpoints" / "5"
    image = trained[0]["image"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", {"params": {"image": image, "head": {"bias": np.zeros(3)}}})
    manifest.write(folder)
    started = start(folder, helpers.MODEL)
    assert started.keys() == {"image"}
    jax.tree.map(np.testing.assert_array_equal, started["image"], image)
    weights.check_start(helpers.CONFIG, folder)
    wide = dataclasses.replace(helpers.CONFIG, model=helpers.model_with(image_width=64))
    with pytest.raises(ValueError, match=r"image.cls: checkpoint \(1, 1, 32\), model \(1, 1, 64\)"):
        weights.check_start(wide, folder)


@pytest.mark.parametrize("classes, both", [((0, 0), True), ((5, 0), False), ((0, 5), False)])
def test_the_architecture_is_taken_but_not_what_belongs_to_a_run(monkeypatch, classes, both):
    model = helpers.model_with(
        image_image_size=48,
        image_positions="learned",
        image_mask_ratio=0.25,
        text_width=64,
        text_mask_padding=True,
        activation="quick_gelu",
        embed_dim=8,
    )
    settings = dataclasses.replace(helpers.CONFIG, model=helpers.model_with(image_mask_ratio=0.0, dtype="bfloat16"))
    written, ours = (
        dataclasses.replace(config, finetune=FinetuneConfig(classes=count))
        for config, count in zip((dataclasses.replace(helpers.CONFIG, model=model), settings), classes, strict=True)
    )
    monkeypatch.setattr(saved_config, "read", lambda step: written)
    taken = weights.with_model_of(ours, "a step").model
    expected = helpers.model_with(
        image_positions="learned",
        image_mask_ratio=0.0,
        activation="quick_gelu",
        dtype="bfloat16",
        **({"text_width": 64, "text_mask_padding": True, "embed_dim": 8} if both else {}),
    )
    assert taken == expected


@pytest.mark.slow
def test_tuning_takes_the_model_and_the_tokenizer_that_it_starts_from(shards, tmp_path):
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    helpers.run_command(helpers.arguments(shards, first, total_samples=64, warmup_samples=32))
    pairs = [{"png": helpers.png(i), "txt": b"number %d" % i} for i in range(64)]
    helpers.write_samples(tmp_path / "own.tar", pairs)
    settings = {"data.train": f"webdataset:{tmp_path}/own.tar", "data.workers": 0}
    settings |= {"data.shuffle_window": 50, "model.image.image_size": 32, "global_batch_size": 32}
    settings |= {"total_samples": 96, "warmup_samples": 32, "optim.image_rate": 0.0}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "main.py", "--config=configs/tune.py", f"--workdir={tuned}", *flags]
    alone = helpers.run_command(command, check=False)
    assert alone.returncode == 1 and "config.init_model takes the architecture of config.init_from" in alone.stderr
    done = helpers.run_command([*command, f"--config.init_from={first}"])
    assert "started from the weights in" in done.stderr and "step 3/3" in done.stdout
    before, after = (flip_jax.load(folder) for folder in (first, tuned))
    assert after.config.model.text == before.config.model.text and after.config.model.embed_dim == 16
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    jax.tree.map(np.testing.assert_array_equal, after.params["image"], before.params["image"])
    assert not np.array_equal(after.params["text"]["token_embed"], before.params["text"]["token_embed"])
