"""FLIP: fast language-image pre-training with masked patches, in JAX."""

from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.inference import Encoder, load
from flip_jax.models.flip import FLIP

__all__ = ["FLIP", "Config", "Encoder", "Tokenizer", "load"]
