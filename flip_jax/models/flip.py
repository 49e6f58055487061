"""FLIP: the two towers, their projections into one space, and the temperature."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.text as text
import flip_jax.models.transformer as transformer
import flip_jax.models.vit as vit
from flip_jax import losses
from flip_jax.config import ModelConfig
from flip_jax.models.vit import patchify

MAX_SCALE = 100.0
Masks = tuple[jax.Array | None, jax.Array | None]  # positions of the visible patches and tokens, [B, K] each


class FLIP(nnx.Module):
    """Contrastive image-text model. Parameters are f32; `settings.dtype` is the type of the towers' arithmetic."""

    def __init__(self, settings: ModelConfig, rngs: nnx.Rngs):
        self.settings = settings
        self.image = vit.VisionTransformer(settings, rngs)
        self.text = text.TextTransformer(settings, rngs)
        self.image_projection = _projection(settings.image.width, settings.embed_dim, rngs)
        self.text_projection = _projection(settings.text.width, settings.embed_dim, rngs)
        self.logit_scale = nnx.Param(jnp.full((1,), math.log(settings.temperature)), axes=("norm",))
        if settings.decoder.weight:
            from flip_jax.models.decoder import Decoder

            self.decoder = Decoder(settings, rngs)
        if settings.loss == "sigmoid":
            # Most pairs are untrue: without it the first steps would only learn that (SigLIP, arXiv 2303.15343).
            self.logit_bias = nnx.Param(jnp.full((1,), -10.0), axes=("norm",))

    def masks(self, image_BxHxWx3: jax.Array, token_BxT: jax.Array, key: jax.Array) -> Masks:
        """What a training step sees of a batch: positions [B, K] of the visible patches and tokens, None for all."""
        patch_BxLxP = patchify(image_BxHxWx3, self.settings.image.patch_size)
        token_key = jax.random.fold_in(key, 1)
        return (
            vit.visible(self.settings.image, key, patch_BxLxP),
            text.visible(self.settings.text, token_key, token_BxT),
        )

    def encode_pairs(
        self, image_BxHxWx3: jax.Array, token_BxT: jax.Array, masks: Masks
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Both embeddings of what `masks` leaves, and what a training step adds to `compare`'s loss, a scalar."""
        image_BxHxWx3 = vit.resized(self.settings.image, image_BxHxWx3)
        patch_BxLxP = patchify(image_BxHxWx3, self.settings.image.patch_size)
        token_BxKxD = self.image.tokens(patch_BxLxP, masks[0])
        image_BxE = normalise(self.image_projection(self.image.pool(token_BxKxD)))
        reconstruction = self.settings.decoder.weight
        auxiliary = reconstruction * self.decoder(token_BxKxD, masks[0], patch_BxLxP) if reconstruction else 0.0
        return image_BxE, self.encode_text(token_BxT, masks[1]), jnp.float32(auxiliary)

    def compare(self, image_BxE: jax.Array, text_BxE: jax.Array) -> jax.Array:
        """The contrastive loss over the global batch, a scalar."""
        if self.settings.loss == "sigmoid":
            return losses.sigmoid(image_BxE, text_BxE, self.scale(), self.logit_bias[0])
        return losses.info_nce(image_BxE, text_BxE, self.scale())

    def encode_image(self, image_BxHxWx3: jax.Array, keep_BxK: jax.Array | None = None) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of uint8 pictures, or of their patches at the positions given."""
        return self.embed_patches(patchify(image_BxHxWx3, self.settings.image.patch_size), keep_BxK)

    def features(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """What probes are fitted on: the pooled f32 tower output [B, width], before projection and normalisation."""
        return self.image(patchify(image_BxHxWx3, self.settings.image.patch_size))

    def embed_patches(self, patch_BxLxP: jax.Array, keep_BxK: jax.Array | None) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of the patches at the positions `keep_BxK` (None: of all)."""
        return normalise(self.image_projection(self.image(patch_BxLxP, keep_BxK)))

    def encode_text(self, token_BxT: jax.Array, keep_BxK: jax.Array | None = None) -> jax.Array:
        """Normalised f32 embeddings [B, embed_dim] of int32 tokens, 0 being padding, or of those at `keep_BxK`."""
        return normalise(self.text_projection(self.text(token_BxT, keep_BxK)))

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


def normalise(x_BxE: jax.Array) -> jax.Array:
    """Each row over its norm. A row of zeros, the mean of no token, stays what it is, and its gradient finite."""
    square_Bx1 = jnp.sum(x_BxE * x_BxE, axis=1, keepdims=True)
    return x_BxE / (jnp.sqrt(jnp.maximum(square_Bx1, jnp.finfo(jnp.float32).tiny)) + 1e-8)
