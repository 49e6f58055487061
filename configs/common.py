"""The base recipe and the tower sizes of the paper.

A recipe's `get_config(arg)` takes what follows a colon: variants and "key=value" with dotted keys, separated by commas:
`--config=configs/flip_l16.py:unmasked,model.image.mask_ratio=0.25,seed=1`.
"""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict, FieldReference

from flip_jax.config import Config

# width, depth and heads of the image and text towers, and the embedding. Paper, section 4.
SIZES = {
    "b": ((768, 12, 12), (512, 12, 8), 512),
    "l": ((1024, 24, 16), (768, 12, 12), 768),
    "h": ((1280, 32, 16), (1024, 24, 16), 1024),
}


def get_config(size: str = "b", patch_size: int = 16, mask_ratio: float = 0.5) -> ConfigDict:
    """Builds the paper's pre-training: 12.8 billion samples at a batch of 65,536; warm-up five times as long for H."""
    # A number or "auto", whichever the recipe or the command line gives.
    anything = FieldReference("auto", field_type=object)
    config = ConfigDict(dataclasses.asdict(Config()) | {"microbatches": anything})
    for tower, sizes in zip((config.model.image, config.model.text), SIZES[size][:2], strict=True):
        tower.width, tower.depth, tower.heads = sizes
    config.model.embed_dim = SIZES[size][2]
    config.model.image.patch_size = patch_size
    config.model.image.mask_ratio = mask_ratio
    config.model.remat = "auto"
    if size == "h":
        config.warmup_samples = 256_000_000
        config.mesh.fsdp = 8  # a TPU v3 core does not hold the parameters and moments of all layers
    return config


LOCAL = ("runlocal",)  # the variants of every recipe: functions of configs/variants.py
VARIANTS = ("unmasked", "tuned", "laion2b", *LOCAL)  # those of a pre-training recipe


def with_arg(config: ConfigDict, arg: str | None, variants: Sequence[str] = VARIANTS) -> ConfigDict:
    """Applies what follows the colon, see `variants.apply`."""
    if arg:
        from configs import variants as known

        known.apply(config, arg, variants)
    return config
