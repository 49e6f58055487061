"""FLIP: the two towers, their projections into one space, and the temperature."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import Model
from flip_jax.models import transformer
from flip_jax.models.text import TextTransformer
from flip_jax.models.vit import VisionTransformer, patchify, visible

MAX_SCALE = 100.0


class FLIP(nnx.Module):
    """Contrastive image-text model. Parameters are f32; `settings.dtype` is the type of the towers' arithmetic."""

    def __init__(self, settings: Model, rngs: nnx.Rngs):
        self.settings = settings
        self.image = VisionTransformer(settings, rngs)
        self.text = TextTransformer(settings, rngs)
        self.image_projection = _projection(settings.image.width, settings.embed_dim, rngs)
        self.text_projection = _projection(settings.text.width, settings.embed_dim, rngs)
        self.logit_scale = nnx.Param(jnp.full((1,), math.log(settings.temperature)), axes=("norm",))

    def encode_image(self, image_BxHxWx3: jax.Array, mask_key: jax.Array | None = None) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of uint8 pictures; with a key, of their visible patches only."""
        patch_BxLxP = patchify(image_BxHxWx3, self.settings.image.patch_size)
        keep = None if mask_key is None else visible(self.settings.image, mask_key, patch_BxLxP)
        return self.embed_patches(patch_BxLxP, keep)

    def embed_patches(self, patch_BxLxP: jax.Array, keep_BxK: jax.Array | None) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of the patches at the positions `keep_BxK` (None: of all)."""
        return _normalise(self.image_projection(self.image(patch_BxLxP, keep_BxK)))

    def encode_text(self, token_BxT: jax.Array) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of int32 tokens, 0 being padding."""
        return _normalise(self.text_projection(self.text(token_BxT)))

    def scale(self) -> jax.Array:
        """What multiplies the cosines, a scalar: exp(logit_scale) within [1, 100]; the stored value is not clipped."""
        # Not jnp.clip, whose gradient at a bound may change: minimum and maximum halve it there (official).
        return jnp.exp(jnp.minimum(jnp.maximum(self.logit_scale[0], 0), math.log(MAX_SCALE)))


def _projection(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=transformer.xavier,
        dtype=jnp.float32,
        rngs=rngs,
        kernel_metadata={"axes": ("embed", None)},
    )


def _normalise(x_BxE: jax.Array) -> jax.Array:
    return x_BxE / (jnp.linalg.norm(x_BxE, axis=1, keepdims=True) + 1e-8)
