"""timm's ViTs as the start of an image tower: what it encodes, what is listed, what is refused."""

import dataclasses
import logging

import helpers
import jax
import numpy as np
import numpy_towers
import pytest
from flax import nnx
from safetensors.numpy import save_file

import flip_jax
from flip_jax import masking, saved_step, sharding, weights
from flip_jax.config import Config, FinetuneConfig, MeshConfig
from flip_jax.models.classifier import Classifier
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip

WIDTH, DEPTH, HEADS, SIZE, HIDDEN = 64, 2, 1, 8, 96
MODEL = helpers.model_with(
    image_width=WIDTH,
    image_heads=HEADS,
    image_positions="learned",
    image_pool="cls",
    image_mlp_width=HIDDEN,
    activation="gelu",
)


def vit(scaled=False):
    """Random weights by timm's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 17, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, SIZE, SIZE),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (10, WIDTH),
    }
    for i in range(DEPTH):
        for name, rows, columns in (("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH)):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name, rows, columns in (("mlp.fc1", HIDDEN, WIDTH), ("mlp.fc2", WIDTH, HIDDEN)):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (WIDTH,), f"blocks.{i}.{name}.bias": (WIDTH,)}
        if scaled:
            shapes |= {f"blocks.{i}.ls{n}.gamma": (WIDTH,) for n in (1, 2)}
    return {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def encode(arrays, image):
    """The class token after the last norm, in NumPy, f64."""
    w = {name: value.astype(np.float64) for name, value in arrays.items()}
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    x = ((image / 255 - mean) / std).reshape(len(image), 4, SIZE, 4, SIZE, 3).transpose(0, 1, 3, 5, 2, 4)
    x = x.reshape(len(image), 16, -1) @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, WIDTH)), x], axis=1) + w["pos_embed"]
    gelu, one = numpy_towers.gelu({"cfg": {}}, "cfg"), np.ones(WIDTH)
    for i in range(DEPTH):
        name = f"blocks.{i}"
        y = numpy_towers.layer_norm(x, w, f"{name}.norm1", 1e-6)
        q, k, v = np.split(y @ w[f"{name}.attn.qkv.weight"].T + w[f"{name}.attn.qkv.bias"], 3, axis=-1)
        y = numpy_towers.softmax(q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH)) @ v
        y = y @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
        x = x + w.get(f"{name}.ls1.gamma", one) * y
        y = numpy_towers.layer_norm(x, w, f"{name}.norm2", 1e-6)
        y = gelu(y @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
        x = x + w.get(f"{name}.ls2.gamma", one) * (y @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"])
    return numpy_towers.layer_norm(x, w, "norm", 1e-6)[:, 0]


def abstract(build):
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, sharding.place(state, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("scaled, prefix", [(False, ""), (True, "module.")])
def test_the_image_tower_starts_as_timms(scaled, prefix, tmp_path, caplog):
    arrays = vit(scaled)
    file = tmp_path / "vit.safetensors"
    save_file({prefix + name: value for name, value in arrays.items()}, file)
    step = saved_step.newest(str(file))
    config = dataclasses.replace(helpers.CONFIG, model=MODEL)
    assert saved_step.tokenizer(step) is None
    caplog.set_level(logging.INFO)
    weights.check_start(config, step)
    _, wanted = abstract(lambda: FLIP(MODEL, nnx.Rngs(0)))
    started = weights.read_params(step, wanted, MODEL)
    assert "no place for: head.weight" in caplog.text and "text_projection, trained from scratch" in caplog.text
    assert started.keys() == {"image"}
    tower = FLIP(MODEL, nnx.Rngs(0)).image
    nnx.update(tower, jax.tree.map(lambda x: x, started["image"]))
    image, _ = helpers.batch(3)
    np.testing.assert_allclose(tower(masking.patchify(image, SIZE)), encode(arrays, image), rtol=1e-4, atol=1e-4)


def test_a_classifier_takes_its_architecture(tmp_path):
    file = tmp_path / "vit.safetensors"
    save_file(vit(), file)
    config = Config(finetune=FinetuneConfig(classes=3), model=helpers.model_with(image_mask_ratio=0.0))
    config = weights.with_model_of(config, saved_step.newest(str(file)))
    image = config.model.image
    assert (image.width, image.depth, image.heads, image.mlp_width) == (WIDTH, DEPTH, 1, HIDDEN)
    assert (image.positions, config.model.activation, config.finetune.classes) == ("learned", "gelu", 3)
    assert config.model.text == helpers.MODEL.text
    weights.check_start(config, saved_step.newest(str(file)))
    _, wanted = abstract(lambda: Classifier(config, nnx.Rngs(0)))
    assert weights.read_params(saved_step.newest(str(file)), wanted, config.model).keys() == {"image"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("pos_embed"), "has no pos_embed: it must be a ViT of timm's"),
        (lambda a: a.pop("blocks.1.attn.proj.bias"), "has no blocks.1.attn.proj.bias"),
        (
            lambda a: a.update({"patch_embed.proj.weight": np.zeros((4, 1, 8, 8), np.float32)}),
            "must be .width, 3, size",
        ),
        (lambda a: [a.pop(name) for name in list(a) if name.startswith("blocks")], "has no blocks.0"),
    ],
)
def test_files_that_are_no_vit_are_refused(change, message, tmp_path):
    arrays = vit()
    change(arrays)
    save_file(arrays, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=message):
        saved_step.newest(str(tmp_path / "vit.safetensors"))


def test_a_tower_alone_only_starts_runs(tmp_path, capsys):
    file = tmp_path / "vit.safetensors"
    save_file(vit(), file)
    with pytest.raises(UserError, match=r"vit.safetensors is an image tower alone: start a run with it, --config.init"):
        flip_jax.load(file)
    assert flip.main(["convert", "export", str(file), str(tmp_path / "out")]) == 1
    assert "is an image tower alone" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_architecture_is_refused_with_both_sides(tmp_path):
    save_file(vit(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"image.cls: checkpoint \(1, 1, 64\), model \(1, 1, 32\)"):
        weights.check_start(helpers.CONFIG, saved_step.newest(str(tmp_path / "vit.safetensors")))
