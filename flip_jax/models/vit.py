"""The image tower: a vision transformer that encodes only the patches it is given."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flip_jax.models.transformer as transformer
from flip_jax.config import ModelConfig

# Mean and standard deviation of the channels, as shares of the brightest value.
PIXEL_STATS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def sincos_2d(grid: int, width: int) -> np.ndarray:
    """Computes fixed positions [1, 1 + grid**2, width]: zeros for cls, then sines and cosines of column and row.

    The column comes first (official code); frequencies 10000^(-k / (width / 4)).
    """
    quarter = width // 4
    frequency = 1 / 10000 ** (np.arange(quarter) / quarter)
    angle = np.arange(grid)[:, None] * frequency
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [grid, width / 2]
    by_column, by_row = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)
    table = np.concatenate([by_column, by_row], axis=1)
    return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


def resize_positions(table_1xTxD: jax.Array, grid: int) -> jax.Array:
    """Resizes the table [1, 1 + g**2, D] to another number of patches per side, bicubic; a row of cls is kept."""
    old, width = math.isqrt(table_1xTxD.shape[1]), table_1xTxD.shape[2]
    first = table_1xTxD.shape[1] - old**2  # the row of the first patch: 1, or 0 where there is no cls
    if old == grid:
        return table_1xTxD
    resized = jax.image.resize(table_1xTxD[:, first:].reshape(1, old, old, width), (1, grid, grid, width), "cubic")
    return jnp.concatenate([table_1xTxD[:, :first], resized.reshape(1, grid**2, width)], axis=1)


def _patch_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Draws Xavier uniform of the flattened patch, not of the convolution (official)."""
    return transformer.xavier(key, (int(np.prod(shape[:-1])), shape[-1]), dtype).reshape(shape)


class VisionTransformer(nnx.Module):
    """Patch embedding, positions, cls token, transformer, pooling."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.dtype = config.image, jnp.dtype(config.dtype)
        tower, patch, width = config.image, config.image.patch_size, config.image.width
        self.patch_kernel = nnx.Param(
            _patch_init(rngs.params(), (patch, patch, 3, width), jnp.float32), axes=(None, None, None, "embed")
        )
        self.patch_bias = nnx.Param(jnp.zeros(width), axes=("norm",)) if tower.patch_bias else None
        grid = tower.image_size // patch
        normal = nnx.initializers.normal(0.02)
        has_cls = tower.pool != "map"
        cls = normal(rngs.params(), (1, 1, width), jnp.float32) if has_cls else None
        self.cls = nnx.Param(cls, axes=(None, None, "norm")) if has_cls else None
        learned = tower.positions == "learned"
        shape = (1, has_cls + grid**2, width)
        table = normal(rngs.params(), shape) if learned else jnp.asarray(sincos_2d(grid, width)[:, -shape[1] :])
        self.pos_embed = nnx.Param(table, axes=(None, None, "norm"))
        self.pre_norm = transformer.layer_norm(width, config, rngs) if tower.pre_norm else None
        self.transformer = transformer.Transformer(tower, config, rngs)
        if not has_cls:
            from flip_jax.models.map_head import MapHead

            self.map_head = MapHead(config, rngs)

    def __call__(self, patch_BxKxP: jax.Array, position_BxK: jax.Array | None = None) -> jax.Array:
        """Encodes patches and pools them: f32 [B, width]."""
        return self.pool(self.tokens(patch_BxKxP, position_BxK))

    def pool(self, token_BxTxD: jax.Array) -> jax.Array:
        """Pools the result of `tokens` into one vector per image, [B, width]."""
        if self.config.pool == "map":
            return self.map_head(token_BxTxD)
        if self.config.pool == "cls":
            return token_BxTxD[:, 0]
        return jnp.mean(token_BxTxD[:, 1:] if self.config.pool == "patches" else token_BxTxD, axis=1)

    def tokens(self, patch_BxKxP: jax.Array, position_BxK: jax.Array | None = None) -> jax.Array:
        """Encodes patches to tokens, f32 [B, 1 + K, width], cls first where there is one.

        Patches are uint8, or floats already normalised. Positions are those in the whole image; None means all of its
        patches in row order, whose position table is interpolated where the image has another size.
        """
        config = self.config
        learned = config.positions == "learned"
        table = self.pos_embed[...] if learned else jax.lax.stop_gradient(self.pos_embed[...])
        if position_BxK is None:
            table = resize_positions(table, math.isqrt(patch_BxKxP.shape[1]))
        table = table.astype(self.dtype)
        if patch_BxKxP.dtype == jnp.uint8:
            stats = (255 * np.array(x, np.float32) for x in PIXEL_STATS[config.pixel_stats])
            mean, std = (np.tile(x, config.patch_size**2)[None, None] for x in stats)
            patch_BxKxP = (patch_BxKxP - mean) / std
        kernel = self.patch_kernel[...].reshape(-1, config.width).astype(self.dtype)
        x = patch_BxKxP.astype(self.dtype) @ kernel
        if self.patch_bias is not None:
            x += self.patch_bias[None, None].astype(self.dtype)
        first = 0 if self.cls is None else 1  # the row of the first patch
        x += table[:, first:] if position_BxK is None else table[0, first:][position_BxK]
        if self.cls is not None:
            cls = self.cls[...].astype(self.dtype)
            if learned:
                cls += table[:, :1]
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[2])), x], axis=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return self.transformer(x).astype(jnp.float32)
