"""The model that a run trains."""

from flax import nnx

from flip_jax.config import Config
from flip_jax.models.flip import FLIP


def build(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """A classifier where `config.finetune.classes` asks for one, else FLIP."""
    if config.finetune.classes:
        from flip_jax.models.classifier import Classifier

        return Classifier(config, rngs)
    return FLIP(config.model, rngs)
