"""The text tower: a transformer over word pieces or byte pairs."""

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.transformer as transformer
from flip_jax import masking
from flip_jax.config import ModelConfig, TextConfig
from flip_jax.masking import PAD
from flip_jax.sharding import whole


class TextTransformer(nnx.Module):
    """Token embedding, learned positions, transformer, pooling. No special token is put in front (official)."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.settings, self.dtype = model.text, jnp.dtype(model.dtype)
        settings = model.text
        normal = nnx.initializers.normal(0.02)
        self.token_embed = nnx.Param(
            normal(rngs.params(), (settings.vocab_size, settings.width), jnp.float32), axes=("vocab", "embed")
        )
        self.pos_embed = nnx.Param(
            normal(rngs.params(), (1, settings.context_length, settings.width), jnp.float32),
            axes=(None, None, "norm"),
        )
        self.transformer = transformer.Transformer(settings, model, rngs)

    def __call__(self, token_BxT: jax.Array, keep_BxK: jax.Array | None = None) -> jax.Array:
        """Encodes int32 tokens, 0 being padding; with `keep_BxK` only those there. Returns pooled f32 [B, width]."""
        position_xTxD = self.pos_embed[...].astype(self.dtype)
        if keep_BxK is not None:
            token_BxT = jnp.take_along_axis(token_BxT, keep_BxK, axis=1)
            position_xTxD = position_xTxD[0, keep_BxK]
        real_BxT = token_BxT != PAD
        table = whole(self.token_embed[...].astype(self.dtype))
        x = table[token_BxT] + position_xTxD
        mask = real_BxT[:, None, None, :] if self.settings.mask_padding else None
        if self.settings.causal:
            mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        x = self.transformer(x, mask).astype(jnp.float32)
        if self.settings.pool == "first":
            return x[:, 0]
        if self.settings.pool == "last":
            last_B = jnp.max(jnp.where(real_BxT, jnp.arange(x.shape[1])[None], 0), axis=1)
            return jnp.take_along_axis(x, last_B[:, None, None], axis=1)[:, 0]
        weight_BxTx1 = real_BxT[:, :, None].astype(jnp.float32)
        return jnp.sum(x * weight_BxTx1, axis=1) / jnp.maximum(jnp.sum(weight_BxTx1, axis=1), 1)


def visible(settings: TextConfig, key: jax.Array, token_BxT: jax.Array) -> jax.Array | None:
    """Positions of the tokens that stay in a training step, rising, or None where none is removed."""
    if settings.mask_ratio == 0:
        return None
    return masking.TEXT_STRATEGIES[settings.mask](key, token_BxT, settings.visible_tokens)
