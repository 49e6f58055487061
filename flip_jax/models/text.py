"""The text tower: a transformer over word pieces or byte pairs."""

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.transformer as transformer
from flip_jax.config import ModelConfig
from flip_jax.masking import PAD
from flip_jax.sharding import whole


class TextTransformer(nnx.Module):
    """Token embedding, learned positions, transformer, pooling. No special token is put in front (official)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.dtype = config.text, jnp.dtype(config.dtype)
        tower = config.text
        normal = nnx.initializers.normal(0.02)
        self.token_embed = nnx.Param(
            normal(rngs.params(), (tower.vocab_size, tower.width), jnp.float32), axes=("vocab", "embed")
        )
        self.pos_embed = nnx.Param(
            normal(rngs.params(), (1, tower.context_length, tower.width), jnp.float32), axes=(None, None, "norm")
        )
        self.transformer = transformer.Transformer(tower, config, rngs)

    def __call__(self, token_BxK: jax.Array, position_BxK: jax.Array | None = None) -> jax.Array:
        """Encodes int32 tokens, 0 being padding, at these positions (None: all); pooled f32 [B, width]."""
        config, real_BxK = self.config, token_BxK != PAD
        position = self.pos_embed[...].astype(self.dtype)
        table = whole(self.token_embed[...].astype(self.dtype))
        x = table[token_BxK] + (position if position_BxK is None else position[0, position_BxK])
        mask = real_BxK[:, None, None, :] if config.mask_padding else None
        if config.causal:
            mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        x = self.transformer(x, mask).astype(jnp.float32)
        if config.pool in ("first", "final"):
            return x[:, 0 if config.pool == "first" else -1]
        if config.pool == "last":
            last_B = jnp.max(jnp.where(real_BxK, jnp.arange(x.shape[1])[None], 0), axis=1)
            return jnp.take_along_axis(x, last_B[:, None, None], axis=1)[:, 0]
        weight_BxKx1 = real_BxK[:, :, None].astype(jnp.float32)
        return jnp.sum(x * weight_BxKx1, axis=1) / jnp.maximum(jnp.sum(weight_BxKx1, axis=1), 1)
