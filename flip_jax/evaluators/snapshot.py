"""A look at a model in training: a few images as the mask leaves them, and the logits of a few pairs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import masking, sharding
from flip_jax.config import Config
from flip_jax.models.flip import FLIP

PAIRS = 64  # pairs whose logits are shown, or one per device where there are more devices
IMAGES = 8
GREY = 225  # of the patches that are not seen, where they are drawn


class Snapshot:
    """A program of its own next to the train step, compiled at the first call."""

    def __init__(self, graphdef: nnx.GraphDef, config: Config, mesh: Mesh):
        def look(params, image_BxHxWx3, token_BxT, key):
            model: FLIP = nnx.merge(graphdef, params)
            view = masking.see(config.model, key, image_BxHxWx3, token_BxT)
            image_BxE, text_BxE, _ = model.encode_pairs(view)
            logit_BxB = model.scale() * jnp.einsum("ie,te->it", image_BxE, text_BxE)
            if config.model.loss == "sigmoid":
                logit_BxB += model.logit_bias[0]
            return (
                logit_BxB,
                view.patch_BxKxP[:IMAGES],
                None if view.position_BxK is None else view.position_BxK[:IMAGES],
            )

        self._look = jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._mesh, self._config = mesh, config

    def __call__(self, params: Any, batch: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Histograms {"logits/pairs", "logits/others"} and images {"masks": uint8 [N, S, S, 3]} of a training batch.

        They are the first pairs of each process's `batch`, under masks of its own. With several processes all call it.
        """
        shards = sharding.batch_shards(self._mesh)
        own = max(1, shards // jax.process_count())
        rows = own * min(len(batch["image"]) // own, -(-PAIRS // shards))
        arrays = sharding.to_devices(self._mesh, batch["image"][:rows], batch["text"][:rows])
        key = jax.random.fold_in(jax.random.key(self._config.seed), step)
        logit_BxB, patch_NxKxP, position_NxK = jax.device_get(self._look(params, *arrays, key))
        image = self._config.model.image
        positions = [None] * len(patch_NxKxP) if position_NxK is None else position_NxK
        grid = image.image_size // image.patch_size
        seen = [unpatchify(*pair, grid) for pair in zip(patch_NxKxP, positions, strict=True)]
        pair = np.eye(len(logit_BxB), dtype=bool)
        return {"logits/pairs": logit_BxB[pair], "logits/others": logit_BxB[~pair]}, {"masks": np.stack(seen)}


def unpatchify(patch_KxP: np.ndarray, position_K: np.ndarray | None, grid: int) -> np.ndarray:
    """Draws visible patches as a uint8 image [S, S, 3] of `grid` x `grid` patches, the others in light grey.

    Without positions the patches are all those of an image, which may be smaller (mask "resize").
    """
    if position_K is None:
        grid, position_K = math.isqrt(len(patch_KxP)), np.arange(len(patch_KxP))
    side = math.isqrt(patch_KxP.shape[1] // 3)
    patch_LxP = np.full((grid**2, patch_KxP.shape[1]), GREY, np.uint8)
    patch_LxP[position_K] = patch_KxP
    return patch_LxP.reshape(grid, grid, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(grid * side, grid * side, 3)
