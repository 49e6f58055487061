"""The sharded, sliced loss against a dense reference in f64 with gradients written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flip_jax import losses, sharding
from flip_jax.config import MeshConfig
from flip_jax.tools import hlo


def dense(image, text, scale):
    """Loss and its gradients by all three arguments: the mean of both cross-entropies of the whole matrix, in f64."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    rows, cosine = len(image), image @ text.T
    total, grad_cosine = 0.0, np.zeros_like(cosine)
    for axis in (0, 1):
        logits = scale * cosine
        shifted = np.exp(logits - logits.max(axis=axis, keepdims=True))
        softmax = shifted / shifted.sum(axis=axis, keepdims=True)
        total += -np.mean(np.log(np.diag(softmax))) / 2
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
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for grad, reference in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, reference, rtol=2e-5, atol=2e-6 * np.abs(reference).max())


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
    np.testing.assert_allclose(value, np.log(16), rtol=1e-6)


@pytest.mark.parametrize(
    "rows, devices, block, slices",
    [(256, 256, 2**24, 1), (4096, 256, 2**24, 256), (48, 1, 600, 4), (7, 1, 3, 7), (6, 8, 1, 6)],
)
def test_slices_keep_a_block_within_its_bound_and_divide_the_rows(rows, devices, block, slices):
    assert losses._slices(rows, rows * rows * devices, block) == slices
