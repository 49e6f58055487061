"""Contrastive losses over the global batch, inside `jax.set_mesh`.

Each device holds b of the N = b * P pairs. Its b rows are compared with all N columns, which an all-gather brings; the
gradient flows back through the gather. Rows meet columns in slices, so that a block of logits never exceeds `BLOCK`
values, and the backward pass recomputes each block instead of keeping it. Beyond `GATHERED` values the columns are
gathered one slice at a time, too, and again for the backward pass.

A row's own pair is left out of its sum over columns and treated separately. At a scale of 100 its logit is near 100,
and subtracting it from a log-sum-exp near 100 would leave noise of 1e-5 in a loss that may be smaller than that.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flip_jax.sharding import BATCH

BLOCK = 2**24  # logits held at once on a device: 64 MiB, the whole of 256 rows x 65,536 columns
GATHERED = 2**26  # values of one tower's gathered embeddings, N x E: 256 MiB, 65,536 pairs of width 1,024
ABSENT = -1e9  # the logit of a row's own column in a sum over the others; finite, so that its gradient is 0 and not NaN


def info_nce(image_BxE: jax.Array, text_BxE: jax.Array, scale: jax.Array, *, block: int = BLOCK) -> jax.Array:
    """Computes symmetric InfoNCE of normalised f32 embeddings: the mean over the global batch B and both directions.

    `scale`, a scalar, multiplies the cosines. Equal to the mean of the two cross-entropies of the N x N logits: with
    z_j the logit of column j minus that of the own one, a row's is log(1 + sum of exp(z_j) over the other columns).
    """

    def local(image_bxE, text_bxE, scale):
        own_b = _cosine(image_bxE, text_bxE)

        def relative(cosine_bxC, is_own_bxC):
            return jnp.where(is_own_bxC, ABSENT, scale * (cosine_bxC - own_b[:, None]))

        others = functools.partial(_over_columns, logit=relative, reduce=jax.nn.logsumexp, block=block)
        by_image_b, by_text_b = others(image_bxE, text_bxE), others(text_bxE, image_bxE)
        return _mean((jax.nn.softplus(by_image_b) + jax.nn.softplus(by_text_b)) / 2)

    return _on_rows(local)(image_BxE, text_BxE, scale)


def sigmoid(
    image_BxE: jax.Array, text_BxE: jax.Array, scale: jax.Array, bias: jax.Array, *, block: int = BLOCK
) -> jax.Array:
    """SigLIP's loss (arXiv 2303.15343): each of the N x N pairs matches or not by itself; their sum over N.

    The logit of a pair is `scale` times the cosine, plus `bias`.
    """

    def local(image_bxE, text_bxE, scale, bias):
        def absolute(cosine_bxC, is_own_bxC):
            return jnp.where(is_own_bxC, ABSENT, scale * cosine_bxC + bias)

        others_b = _over_columns(
            image_bxE,
            text_bxE,
            logit=absolute,
            reduce=lambda x, axis: jnp.sum(jax.nn.softplus(x), axis),
            combine=jnp.sum,
            block=block,
        )
        return _mean(others_b + jax.nn.softplus(-(scale * _cosine(image_bxE, text_bxE) + bias)))

    return _on_rows(local)(image_BxE, text_BxE, scale, bias)


def _on_rows(local: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs `local` on each device's rows of the first two arguments; the others, and the result, are scalars."""

    def apply(image_BxE, text_BxE, *scalars):
        rows, whole = PartitionSpec(BATCH), PartitionSpec()
        return jax.shard_map(local, in_specs=(rows, rows, *(whole for _ in scalars)), out_specs=whole)(
            image_BxE, text_BxE, *scalars
        )

    return apply


def _mean(term_b):
    return jax.lax.pmean(jnp.mean(term_b), BATCH)


def _cosine(image_bxE, text_bxE):
    return jnp.sum(image_bxE * text_bxE, axis=1)


def _over_columns(row_bxE, column_bxE, *, logit, reduce, block, combine=None):
    """Computes `reduce(logit(cosine, is_own), axis)` of each row [b] over the columns of all devices.

    `combine` (default: `reduce` itself) joins the results of slices of the columns.
    """
    rows, width = row_bxE.shape
    devices = jax.lax.axis_size(BATCH)
    columns = rows * devices
    slices = _slices(rows, rows * columns, block)
    gather = functools.partial(jax.lax.all_gather, axis_name=BATCH, tiled=True)
    number_b = jax.lax.axis_index(BATCH) * rows + jnp.arange(rows)

    def compare(column_CxE, number_C):
        # Full precision: a bf16 product would be off by 0.4 at a scale of 100.
        cosine_bxC = jnp.einsum("be,ce->bc", row_bxE, column_CxE, precision="highest")
        return reduce(logit(cosine_bxC, number_b[:, None] == number_C[None]), 1)

    number_N = jnp.arange(columns)
    if columns * width <= GATHERED:
        # Outside of the checkpoint, or the backward pass would gather again.
        one, column_nxE = jax.checkpoint(compare), gather(column_bxE)
    else:
        one = jax.checkpoint(lambda column_cxE, number_C: compare(gather(column_cxE), number_C))
        column_nxE = column_bxE
        # A slice of every device's columns is gathered together: with 2 devices of 4 columns and 2 slices, the first
        # slice has the columns 0, 1, 4 and 5, the second 2, 3, 6 and 7.
        number_N = number_N.reshape(devices, slices, -1).swapaxes(0, 1)
    if slices == 1:
        return one(column_nxE, number_N.reshape(-1))
    parts = column_nxE.reshape(slices, -1, width), number_N.reshape(slices, -1)
    return (combine or reduce)(jax.lax.map(lambda part: one(*part), parts), 0)


def _slices(rows: int, logits: int, block: int) -> int:
    """Finds the least number of equal slices of a device's `rows` columns that keeps a block within `block` logits."""
    least = min(rows, -(-logits // block))
    return next(n for n in range(least, rows + 1) if rows % n == 0)
