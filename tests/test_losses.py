"""The sharded, sliced loss against a dense reference in f64 with gradients written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flip_jax import losses, sharding
from flip_jax.config import MeshConfig
from flip_jax.tools import hlo

EPS = 2.0**-24  # the rounding of an f32 number near 1


def dense(image, text, scale):
    """Loss and its gradients by all three arguments: the mean of both cross-entropies of the whole matrix, in f64."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    rows, cosine = len(image), image @ text.T
    total, grad_cosine = 0.0, np.zeros_like(cosine)
    for axis in (0, 1):
        relative = scale * (cosine - np.expand_dims(np.diag(cosine), axis))
        largest = relative.max(axis=axis, keepdims=True)
        log_sum = largest + np.log(np.sum(np.exp(relative - largest), axis=axis, keepdims=True))
        softmax = np.exp(relative - log_sum)
        total += np.mean(log_sum) / 2
        grad_cosine += (softmax - np.eye(rows)) / rows / 2
    return total, (scale * grad_cosine @ text, scale * grad_cosine.T @ image, np.sum(grad_cosine * cosine))


def dense_sigmoid(image, text, scale, bias):
    """SigLIP's loss over the whole matrix, in f64, and its gradients by all four arguments."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    cosine, truth = image @ text.T, 2 * np.eye(len(image)) - 1
    logits = scale * cosine + bias
    total = np.sum(np.logaddexp(0, -truth * logits)) / len(image)
    grad_logits = -truth / (1 + np.exp(truth * logits)) / len(image)
    by_cosine = scale * grad_logits
    return total, (by_cosine @ text, by_cosine.T @ image, np.sum(grad_logits * cosine), np.sum(grad_logits))


def embeddings(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(2, rows, width)).astype(np.float32)
    pair[1] += pair[0]  # so that positives stand out
    return pair / np.linalg.norm(pair, axis=2, keepdims=True)


@pytest.mark.parametrize("devices, fsdp", [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("block, gathered", [(losses.BLOCK, losses.GATHERED), (600, losses.GATHERED), (600, 0), (1, 0)])
@pytest.mark.parametrize(
    "name, reference, scalars",
    [
        ("info_nce", dense, (1.0,)),
        ("info_nce", dense, (100.0,)),
        ("sigmoid", dense_sigmoid, (10.0, -10.0)),
        ("sigmoid", dense_sigmoid, (100.0, 3.0)),
    ],
)
def test_value_and_gradients_equal_the_dense_reference(
    devices, fsdp, block, gathered, name, reference, scalars, monkeypatch
):
    monkeypatch.setattr(losses, "GATHERED", gathered)
    image, text = embeddings(48, 12)
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    loss = functools.partial(getattr(losses, name), block=block)
    with jax.set_mesh(mesh):
        rows = (jax.device_put(x, sharding.batch_sharding(mesh)) for x in (image, text))
        by_all = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(2 + len(scalars)))))
        value, grads = by_all(*rows, *map(jnp.float32, scalars))
    expected, expected_grads = reference(image, text, *scalars)
    # A cosine of unit vectors carries EPS, a logit `scale` times that, and so does each exponential, relatively.
    error = 4 * EPS * max(scalars[0], 10)
    np.testing.assert_allclose(value, expected, rtol=error)
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, rtol=error, atol=error * np.abs(reference).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_of_near_duplicates_at_the_largest_scale(devices):
    """Every logit is near 100 and the rows are hard to tell apart: the worst case for cancellation."""
    rng = np.random.default_rng(0)
    image = embeddings(1, 16)[0] + 0.02 * rng.normal(size=(24, 16))
    text = image + 0.01 * rng.normal(size=image.shape)
    image, text = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))
    with jax.set_mesh(mesh := sharding.make_mesh(MeshConfig(), jax.devices()[:devices])):
        rows = (jax.device_put(x, sharding.batch_sharding(mesh)) for x in (image, text))
        value, grads = jax.jit(jax.value_and_grad(losses.info_nce, argnums=(0, 1, 2)))(*rows, jnp.float32(100))
    expected, expected_grads = dense(image, text, 100.0)
    np.testing.assert_allclose(value, expected, rtol=4 * EPS * 100)
    for grad, reference in zip(grads, expected_grads, strict=True):
        # Each gradient is a sum of 2 x 24 terms of up to `scale / 24` that nearly cancel: their size sets the error.
        np.testing.assert_allclose(grad, reference, atol=4 * EPS * 100 * max(100 / 24, np.abs(reference).max()))


def test_a_loss_near_zero_keeps_its_digits():
    """Perfect pairs far apart: the loss is a sum of tiny exponentials, which a log-sum-exp near 100 would swallow."""
    image = np.eye(16, dtype=np.float32)
    text = (image + 0.85 * np.roll(image, 1, axis=1)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        value = losses.info_nce(jnp.asarray(image), jnp.asarray(text), jnp.float32(100))
    expected, _ = dense(image, text, 100.0)
    assert 1e-6 < expected < 1e-4
    np.testing.assert_allclose(value, expected, rtol=4 * EPS * 100)


@pytest.mark.parametrize("gathered, times", [(losses.GATHERED, 1), (0, 2)])
def test_embeddings_are_gathered_once_unless_they_are_too_many(gathered, times, monkeypatch):
    """An audit: in slices or not, a device gets the columns of both towers, and gives their gradients."""
    monkeypatch.setattr(losses, "GATHERED", gathered)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:8])
    rows, whole = sharding.batch_sharding(mesh), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pairs = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with jax.set_mesh(mesh):
        loss = functools.partial(losses.info_nce, block=8 * 64 // 2)  # two slices
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        text = step.lower(pairs, pairs, scale).compile().as_text()
    sent = {c.op: c.bytes for c in hlo.Module(text).collectives(mesh.shape)}
    columns = 2 * 64 * 16 * 4
    assert sent == {"all-gather": times * columns, "reduce-scatter": columns, "all-reduce": 4}


def test_identical_embeddings_at_the_largest_scale_do_not_overflow():
    """All logits are 100, where an unshifted exponential is infinite; the loss is then log N."""
    same = np.tile(embeddings(1, 8)[0], (16, 1))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        value = losses.info_nce(jnp.asarray(same), jnp.asarray(same), jnp.float32(100))
    # The 8 products of a cosine may be added in another order than those of the own one: 8 roundings, at scale 100.
    np.testing.assert_allclose(value, np.log(16), atol=8 * EPS * 100)


@pytest.mark.parametrize(
    "rows, devices, block, slices",
    [(256, 256, 2**24, 1), (4096, 256, 2**24, 256), (48, 1, 600, 4), (7, 1, 3, 7), (6, 8, 1, 6)],
)
def test_slices_keep_a_block_within_its_bound_and_divide_the_rows(rows, devices, block, slices):
    assert losses._slices(rows, rows * rows * devices, block) == slices
