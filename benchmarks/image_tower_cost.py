"""Count the FLOPs of the compiled image tower at mask 0, 0.5 and 0.75 with XLA's own cost analysis.

usage: python -m benchmarks.image_tower_cost [flip_l16]

Prints one JSON line per mask ratio: FLOPs of a forward pass, and their share of mask 0. It compiles and runs nothing.
"""

import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax import config as config_lib
from flip_jax import config_check, masking
from flip_jax.models.flip import FLIP

BATCH = 8


def tower_flops(settings: config_lib.ModelConfig) -> float:
    """Return the FLOPs of encoding a batch of images, masked as in training."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: FLIP(settings, nnx.Rngs(0))))
    size = settings.image.image_size
    image = jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))

    @jax.jit
    def encode(params, image, key):
        model = nnx.merge(graphdef, params)
        return model.encode_patches(*masking.see_image(settings.image, key, image))

    return encode.lower(params, image, key).compile().cost_analysis()["flops"]


def main(recipe: str = "flip_l16") -> None:
    model = config_check.from_config_dict(importlib.import_module(f"configs.{recipe}").get_config()).model
    # The analysis counts the body of a loop once, whatever its trip count.
    model = dataclasses.replace(model, unroll=True)
    whole = None
    for ratio in (0.0, 0.5, 0.75):
        flops = tower_flops(dataclasses.replace(model, image=dataclasses.replace(model.image, mask_ratio=ratio)))
        whole = whole or flops
        row = {"recipe": recipe, "mask_ratio": ratio, "flops": flops / BATCH, "share": round(flops / whole, 4)}
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
