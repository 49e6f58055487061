"""The pool of SigLIP's image tower: a learned probe attends to the patches (arXiv 2303.15343, as in big_vision)."""

import jax
import jax.numpy as jnp
from flax import nnx

import flip_jax.models.transformer as transformer
from flip_jax.config import ModelConfig
from flip_jax.runtime import UserError


class MapHead(nnx.Module):
    """Multi-head attention of one probe to all tokens, then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        tower, self.dtype, self.activation = config.image, jnp.dtype(config.dtype), config.activation
        self.heads, width, hidden = tower.heads, tower.width, tower.mlp_width or 4 * tower.width
        self.probe = nnx.Param(transformer.xavier(rngs.params(), (1, 1, width)), axes=(None, None, "norm"))
        self.query = transformer.dense((width, width), ("embed", "heads"), transformer.xavier, self.dtype, rngs)
        self.key = transformer.dense((width, width), ("embed", "heads"), transformer.xavier, self.dtype, rngs)
        self.value = transformer.dense((width, width), ("embed", "heads"), transformer.xavier, self.dtype, rngs)
        self.out = transformer.dense((width, width), ("heads", "embed"), transformer.xavier, self.dtype, rngs)
        self.norm = transformer.layer_norm(width, config, rngs)
        self.mlp1 = transformer.dense((width, hidden), ("embed", "mlp"), transformer.xavier, self.dtype, rngs)
        self.mlp2 = transformer.dense((hidden, width), ("mlp", "embed"), transformer.xavier, self.dtype, rngs)

    def __call__(self, token_BxTxD: jax.Array) -> jax.Array:
        """Pools tokens: f32 [B, width]."""
        x = token_BxTxD.astype(self.dtype)
        probe = jnp.broadcast_to(self.probe[...].astype(self.dtype), (x.shape[0], 1, x.shape[2]))
        query, key, value = (
            layer(y).reshape(*y.shape[:2], self.heads, -1)
            for layer, y in ((self.query, probe), (self.key, x), (self.value, x))
        )
        x = self.out(jax.nn.dot_product_attention(query, key, value).reshape(probe.shape))
        x = x + self.mlp2(transformer.ACTIVATIONS[self.activation](self.mlp1(self.norm(x))))
        return x[:, 0].astype(jnp.float32)


def check(model: ModelConfig) -> None:
    """Raises UserError for settings that SigLIP's parts do not go with."""
    if model.projection == "text" and model.image.width != model.embed_dim:
        raise UserError(
            "config.model.projection 'text' leaves images as wide as their tower: set config.model.embed_dim to "
            f"{model.image.width}, got {model.embed_dim}"
        )
    if model.decoder.weight and model.image.pool == "map":
        raise UserError(
            "config.model.decoder needs the cls token that config.model.image.pool 'map' does without: use another pool"
        )
