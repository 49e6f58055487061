"""The variants of recipes, and settings that follow a recipe's colon. Imported only where something does."""

import json
from collections.abc import Sequence

from ml_collections import ConfigDict

from flip_jax import config_check
from flip_jax.runtime import UserError


def apply(config: ConfigDict, arg: str, variants: Sequence[str]) -> None:
    """Applies "VARIANT,key=value,key=value" in this order; values are JSON, or else plain strings.

    Raises:
      UserError: a part that is neither one of `variants` nor key=value, or an unknown key.
    """
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if part in variants:
            KNOWN[part](config)
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


def clip_layout(config: ConfigDict) -> None:
    """Sets the layout of OpenAI's CLIP; its text tower needs CLIP's byte pairs as data.vocab, which end each text."""
    image, text = config.model.image, config.model.text
    image.pool, image.patch_bias, image.positions, image.pre_norm = "cls", False, "learned", True
    image.pixel_stats = "openai"
    text.pool, text.causal, text.vocab_size, text.context_length = "last", True, 49_408, 77


KNOWN = {variant.__name__: variant for variant in (unmasked, tuned, laion2b, runlocal, clip_layout)}
