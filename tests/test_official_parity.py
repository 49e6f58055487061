"""The model, loss, optimiser and schedule against values recorded from the official code (f32, CPU)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import recorded_parameters

from flip_jax import losses, masking, optim, sharding, train_step
from flip_jax.config import Config, ImageConfig, MeshConfig, ModelConfig, OptimConfig, TextConfig
from flip_jax.models.flip import FLIP
from flip_jax.tools.compat.official import to_ours

SETTINGS = ModelConfig(
    image=ImageConfig(image_size=64, patch_size=16, width=64, depth=3, heads=4, mask_ratio=0.5),
    text=TextConfig(vocab_size=1001, width=48, depth=2, heads=4),
    embed_dim=32,
    dtype="float32",
)
CONFIG = Config(
    global_batch_size=8,
    total_samples=240,
    warmup_samples=16,
    model=SETTINGS,
    optim=OptimConfig(base_learning_rate=0.032),
)


# Both sides are f32, which rounds to 6e-8, and sum in another order. The longest sums have 768 terms (a patch):
# sqrt(768) x 6e-8 = 1.7e-6 of an embedding, and a few such follow each other.
EMBEDDING = 1e-5  # of the largest entry
LOSS = 5e-5  # absolute: a logit is 1 / 0.07 times a cosine of two embeddings, within 3e-6
GRADIENT = 2e-5  # of the largest entry; the official code differs from itself, compiled and not, by 1.4e-6


@pytest.fixture
def program():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield train_step.make_program(CONFIG, mesh)


def arrays(path):
    with np.load(path) as data:
        return dict(data)


def close(ours, theirs, relative, name):
    """Largest difference within `relative` of the recorded array's largest entry."""
    bound = relative * max(np.abs(theirs).max(), 1e-12)
    assert np.abs(np.asarray(ours) - theirs).max() <= bound, name


@pytest.mark.parametrize("recipe, name", [("b16", "base"), ("l16", "large"), ("h14", "huge14")])
def test_parameters_have_the_official_names_and_shapes(recorded, load_recipe, recipe, name):
    official = json.loads((recorded / "param_shapes_full_configs.json").read_text())[f"cfg_flip_{name}"]
    model = nnx.eval_shape(lambda: FLIP(load_recipe(f"flip_{recipe}").model, nnx.Rngs(0)))
    ours = flatten_dict(nnx.to_pure_dict(nnx.split(model)[1]), sep="/")
    theirs = to_ours({key: np.broadcast_to(np.int8(0), shape) for key, shape in official["params"].items()})
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert sum(value.size for value in ours.values()) == official["n_params"]


def test_embeddings_and_loss_of_intact_pictures(recorded, program):
    inputs, outputs = arrays(recorded / "inputs.npz"), arrays(recorded / "eval_outputs.npz")
    model = nnx.merge(program.graphdef, unflatten_dict(to_ours(recorded_parameters("params")), sep="/"))
    image, text = model.encode_image(inputs["image"]), model.encode_text(inputs["txt"])
    close(image, outputs["z_img"], EMBEDDING, "image")
    close(text, outputs["z_txt"], EMBEDDING, "text")
    np.testing.assert_allclose(losses.info_nce(image, text, model.scale()), outputs["loss"], atol=LOSS)


def test_three_optimiser_steps(recorded, program, monkeypatch):
    inputs, steps = arrays(recorded / "inputs.npz"), arrays(recorded / "train_steps.npz")
    params = jax.tree.map(jnp.asarray, unflatten_dict(to_ours(recorded_parameters("params")), sep="/"))
    state = train_step.TrainState(jnp.int32(0), params, optim.make_optimizer(CONFIG).init(params))
    recorded_mask = jax.ShapeDtypeStruct((8, 8), np.int32)
    monkeypatch.setitem(masking.STRATEGIES, "random", lambda *_: jax.pure_callback(lambda: keep, recorded_mask))
    for step in range(3):
        keep = steps[f"ids_keep_step{step}"]  # which the compiled step asks for while it runs
        np.testing.assert_array_equal(masking.smallest(jnp.asarray(steps[f"noise_step{step}"]), 8), keep)
        if step == 0:
            loss_and_grads = jax.jit(train_step.make_loss_and_grads(program.graphdef, 1))
            _, grads = loss_and_grads(state.params, inputs["image"], inputs["txt"], jax.random.key(0))
            theirs = to_ours(recorded_parameters("grads_step0"))
            for name, grad in flatten_dict(grads, sep="/").items():
                if "key/bias" not in name:  # mathematically 0: rounding noise only
                    close(grad, theirs[name], GRADIENT, name)
        state, metrics = program.step(state, inputs["image"], inputs["txt"])
        np.testing.assert_allclose(metrics["loss"], steps["loss"][step], atol=LOSS)
        np.testing.assert_allclose(metrics["learning_rate"], steps["learning_rate"][step], rtol=1e-6)
    theirs = to_ours(recorded_parameters("params_after_step2"))
    for name, value in flatten_dict(state.params, sep="/").items():
        if "key/bias" not in name:
            # By the norm: Adam turns the rounding noise of single gradients near 0 into steps of full size.
            difference = np.linalg.norm(value - theirs[name])
            assert difference <= 1e-5 * np.linalg.norm(theirs[name]), name


def test_logit_scale_is_clipped_and_its_gradient_halved_at_a_bound(recorded, program):
    inputs = arrays(recorded / "inputs.npz")
    params = unflatten_dict(to_ours(recorded_parameters("params")), sep="/")

    image, text = jax.jit(lambda model: (model.encode_image(inputs["image"]), model.encode_text(inputs["txt"])))(
        nnx.merge(program.graphdef, params)
    )

    @jax.jit
    def loss(logit_scale):
        model = nnx.merge(program.graphdef, params | {"logit_scale": logit_scale})
        return losses.info_nce(image, text, model.scale())

    for stored, official in json.loads((recorded / "logit_scale_clip.json").read_text()).items():
        value, grad = jax.value_and_grad(loss)(jnp.full((1,), float(stored)))
        # Both are sums of logits, which reach `scale` times cosines within 3e-6.
        scale = np.exp(np.clip(float(stored), 0, np.log(100)))
        np.testing.assert_allclose(value, official["loss"], rtol=0, atol=3e-6 * scale)
        np.testing.assert_allclose(grad[0], official["grad_logit_scale"], rtol=0, atol=3e-6 * scale)


def test_weight_decay_applies_to_the_official_names(recorded, program):
    official = json.loads((recorded / "weight_decay.json").read_text())
    ours = flatten_dict(optim.decay_mask(program.state.params), sep="/")
    for decayed, names in ((True, official["decayed"]), (False, official["not_decayed"])):
        for name in to_ours(dict.fromkeys(names, 0)):
            assert ours.pop(name) == decayed, name
    assert not ours


def test_schedules(recorded):
    for name, official in json.loads((recorded / "lr_schedules.json").read_text()).items():
        if name == "small":
            peak, warmup, total = 0.001, 2, 30
        else:
            peak, warmup, total = (official[key] for key in ("abs_lr", "warmup_steps", "total_steps"))
        ours = optim.warmup_cosine(peak, warmup, total)(np.array(official["steps"]))
        np.testing.assert_allclose(ours, official["lr"], rtol=2e-7, atol=peak * 1e-7, err_msg=name)


def test_adamw_is_the_one_of_the_paper():
    """One update by hand: m / (sqrt(v) + eps) + decay * w, times the learning rate."""
    optimizer = optim.make_optimizer(CONFIG)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([3.0])}
    state = optimizer.init(params)
    grads = {"kernel": jnp.array([0.5]), "bias": jnp.array([0.25])}
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    rate = 0.0005  # of the second step; the first one's is 0
    direction = 1.0  # constant gradients: bias-corrected m / sqrt(v) is their sign
    np.testing.assert_allclose(params["kernel"], 2 - rate * (direction + 0.2 * 2), rtol=1e-6)
    np.testing.assert_allclose(params["bias"], 3 - rate * direction, rtol=1e-6)
