"""Linear probe: logistic regression on frozen image features, as in CLIP (arXiv 2103.00020, appendix A.3).

The features are the pooled output of the image tower, not normalised. The L2 penalty is chosen on a held-out fifth of
the training images; the classifier is then fitted to all of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.evaluators import datasets, needs, zeroshot
from flip_jax.evaluators.datasets import Dataset
from flip_jax.inference import Encoder
from flip_jax.runtime import UserError, say

NEEDS = (needs.labels, needs.train_split)

ITERATIONS = 1000  # of L-BFGS at most
EXPONENTS = (-6.0, 6.0)  # range of log10(penalty) that is searched
FITS = 7 + 2 * 4 + 1  # at most: every second power of 10, then two for each of four halved steps, and the final one
HELD_OUT = 5  # one image in five is held out to choose the penalty
BLOCK = 8192  # rows per device whose scores are held in memory at once


class Rows(NamedTuple):
    """Features, labels, and 1.0 for real rows or 0.0 for padding, split over the devices."""

    x_NxD: jax.Array
    label_N: jax.Array
    real_N: jax.Array


def features(encoder: Encoder, dataset: Dataset, config: Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns features f32 [N, width] and labels [N] of the usable images of a split, in order, in every process."""
    processes = jax.process_count()
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(encoder.mesh, PartitionSpec()))
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in datasets.labelled(dataset, config, split):
        (label,) = sharding.to_devices(encoder.mesh, np.where(batch["mask"], batch["label"], -1))
        for rows, all_rows in ((features, encoder.features(batch["image"])), (labels, np.asarray(whole(label)))):
            # Processes read every n-th record, so this interleaving restores the order.
            rows.append(all_rows.reshape(processes, -1, *all_rows.shape[1:]).swapaxes(0, 1).reshape(all_rows.shape))
    x_NxD, label_N = np.concatenate(features), np.concatenate(labels)
    if not (label_N >= 0).any():
        raise UserError(f"{dataset.name}: none of the images of {getattr(dataset, split)!r} can be used")
    return x_NxD[label_N >= 0], label_N[label_N >= 0]


def both_splits(encoder: Encoder, dataset: Dataset, config: Config) -> tuple[tuple, tuple, int]:
    """Returns the `features` of the training split and of the test split, and the number of classes."""
    dataset = datasets.with_training_names(dataset, config)
    train, test = (features(encoder, dataset, config, split) for split in ("train", "test"))
    if len(np.unique(train[1])) < 2:
        raise UserError(f"{dataset.name}: all {len(train[1])} images of {dataset.train!r} are of one class")
    classes = len(dataset.classes) or max(train[1].max(), test[1].max()) + 1
    dataset.note_classes(np.bincount(test[1], minlength=classes))
    return train, test, classes


def place(mesh: Mesh, x_NxD: np.ndarray, label_N: np.ndarray) -> Rows:
    """Splits rows that every process holds over the devices."""
    padding = -len(x_NxD) % (sharding.batch_shards(mesh) * _blocks(mesh, len(x_NxD)))
    split = sharding.batch_sharding(mesh)

    def padded(x: np.ndarray) -> jax.Array:
        x = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return jax.make_array_from_callback(x.shape, split, lambda index: x[index])

    return Rows(padded(x_NxD), padded(label_N), padded(np.ones(len(x_NxD), np.float32)))


def _blocks(mesh: Mesh, rows: int) -> int:
    """Returns into how many blocks the rows of a device are split."""
    return -(-rows // (BLOCK * sharding.batch_shards(mesh)))


def scores(weight_ExC: jax.Array, x_NxD: jax.Array) -> jax.Array:
    """Returns the scores [N, C] of features; the last row of the weights is the intercept."""
    return jnp.matmul(x_NxD, weight_ExC[:-1], precision="highest") + weight_ExC[-1:]


@functools.partial(jax.jit, static_argnames="blocks")
def _value_and_grad(weight_ExC, rows, penalty, blocks):
    """Computes mean cross-entropy + penalty / 2 |weights|^2 / rows and its gradient; the intercept is not penalised."""

    def entropy(weight_ExC, part):
        each = optax.softmax_cross_entropy_with_integer_labels(scores(weight_ExC, part.x_NxD), part.label_N)
        return jnp.sum(part.real_N * each)

    def objective(weight_ExC):
        block = jax.checkpoint(lambda part: entropy(weight_ExC, part))
        total = jnp.sum(jax.lax.map(block, sharding.split(rows, blocks)))
        return (total + penalty / 2 * jnp.sum(weight_ExC[:-1] ** 2)) / jnp.sum(rows.real_N)

    return jax.tree.map(sharding.whole, jax.value_and_grad(objective)(weight_ExC))


@functools.partial(jax.jit, static_argnames="blocks")
def _hits(weight_ExC, rows, blocks):
    def block(part):
        return zeroshot.count_scores(scores(weight_ExC, part.x_NxD), part.label_N, part.real_N > 0)

    return sharding.whole(jnp.sum(jax.lax.map(block, sharding.split(rows, blocks)), axis=0))


def loss(weight_ExC: np.ndarray, rows: Rows, mesh: Mesh, penalty: float = 0.0) -> tuple[float, np.ndarray]:
    """Returns the objective that the fit minimises and its gradient. Call it inside `jax.set_mesh(mesh)`."""
    value, grad = _value_and_grad(weight_ExC, rows, np.float32(penalty), _blocks(mesh, len(rows.x_NxD)))
    return float(value), np.asarray(grad)


def count(weight_ExC: np.ndarray, rows: Rows, mesh: Mesh) -> np.ndarray:
    """Applies `zeroshot.count_scores` to the real rows. Call it inside `jax.set_mesh(mesh)`."""
    return np.asarray(_hits(weight_ExC, rows, _blocks(mesh, len(rows.x_NxD))))


@functools.partial(jax.jit, static_argnames="blocks")
def _moments(rows, blocks):
    """Computes the mean [D] and covariance [D, D] of the real rows, and their number."""
    count = jnp.sum(rows.real_N)
    mean_D = jnp.matmul(rows.real_N, rows.x_NxD, precision="highest") / count

    def block(part):
        centred_NxD = part.real_N[:, None] * (part.x_NxD - mean_D[None])
        return jnp.matmul(centred_NxD.T, centred_NxD, precision="highest")

    covariance_DxD = jnp.sum(jax.lax.map(block, sharding.split(rows, blocks)), axis=0) / count
    return jax.tree.map(sharding.whole, (mean_D, covariance_DxD, count))


def make_fit(rows: Rows, classes: int, mesh: Mesh) -> Callable[[float], np.ndarray]:
    """Returns a function from a penalty (scikit-learn's 1 / C) to the fitted weights f32 [width + 1, classes].

    L-BFGS converges fastest where all directions are equally curved. So it works in coordinates in which the features
    are centred, uncorrelated and scaled by the curvature of the objective for equally likely classes, which is
    variance / classes + penalty / rows. The mean and the axes do not depend on the penalty and are computed once.
    """
    shape = rows.x_NxD.shape[1] + 1, classes
    moments = _moments(rows, _blocks(mesh, len(rows.x_NxD)))
    mean_D, covariance_DxD, count = (np.asarray(x, np.float64) for x in moments)
    variance_D, axis_DxD = np.linalg.eigh(covariance_DxD)
    variance_D = np.maximum(variance_D, 1e-7 * variance_D[-1])  # smaller ones are rounding errors of f32

    def fit(penalty):
        scaled_DxD = axis_DxD / np.sqrt(variance_D + penalty * classes / count)
        to_weights_ExE = np.block([[scaled_DxD, np.zeros((len(mean_D), 1))], [-mean_D @ scaled_DxD, np.ones(1)]])

        def value_and_grad(flat):
            value, grad = loss((to_weights_ExE @ flat.reshape(shape)).astype(np.float32), rows, mesh, penalty)
            return value, (to_weights_ExE.T @ grad).ravel()

        # The value is computed in f32, so smaller relative changes are rounding errors.
        options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "gtol": 1e-6, "ftol": 1e-9}
        start = np.zeros(np.prod(shape))
        found = scipy.optimize.minimize(value_and_grad, start, jac=True, method="L-BFGS-B", options=options)
        return (to_weights_ExE @ found.x.reshape(shape)).astype(np.float32)

    return fit


def best_exponent(quality: Callable[[float], tuple[float, ...]]) -> float:
    """Searches as CLIP does: every second power of 10, then steps halved around the best, down to 1/8 of a decade."""
    low, high = EXPONENTS
    found: dict[float, tuple[float, ...]] = {}
    step, wanted = 2.0, list(np.arange(low, high + 1, 2))
    while True:
        found |= {exponent: quality(exponent) for exponent in map(float, wanted) if exponent not in found}
        best = max(found, key=lambda exponent: found[exponent])
        step /= 2
        if step < 1 / 8:
            return best
        wanted = [exponent for exponent in (best - step, best + step) if low <= exponent <= high]


def run(encoder: Encoder, dataset: Dataset, config: Config) -> Iterator[tuple[str, float]]:
    """Yields the accuracies over the whole test split, the data set's own metric first, then log10 of the penalty."""
    (x_NxD, label_N), test, classes = both_splits(encoder, dataset, config)
    mesh, name = encoder.mesh, f"{datasets.shortened(dataset.name)}: linear probe"
    with jax.set_mesh(mesh), datasets.Progress(name, FITS, " fits") as bar:
        train = place(mesh, x_NxD, label_N)
        is_held = np.zeros(train.real_N.shape, bool)
        is_held[np.random.default_rng(0).permutation(len(x_NxD))[: len(x_NxD) // HELD_OUT or 1]] = True
        held_N = jax.make_array_from_callback(is_held.shape, train.real_N.sharding, lambda index: is_held[index])
        seen, held = (train._replace(real_N=jnp.where(held_N == side, train.real_N, 0)) for side in (False, True))

        fit = make_fit(seen, classes, mesh)

        def quality(exponent):
            """Returns the accuracy, then the negative loss to break ties, which are common with few images."""
            weights = fit(10**exponent)
            bar.update()
            return zeroshot.accuracies(count(weights, held, mesh))[dataset.metric], -loss(weights, held, mesh)[0]

        exponent = best_exponent(quality)
        weights = make_fit(train, classes, mesh)(10**exponent)
        bar.update()
        hits = count(weights, place(mesh, *test), mesh)
    values = zeroshot.accuracies(hits, dataset.metric)
    result = f"top-1 {values['top1']:.2f} % over {len(test[1])} images, penalty 10^{exponent:g}"
    say(f"{name} {result}")
    yield from values.items()
    yield "log10_penalty", exponent
