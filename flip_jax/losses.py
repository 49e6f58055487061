"""Contrastive losses over the global batch, inside `jax.set_mesh`.

Each device holds b of the N = b * P pairs. Its b rows are compared with all N columns, which an all-gather brings; the
gradient flows back through the gather. Rows meet columns in slices, so that a block of logits never exceeds `BLOCK`
values, and the backward pass computes each block again instead of keeping it. Beyond `GATHERED` values the columns are
gathered slice by slice, too, and once more for the backward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flip_jax.sharding import BATCH

BLOCK = 2**24  # logits held at once on a device: 64 MiB, the whole of 256 rows x 65,536 columns
GATHERED = 2**26  # values of a tower's embeddings that a device holds of all pairs: 256 MiB, 65,536 of 1,024


def info_nce(image_BxE: jax.Array, text_BxE: jax.Array, scale: jax.Array, *, block: int = BLOCK) -> jax.Array:
    """Symmetric InfoNCE of normalised f32 embeddings, B the global batch; the scalar mean over pairs and directions.

    `scale`, a scalar, multiplies the cosines. Equal to the mean of the two cross-entropies of the N x N logits.
    """

    def local(image_bxE, text_bxE, scale):
        log_partition = functools.partial(
            _over_columns, logit=lambda x: x * scale, reduce=jax.nn.logsumexp, block=block
        )
        by_image_b, by_text_b = log_partition(image_bxE, text_bxE), log_partition(text_bxE, image_bxE)
        return _mean((by_image_b + by_text_b) / 2 - scale * _cosine(image_bxE, text_bxE))

    return _on_rows(local)(image_BxE, text_BxE, scale)


def sigmoid(
    image_BxE: jax.Array, text_BxE: jax.Array, scale: jax.Array, bias: jax.Array, *, block: int = BLOCK
) -> jax.Array:
    """SigLIP's loss (arXiv 2303.15343): each of the N x N pairs is true or not by itself; their sum over N.

    The logit of a pair is `scale` times the cosine, plus `bias`.
    """

    def local(image_bxE, text_bxE, scale, bias):
        untrue_b = _over_columns(
            image_bxE,
            text_bxE,
            logit=lambda x: x * scale + bias,
            reduce=lambda x, axis: jnp.sum(jax.nn.softplus(x), axis),
            combine=jnp.sum,
            block=block,
        )
        # softplus(-x) = softplus(x) - x turns the term of the own column into that of a true pair.
        return _mean(untrue_b - (scale * _cosine(image_bxE, text_bxE) + bias))

    return _on_rows(local)(image_BxE, text_BxE, scale, bias)


def _on_rows(local: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`local` on each device's rows of the first two arguments; the others, and the result, are scalars."""

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
    """Of each row: `reduce(logit(cosine), axis)` over the columns of all devices: [b].

    `combine` (default: `reduce` itself) joins what `reduce` made of slices of the columns.
    """
    rows, width = row_bxE.shape
    columns = rows * jax.lax.axis_size(BATCH)
    slices = _slices(rows, rows * columns, block)
    gather = functools.partial(jax.lax.all_gather, axis_name=BATCH, tiled=True)

    def compare(column_CxE):
        # Full precision: a bf16 product would be off by 0.4 at a scale of 100.
        return reduce(logit(jnp.einsum("be,ce->bc", row_bxE, column_CxE, precision="highest")), 1)

    if columns * width <= GATHERED:
        # Outside of the checkpoint, or the backward pass would gather again.
        one, column_bxE = jax.checkpoint(compare), gather(column_bxE)
    else:
        one = jax.checkpoint(lambda column_cxE: compare(gather(column_cxE)))
    if slices == 1:
        return one(column_bxE)
    return (combine or reduce)(jax.lax.map(one, column_bxE.reshape(slices, -1, width)), 0)


def _slices(rows: int, logits: int, block: int) -> int:
    """The least number of equal slices of `rows` columns that keeps a block of logits within `block` values."""
    least = min(rows, -(-logits // block))
    return next(n for n in range(least, rows + 1) if rows % n == 0)
