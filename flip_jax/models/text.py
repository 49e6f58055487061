"""The text tower: a bidirectional transformer over word pieces."""

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import Model
from flip_jax.models import transformer
from flip_jax.sharding import whole

PAD = 0


class TextTransformer(nnx.Module):
    """Token embedding, learned positions, transformer, pooling. No special token is put in front (official)."""

    def __init__(self, model: Model, rngs: nnx.Rngs):
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

    def __call__(self, token_BxT: jax.Array) -> jax.Array:
        """Encodes int32 tokens, 0 being padding. Returns pooled f32 [B, width]."""
        real_BxT = token_BxT != PAD
        table = whole(self.token_embed[...].astype(self.dtype))
        x = table[token_BxT] + self.pos_embed[...].astype(self.dtype)
        mask = real_BxT[:, None, None, :] if self.settings.mask_padding else None
        x = self.transformer(x, mask).astype(jnp.float32)
        if self.settings.pool == "first":
            return x[:, 0]
        weight_BxTx1 = real_BxT[:, :, None].astype(jnp.float32)
        return jnp.sum(x * weight_BxTx1, axis=1) / jnp.maximum(jnp.sum(weight_BxTx1, axis=1), 1)
