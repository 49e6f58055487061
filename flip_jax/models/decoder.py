"""MAE's decoder, for the paper's ablation only: the removed patches' pixels from the visible ones. Paper, table 1f."""

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.transformer as transformer
from flip_jax.config import ModelConfig
from flip_jax.models.vit import sincos_2d


class Decoder(nnx.Module):
    """Encoded visible patches, and a learned token for each removed one, to pixels (arXiv 2111.06377)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        tower, image, self.dtype = config.decoder, config.image, jnp.dtype(config.dtype)
        width = tower.width
        self.embed = transformer.dense((image.width, width), ("embed", None), transformer.xavier, self.dtype, rngs)
        token = nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width), jnp.float32)
        self.mask_token = nnx.Param(token, axes=(None, None, "norm"))
        grid = image.image_size // image.patch_size
        self.pos_embed = nnx.Param(jnp.asarray(sincos_2d(grid, width)), axes=(None, None, "norm"))
        self.transformer = transformer.Transformer(tower, config, rngs)
        pixels = 3 * image.patch_size**2
        self.predict = transformer.dense((width, pixels), ("embed", None), transformer.xavier, jnp.float32, rngs)

    def __call__(self, token_BxTxD: jax.Array, position_BxK: jax.Array, patch_BxLxP: jax.Array) -> jax.Array:
        """Returns the scalar loss: the mean squared error of the removed patches' pixels, each patch normalised.

        `token_BxTxD` are the image tower's tokens, cls first, of the patches at `position_BxK` of `patch_BxLxP`.
        """
        x = self.embed(token_BxTxD.astype(self.dtype))
        batch, patches = patch_BxLxP.shape[:2]
        rows = jnp.arange(batch)[:, None]
        unseen = jnp.broadcast_to(self.mask_token[...].astype(self.dtype), (batch, patches, x.shape[2]))
        x = jnp.concatenate([x[:, :1], unseen.at[rows, position_BxK].set(x[:, 1:])], axis=1)
        x += jax.lax.stop_gradient(self.pos_embed[...]).astype(self.dtype)
        predicted_BxLxP = self.predict(self.transformer(x)[:, 1:].astype(jnp.float32))
        pixel_BxLxP = patch_BxLxP.astype(jnp.float32)
        deviation = jnp.sqrt(jnp.var(pixel_BxLxP, axis=2, keepdims=True, ddof=1) + 1e-6)
        target = (pixel_BxLxP - jnp.mean(pixel_BxLxP, axis=2, keepdims=True)) / deviation
        removed_BxL = jnp.ones((batch, patches)).at[rows, position_BxK].set(0)
        error_BxL = jnp.mean((predicted_BxLxP - target) ** 2, axis=2)
        return jnp.sum(error_BxL * removed_BxL) / (batch * (patches - position_BxK.shape[1]))
