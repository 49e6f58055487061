"""FLIP: fast language-image pre-training with masked patches, in JAX."""

import importlib
from typing import Any

__version__ = "0.2.0"
_MODULES = {
    "FLIP": "flip_jax.models.flip",
    "Config": "flip_jax.config",
    "Encoder": "flip_jax.inference",
    "Tokenizer": "flip_jax.data.tokenizer",
    "load": "flip_jax.inference",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports what is asked for at its first use: JAX, Flax, Orbax and Grain take seconds together."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'flip_jax' has no attribute '{name}'")
