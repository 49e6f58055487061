"""Contrastive losses over the global batch, inside `jax.set_mesh`.

Each device holds b of the N = b * P pairs. Its b rows are compared with all N columns, which an all-gather brings; the
gradient flows back through the gather. Columns come in slices, so that a block of logits never exceeds `BLOCK` values,
and the backward pass computes each block again instead of keeping it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flip_jax.sharding import BATCH

BLOCK = 2**24  # logits held at once on a device: 64 MiB, the whole of 256 rows x 65,536 columns


def info_nce(image_BxE: jax.Array, text_BxE: jax.Array, scale: jax.Array, *, block: int = BLOCK) -> jax.Array:
    """Symmetric InfoNCE of normalised f32 embeddings, B the global batch; the scalar mean over pairs and directions.

    `scale`, a scalar, multiplies the cosines. Equal to the mean of the two cross-entropies of the N x N logits.
    """
    local = functools.partial(_local_info_nce, block=block)
    sharded = jax.shard_map(
        local, in_specs=(PartitionSpec(BATCH), PartitionSpec(BATCH), PartitionSpec()), out_specs=PartitionSpec()
    )
    return sharded(image_BxE, text_BxE, scale)


def _local_info_nce(image_bxE, text_bxE, scale, *, block):
    positive_b = scale * jnp.sum(image_bxE * text_bxE, axis=1)
    by_image_b = _log_partition(image_bxE, text_bxE, scale, block)
    by_text_b = _log_partition(text_bxE, image_bxE, scale, block)
    return jax.lax.pmean(jnp.mean((by_image_b + by_text_b) / 2 - positive_b), BATCH)


def _log_partition(row_bxE, column_bxE, scale, block):
    """log sum_j exp(scale * row . column_j) over the columns of all devices: [b]."""
    rows, width = row_bxE.shape
    slices = _slices(rows, rows * rows * jax.lax.axis_size(BATCH), block)

    @jax.checkpoint
    def one(column_cxE):
        column_CxE = jax.lax.all_gather(column_cxE, BATCH, tiled=True)
        # Full precision: a bf16 product would be off by 0.4 at a scale of 100.
        logit_bxC = jnp.einsum("be,ce->bc", row_bxE, column_CxE, precision="highest") * scale
        return jax.nn.logsumexp(logit_bxC, axis=1)

    if slices == 1:
        return one(column_bxE)
    partial_Sxb = jax.lax.map(one, column_bxE.reshape(slices, rows // slices, width))
    return jax.nn.logsumexp(partial_Sxb, axis=0)


def _slices(rows: int, logits: int, block: int) -> int:
    """The least number of equal slices of `rows` columns that keeps a block of logits within `block` values."""
    least = min(rows, -(-logits // block))
    return next(n for n in range(least, rows + 1) if rows % n == 0)
