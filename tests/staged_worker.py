"""A run in a process of its own, which a test kills."""

import os
import sys

import jax
from helpers import COMPILE_FAST, DEVICES

from flip_jax import train
from flip_jax.config import Config


def run(config: Config, workdir: str, devices: int, cache: str) -> None:
    """Trains on CPUs as devices, without a word, with the programs that earlier runs compiled."""
    os.environ["XLA_FLAGS"] = f"{COMPILE_FAST} {DEVICES}{devices}"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.train(config, workdir)
