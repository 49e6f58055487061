"""What a model in training sees and says: a few pictures as the mask leaves them, and the logits of a few pairs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.models import vit
from flip_jax.models.flip import FLIP

PAIRS = 64  # whose logits are taken, or one for each part of the batch where there are more of these
PICTURES = 8
GREY = 225  # of what is removed


def kept_patches(image_SxSx3: np.ndarray, position_K: np.ndarray, patch_size: int) -> np.ndarray:
    """The uint8 picture with all patches but those at the positions in light grey."""
    side = len(image_SxSx3) // patch_size
    shown = np.isin(np.arange(side**2), position_K).reshape(side, side)
    return np.where(np.kron(shown, np.ones((patch_size, patch_size), bool))[:, :, None], image_SxSx3, np.uint8(GREY))


class Snapshot:
    """A program of its own beside the train step, compiled at the first call."""

    def __init__(self, graphdef: nnx.GraphDef, config: Config, mesh: Mesh):
        settings = config.model

        def look(params, image_BxHxWx3, token_BxT, key):
            model: FLIP = nnx.merge(graphdef, params)
            masks = model.masks(image_BxHxWx3, token_BxT, key)
            image_BxE, text_BxE, _ = model.encode_pairs(image_BxHxWx3, token_BxT, masks)
            logit_BxB = model.scale() * jnp.einsum("ie,te->it", image_BxE, text_BxE)
            if settings.loss == "sigmoid":
                logit_BxB += model.logit_bias[0]
            picture_NxSxSx3 = vit.resized(settings.image, image_BxHxWx3[:PICTURES])
            return logit_BxB, picture_NxSxSx3, None if masks[0] is None else masks[0][:PICTURES]

        self._look = jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._mesh, self._config = mesh, config

    def __call__(self, params: Any, batch: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Histograms {"logits/pairs", "logits/others"} and images {"masks": uint8 [N, S, S, 3]} of a training batch.

        The first pairs of each process's `batch`, masked anew as in training. With several processes all call it.
        """
        shards = sharding.batch_shards(self._mesh)
        own = max(1, shards // jax.process_count())
        rows = own * min(len(batch["image"]) // own, -(-PAIRS // shards))
        arrays = sharding.to_devices(self._mesh, batch["image"][:rows], batch["text"][:rows])
        key = jax.random.fold_in(jax.random.key(self._config.seed), step)
        logit_BxB, image_NxSxSx3, position_NxK = jax.device_get(self._look(params, *arrays, key))
        if position_NxK is not None:
            patch_size = self._config.model.image.patch_size
            pairs = zip(image_NxSxSx3, position_NxK, strict=True)
            image_NxSxSx3 = np.stack([kept_patches(image, position, patch_size) for image, position in pairs])
        pair = np.eye(len(logit_BxB), dtype=bool)
        return {"logits/pairs": logit_BxB[pair], "logits/others": logit_BxB[~pair]}, {"masks": image_NxSxSx3}
