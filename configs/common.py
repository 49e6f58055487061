"""The base recipe, the tower sizes of the paper, and the variants of a recipe.

A recipe's `get_config(arg)` takes what follows a colon: variants and "key=value" with dotted keys, separated by commas:
`--config=configs/flip_l16.py:unmasked,model.image.mask_ratio=0.25,seed=1`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict, FieldReference

from flip_jax import config_check
from flip_jax.config import Config
from flip_jax.runtime import UserError

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


def unmasked(config: ConfigDict) -> None:
    """Sets the paper's unmasked tuning of trained weights (`init_from`): 128 million samples, fresh optimizer.

    The weights may come from another image or patch size: the paper tunes its L/14 from L/16.
    """
    config.model.image.mask_ratio = 0.0
    config.optim.base_learning_rate = 4e-8
    config.warmup_samples = 25_600_000
    config.total_samples = 128_000_000


def tuned(config: ConfigDict) -> None:
    """Sets the pre-training, in whole steps, and its `unmasked` tuning as one run; `:laion2b` must come before it."""
    batch = config.global_batch_size
    lengths = (samples // batch * batch for samples in (config.total_samples, 128_000_000))
    tuning = "model.image.mask_ratio=0,optim.base_learning_rate=4e-8,warmup_samples=25_600_000,optim.state=fresh"
    config.stages = "{};{}:{}".format(*lengths, tuning)


def laion2b(config: ConfigDict) -> None:
    """Sets the rate and length of the long LAION-2B runs (official code): half the rate, 25.6 billion samples."""
    config.optim.base_learning_rate = 2e-6
    config.total_samples = 25_600_000_000


def runlocal(config: ConfigDict) -> None:
    """Sets a short run of the recipe's very model on any machine: 20 steps of 16 of the embedded emoji."""
    size = 64 if config.model.image.image_size <= 64 else 224
    config.data.train = f"tfds:emoji/{size}/train"
    config.init_from, config.init_model = "", False
    config.global_batch_size = 16
    config.microbatches = 1
    config.mesh.fsdp = config.mesh.tensor = 1
    config.total_samples = 20 * 16
    if config.stages:
        from flip_jax import stages

        config.stages = stages.shortened(config.stages, 10 * 16)
    config.warmup_samples = 5 * 16
    config.optim.learning_rate = 2e-4
    config.eval.tasks = ()
    config.eval.every_steps = config.checkpoint.every_steps = 0
    config.log.every_steps = 2
    if config.finetune.classes:
        config.finetune.classes = 1890


LOCAL = {"runlocal": runlocal}  # of every recipe
VARIANTS = {"unmasked": unmasked, "tuned": tuned, "laion2b": laion2b, **LOCAL}  # of a pre-training recipe


def with_arg(
    config: ConfigDict, arg: str | None, variants: Mapping[str, Callable[[ConfigDict], None]] = VARIANTS
) -> ConfigDict:
    """Applies "VARIANT,key=value,key=value" in this order; values are JSON, or else plain strings.

    Raises:
      UserError: a part that is neither a variant nor key=value, or an unknown key.
    """
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if part in variants:
            variants[part](config)
            continue
        if not equals:
            known = f"a variant ({', '.join(variants)}) or " if variants else ""
            raise UserError(f"--config=...:{arg}: {part!r} must be {known}key=value")
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node.get(group) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or leaf not in node:
            raise UserError(f"{config_check.unknown(key) or f'config.{key} is unknown'}, in --config=...:{arg}")
        try:
            value = json.loads(config_check.integral(text) if isinstance(node[leaf], int) else text)
        except json.JSONDecodeError:
            value = text
        node[leaf] = float(value) if isinstance(node[leaf], float) and isinstance(value, int) else value
    return config
