"""LAMB and Muon against plain NumPy in f64, clipping, rates by tower and layer, and the same training on any layout."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import CONFIG, assert_same_training, batch, run_steps

from flip_jax import config_check, optim, optimizers, saved_config, sharding, train_step
from flip_jax.config import MeshConfig, OptimConfig
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError

RNG = np.random.default_rng(0)
SHAPES = {
    "image": {"transformer": {"blocks": {"mlp1": {"kernel": (3, 4, 8), "bias": (3, 8)}}}, "cls": (1, 1, 4)},
    "image_projection": {"kernel": (8, 5)},
    "logit_scale": (1,),
}
STACKED = ("image", "transformer", "blocks")
DECAY, B1, B2 = 0.2, 0.9, 0.95


def random_tree():
    return jax.tree.map(lambda x: RNG.normal(size=x).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple)


def second_update(rate, **settings):
    """What the optimizer adds to the weights at its second step, and what it was given."""
    config = dataclasses.replace(CONFIG, optim=OptimConfig(learning_rate=rate, **settings), warmup_samples=0)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule="constant"))
    params, *grads = (random_tree() for _ in range(3))
    optimizer = optim.make_optimizer(config)
    _, state = optimizer.update(grads[0], optimizer.init(params), params)
    return optimizer.update(grads[1], state, params)[0], params, grads


def by_name(*trees):
    """Yields each leaf's path, and its values in f64."""
    for path, *leaves in (
        (path, leaf, *(jax.tree_util.tree_leaves(tree)[i] for tree in trees[1:]))
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(trees[0]))
    ):
        yield tuple(key.key for key in path), *(np.asarray(leaf, np.float64) for leaf in leaves)


def adam(first, second):
    """The second direction of Adam, with its bias corrections."""
    m = (B1 * (1 - B1) * first + (1 - B1) * second) / (1 - B1**2)
    v = (B2 * (1 - B2) * first**2 + (1 - B2) * second**2) / (1 - B2**2)
    return m / (np.sqrt(v) + 1e-8)


def test_lamb_is_that_of_numpy_layer_by_layer():
    updates, params, grads = second_update(1.0, name="lamb")
    for path, update, weight, first, second in by_name(updates, params, *grads):
        expected = adam(first, second)
        if path[-1] != "bias":  # neither decays nor is scaled
            expected += DECAY * weight
            layers = zip(expected, weight, strict=True) if path[:3] == STACKED else [(expected, weight)]
            expected = np.stack([d * np.linalg.norm(w) / np.linalg.norm(d) for d, w in layers]).reshape(weight.shape)
        # At a rate of 1 the updates are about 1: ten roundings of 6e-8 each.
        np.testing.assert_allclose(update, -expected, rtol=0, atol=1e-6, err_msg=str(path))


def orthogonal(x):
    """Muon's five Newton-Schulz steps."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_is_that_of_numpy_layer_by_layer():
    rate, beta = 0.01, 0.95
    updates, params, grads = second_update(rate, name="muon")
    for path, update, weight, first, second in by_name(updates, params, *grads):
        expected = adam(first, second)
        if path[-1] == "kernel":
            momentum = beta * (1 - beta) * first + (1 - beta) * second
            # Nesterov's, with a bias correction one step ahead.
            momentum = beta * momentum / (1 - beta**3) + (1 - beta) * second / (1 - beta**2)
            matrices = momentum.reshape(-1, *weight.shape[-2:])
            rows, columns = weight.shape[-2:]
            wide = [orthogonal(m) if rows <= columns else orthogonal(m.T).T for m in matrices]
            expected = np.stack(wide).reshape(weight.shape) * max(rows, columns) ** 0.5
        if path[-1] != "bias":
            expected = expected + DECAY * weight
        # Five steps multiply a rounding of 6e-8 by up to 3.4445**5 = 485, which makes 3e-5, and the rate 3e-7.
        np.testing.assert_allclose(update, -rate * expected, rtol=0, atol=1e-6, err_msg=str(path))


def test_a_weight_or_an_update_of_zero_is_not_scaled():
    params = {"zero": np.zeros(4, np.float32), "still": np.ones(4, np.float32)}
    config = dataclasses.replace(CONFIG, optim=OptimConfig("lamb", learning_rate=0.1, weight_decay=0), warmup_samples=0)
    optimizer = optim.make_optimizer(config)
    grads = {"zero": np.full(4, 3, np.float32), "still": np.zeros(4, np.float32)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["zero"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["still"], 0)


@pytest.mark.parametrize("most, factor", [(0.5, 0.1), (5.0, 1.0), (50.0, 1.0)])
def test_gradients_are_clipped_by_their_norm_all_together(most, factor):
    """3 and 4 make 5. Adam's second moment shows the square of the factor, which its update does not."""
    settings = dataclasses.replace(CONFIG, optim=OptimConfig(clip_norm=most))
    optimizer = optim.make_optimizer(settings)
    grads = {"a": np.float32([3, 0]), "b": np.float32([4])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    moments = {name: factor**2 * 0.05 * grads[name] ** 2 for name in grads}
    jax.tree.map(lambda nu, expected: np.testing.assert_allclose(nu, expected, rtol=1e-5), state[1].nu, moments)


@pytest.mark.parametrize(
    "optim_config",
    [OptimConfig("lamb", 2e-4 * 16, clip_norm=1.0, ema=0.5), OptimConfig("muon", 2e-4 * 16)],
    ids=lambda config: config.name,
)
@pytest.mark.slow
def test_eight_devices_train_as_one_does(optim_config):
    config = dataclasses.replace(CONFIG, optim=optim_config)
    one, eight = run_steps(1, MeshConfig(), config=config), run_steps(8, MeshConfig(fsdp=2), config=config)
    assert_same_training(eight, one)
    if optim_config.ema:
        assert_same_training(*((losses, state._replace(params=state.ema)) for losses, state in (eight, one)))
    leaves = jax.tree_util.tree_leaves_with_path(eight[1].opt_state)
    moments = [x for path, x in leaves if jax.tree_util.keystr(path).endswith("['image_projection']['kernel']")]
    assert [x.addressable_shards[0].data.shape for x in moments] == [(32 // 2, 16)] * {"lamb": 2, "muon": 1}[
        config.optim.name
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "adam"}, "config.optim.name must be one of adamw, lamb, muon; got 'adam'"),
        ({"clip_norm": -1.0}, "config.optim.clip_norm must be at least 0, got -1.0"),
        ({"ema": 1.0}, r"config.optim.ema must be in \[0, 1\).*, got 1.0"),
        ({"image_rate": -1.0}, "config.optim.image_rate must be at least 0, got -1.0"),
        ({"image_rate": 0.0, "text_rate": 0.0}, "config.optim.image_rate and text_rate are both 0"),
        ({"layer_decay": 0.0}, r"config.optim.layer_decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    config = dataclasses.replace(CONFIG, optim=OptimConfig(**change))
    with pytest.raises(UserError, match=message):
        saved_config.from_flat(config_check.flatten(config))


def test_an_older_checkpoints_layer_decay_counts_for_classifiers_alone():
    flat = config_check.flatten(CONFIG)
    del flat["optim.layer_decay"]
    old = flat | {"finetune.layer_decay": 0.75}
    assert saved_config.from_flat(old).optim.layer_decay == 1.0
    classifier = old | {"finetune.classes": 5, "model.image.mask_ratio": 0.0}
    assert saved_config.from_flat(classifier).optim.layer_decay == 0.75


def test_a_towers_rate_and_the_decay_of_its_layers_multiply():
    """Depth 2, by hand: image embedding 3 x 1/8, its blocks 3/4 and 3/2, its last norm 3; text likewise with 1/2."""
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: FLIP(CONFIG.model, nnx.Rngs(0))))[1])
    shares = optimizers.shares(params, OptimConfig(image_rate=3.0, text_rate=0.5, layer_decay=0.5))
    for tower, rate, embedding in (("image", 3.0, ("patch_kernel", "cls")), ("text", 0.5, ("token_embed",))):
        part = shares[tower]
        assert [part[name] for name in (*embedding, "pos_embed")] == [rate / 8] * (len(embedding) + 1)
        for share in jax.tree.leaves(part["transformer"]["blocks"]):
            assert share.ravel().tolist() == [rate / 4, rate / 2]
        assert set(jax.tree.leaves(part["transformer"]["norm"])) == {rate}
    others = [shares[name] for name in shares if name not in ("image", "text")]
    assert len(others) == 3 and set(jax.tree.leaves(others)) == {1.0}


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("tower, parts", [("image", 2), ("text", 1)])
def test_a_frozen_tower_keeps_its_bits_and_has_no_optimizer_state(tower, parts):
    config = dataclasses.replace(CONFIG.optim, **{f"{tower}_rate": 0.0}, weight_decay=0.5)
    config = dataclasses.replace(CONFIG, optim=config, warmup_samples=0, microbatches=parts)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        program = train_step.make_program(config, mesh)
        state = program.init()
        first = jax.device_get(state.params)
        for step in range(3):
            state, _ = program.step(state, *sharding.to_devices(mesh, *batch(seed=step)))
    for name in first:
        assert (bits(state.params[name]) == bits(first[name])) == (name == tower), name
    moments = optax.tree.get(state.opt_state, "mu")
    assert moments.keys() == first.keys() - {tower}


def test_the_other_parameters_get_the_gradient_that_they_have_without_freezing():
    graphdef, params = nnx.split(FLIP(CONFIG.model, nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    loss_and_grads = jax.jit(train_step.make_loss_and_grads(graphdef, 2))
    trained, frozen = optim.split(params, dataclasses.replace(CONFIG, optim=OptimConfig(image_rate=0.0)))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        value, grads = loss_and_grads(params, *batch(), jax.random.key(0))
        frozen_value, frozen_grads = loss_and_grads(trained, *batch(), jax.random.key(0), frozen)
    assert frozen.keys() == {"image"} and float(frozen_value) == pytest.approx(float(value), rel=1e-6)
    for name, part in frozen_grads.items():
        # Sums over 16 rows of numbers below 1 in f32.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), part, grads[name])
