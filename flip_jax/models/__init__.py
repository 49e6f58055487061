"""The model that a run trains."""

from flax import nnx

from flip_jax.config import Config
from flip_jax.models.flip import FLIP


def build(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a classifier if `config.finetune.classes` is set, else FLIP."""
    if config.finetune.classes:
        from flip_jax.models.classifier import Classifier

        return Classifier(config, rngs)
    return FLIP(config.model, rngs)


def flops_per_sample(config: Config) -> float:
    """Counts the FLOPs of one training sample, forward and backward, over visible patches only.

    Matrix products only and no recompute, as model FLOP utilisation (MFU) is defined. A frozen tower has no backward.
    """
    image, text, classes = config.model.image, config.model.text, config.finetune.classes
    visible = image.visible_patches
    embed = visible * 2 * 3 * image.patch_size**2 * image.width
    project = 2 * image.width * classes if classes else 2 * (image.width + text.width) * config.model.embed_dim
    image_tower, text_tower = (
        tower.depth * tokens * 4 * tower.width * (2 * tower.width + (tower.mlp_width or 4 * tower.width) + tokens)
        for tower, tokens in ((image, visible + 1), (text, 0 if classes else text.visible_tokens))
    )
    image_times, text_times = (3.0 if rate else 1.0 for rate in (config.optim.image_rate, config.optim.text_rate))
    return image_times * (embed + image_tower) + text_times * text_tower + 3.0 * project
