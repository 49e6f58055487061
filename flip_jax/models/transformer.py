"""The transformer both towers are made of: pre-norm blocks, stacked along a first `layers` axis and scanned."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flip_jax import sharding
from flip_jax.config import DecoderConfig, ImageConfig, ModelConfig, TextConfig

Tower = ImageConfig | TextConfig | DecoderConfig
xavier = nnx.initializers.xavier_uniform()
# The three input projections are drawn as if they were one matrix three times as wide, less sqrt(2) (official).
_qkv_init = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
SCORES = 2**22  # of attention, computed at once on SLICED chips: their 16 MiB then stay in on-chip memory
SLICED = ("TPU v5 lite", "TPU v6 lite")  # whose bound falls by 10 % or more (docs/notes/performance.md)
# What is saved for the backward pass; the rest is recomputed.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    # Like "dots" without the MLP's hidden units: 4 of 9 widths saved, for about a ninth more work.
    "names": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "out"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def layer_norm(width: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a LayerNorm with statistics in f32 and its output in `config.dtype`."""
    vector = {"axes": ("norm",)}
    return nnx.LayerNorm(
        width,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
        scale_metadata=vector,
        bias_metadata=vector,
    )


def dense(shape: tuple[int, int], axes: tuple[str, str], init, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a dense layer with bias whose kernel's two dimensions carry the logical `axes`."""
    return nnx.Linear(
        *shape,
        kernel_init=init,
        dtype=dtype,
        rngs=rngs,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": ("norm" if axes[1] == "embed" else axes[1],)},
    )


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, by: str) -> jax.Array:
    """Attends [B, T, heads, D] with the softmax in f32, `by` one of the values of `ModelConfig.attention`."""
    if by == "auto" and sharding.device_kind() in SLICED:
        return _attend_in_turn(query, key, value, mask)
    if by != "cudnn" or mask is not None:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    # JAX 0.10 refuses to differentiate cuDNN's attention for odd numbers of tokens: pad with one token and mask it out.
    batch, length = query.shape[:2]
    odd = length % 2
    query, key, value = (jnp.pad(x, [(0, 0), (0, odd), (0, 0), (0, 0)]) for x in (query, key, value))
    lengths = jnp.full(batch, length, jnp.int32) if odd else None
    return jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, :length]


def _attend_in_turn(query, key, value, mask):
    """Attends one slice of each device's rows after the other, so that no scores are written to memory."""
    rows, scores = len(query) // sharding.batch_shards_here(), query.shape[2] * query.shape[1] ** 2
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n * scores <= max(SCORES, scores))
    if mask is not None:
        mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))

    @jax.checkpoint  # the backward pass computes the scores again, because it would otherwise read all of them
    def attend_slice(slices):
        *qkv, mask = slices
        return jax.nn.dot_product_attention(*qkv, mask=mask)

    return sharding.in_turn(attend_slice, (query, key, value, mask), parts)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, tower: Tower, config: ModelConfig, rngs: nnx.Rngs):
        self.heads, self.activation, dtype = tower.heads, config.activation, jnp.dtype(config.dtype)
        width, hidden = tower.width, getattr(tower, "mlp_width", 0) or 4 * tower.width
        self.attention = config.attention if jax.default_backend() == "gpu" or config.attention != "cudnn" else "xla"
        self.norm1 = layer_norm(width, config, rngs)
        self.query = dense((width, width), ("embed", "heads"), _qkv_init, dtype, rngs)
        self.key = dense((width, width), ("embed", "heads"), _qkv_init, dtype, rngs)
        self.value = dense((width, width), ("embed", "heads"), _qkv_init, dtype, rngs)
        self.out = dense((width, width), ("heads", "embed"), xavier, dtype, rngs)
        self.norm2 = layer_norm(width, config, rngs)
        self.mlp1 = dense((width, hidden), ("embed", "mlp"), xavier, dtype, rngs)
        self.mlp2 = dense((hidden, width), ("mlp", "embed"), xavier, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = sharding.by_batch(x_BxTxD)
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        y = self.norm1(x)
        query, key, value = (
            checkpoint_name(getattr(self, name)(y), name).reshape(split) for name in ("query", "key", "value")
        )
        attended = attend(query, key, value, mask, self.attention)
        x = x + checkpoint_name(self.out(attended.reshape(x.shape)), "out")
        return x + self.mlp2(ACTIVATIONS[self.activation](self.mlp1(self.norm2(x))))


class Transformer(nnx.Module):
    """`depth` blocks and a final norm. Every block parameter has the shape [depth, ...]."""

    def __init__(self, tower: Tower, config: ModelConfig, rngs: nnx.Rngs):

        @nnx.split_rngs(splits=tower.depth)
        @functools.partial(nnx.vmap, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
        def stacked(rngs):
            return Block(tower, config, rngs)

        self.blocks = stacked(rngs)
        self.norm = layer_norm(tower.width, config, rngs)
        self.config = config

    def __call__(self, x_BxTxD: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encodes tokens; `mask`, broadcast to [B, heads, T, T], is true where they may attend (None: everywhere)."""
        graphdef, layers = nnx.split(self.blocks)

        def step(x, layer):
            return nnx.merge(graphdef, layer)(x, mask), None

        if policy := _REMAT_POLICIES.get(self.config.remat):
            step = jax.checkpoint(step, policy=policy, prevent_cse=self.config.unroll)
        return self.norm(jax.lax.scan(step, x_BxTxD, layers, unroll=self.config.unroll)[0])
