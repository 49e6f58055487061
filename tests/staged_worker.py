"""A run in a process of its own, which a test kills."""

import os
import sys

from xla_options import COMPILE_FAST, DEVICES

from flip_jax import train
from flip_jax.config import Config


def run(config: Config, workdir: str, devices: int) -> None:
    """Trains on CPUs as devices, without a word."""
    os.environ["XLA_FLAGS"] = f"{COMPILE_FAST} {DEVICES}{devices}"
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.train(config, workdir)
