"""FLIP: the two towers, their projections into one space, and the scale of the logits."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.text as text
import flip_jax.models.transformer as transformer
import flip_jax.models.vit as vit
from flip_jax import losses, masking
from flip_jax.config import ModelConfig
from flip_jax.masking import View

MAX_SCALE = 100.0


class FLIP(nnx.Module):
    """Contrastive image-text model. Parameters are f32; `config.dtype` is the type of the towers' arithmetic."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = vit.VisionTransformer(config, rngs)
        self.text = text.TextTransformer(config, rngs)
        both = config.projection == "both"
        self.image_projection = _projection(config.image.width, config.embed_dim, rngs) if both else None
        self.text_projection = _projection(config.text.width, config.embed_dim, rngs, use_bias=not both)
        self.logit_scale = nnx.Param(jnp.full((1,), math.log(config.init_logit_scale)), axes=("norm",))
        if config.decoder.weight:
            from flip_jax.models.decoder import Decoder

            self.decoder = Decoder(config, rngs)
        if config.loss == "sigmoid":
            # Most pairs do not match: without it the first steps would only learn that (SigLIP, arXiv 2303.15343).
            self.logit_bias = nnx.Param(jnp.full((1,), -10.0), axes=("norm",))

    def encode_pairs(self, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encodes what a training step sees: both embeddings, and a scalar to add to the contrastive loss."""
        token_BxTxD = self.image.tokens(view.patch_BxKxP, view.position_BxK)
        image_BxE = self._embed_image(self.image.pool(token_BxTxD))
        text_BxE = self.encode_text(view.token_BxK, view.token_position_BxK)
        if not self.config.decoder.weight:
            return image_BxE, text_BxE, jnp.float32(0)
        reconstruction = self.decoder(token_BxTxD, view.position_BxK, view.all_BxLxP)
        return image_BxE, text_BxE, self.config.decoder.weight * reconstruction

    def compare(self, image_BxE: jax.Array, text_BxE: jax.Array) -> jax.Array:
        """Computes the contrastive loss over the global batch, a scalar."""
        if self.config.loss == "sigmoid":
            return losses.sigmoid(image_BxE, text_BxE, self.scale(), self.logit_bias[0])
        return losses.info_nce(image_BxE, text_BxE, self.scale())

    def encode_image(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Returns normalised f32 embeddings [B, embed_dim] of whole uint8 images."""
        return self.encode_patches(masking.patchify(image_BxHxWx3, self.config.image.patch_size))

    def encode_patches(self, patch_BxKxP: jax.Array, position_BxK: jax.Array | None = None) -> jax.Array:
        """Returns normalised f32 embeddings [B, embed_dim] of patches at these positions (None: a whole image's)."""
        return self._embed_image(self.image(patch_BxKxP, position_BxK))

    def _embed_image(self, pooled_BxD):
        return normalise(pooled_BxD if self.image_projection is None else self.image_projection(pooled_BxD))

    def encode_text(self, token_BxK: jax.Array, position_BxK: jax.Array | None = None) -> jax.Array:
        """Returns normalised f32 embeddings [B, embed_dim] of int32 tokens, 0 being padding, at these positions."""
        return normalise(self.text_projection(self.text(token_BxK, position_BxK)))

    def features(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Returns the features for probes: the pooled f32 tower output [B, width], before the projection."""
        return self.image(masking.patchify(image_BxHxWx3, self.config.image.patch_size))

    def scale(self) -> jax.Array:
        """Returns the factor of the cosines: exp(logit_scale), which is clipped to [1, 100] before a softmax."""
        if self.config.loss == "sigmoid":
            return jnp.exp(self.logit_scale[0])  # which has no bounds: released models use 117 (SigLIP)
        # Not jnp.clip, whose gradient at a bound may change: minimum and maximum halve it there (official).
        return jnp.exp(jnp.minimum(jnp.maximum(self.logit_scale[0], 0), math.log(MAX_SCALE)))


def _projection(inputs: int, outputs: int, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        kernel_init=transformer.xavier,
        dtype=jnp.float32,
        rngs=rngs,
        kernel_metadata={"axes": ("embed", None)},
        bias_metadata={"axes": (None,)},
    )


def normalise(x_BxE: jax.Array) -> jax.Array:
    """Divides each row by its norm. A row of zeros, the mean of no token, stays zero, and its gradient finite."""
    square_Bx1 = jnp.sum(x_BxE * x_BxE, axis=1, keepdims=True)
    return x_BxE / (jnp.sqrt(jnp.maximum(square_Bx1, jnp.finfo(jnp.float32).tiny)) + 1e-8)
