"""Where a run's metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, each loaded only if it is used.

A writer has these methods of clu's: write_scalars, write_histograms, write_images and close.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from flip_jax import config_check
from flip_jax.config import Config

_log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Raises ValueError where the run asks for a writer whose package is missing."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"config.log.wandb {config.log.wandb!r} needs Weights & Biases, which is not installed: pip install wandb, "
            "or leave it empty"
        )


def open_writers(workdir: epath.Path, config: Config) -> list[Any]:
    """TensorBoard's writer where clu's can be imported, and that of Weights & Biases where a project is named."""
    opened = []
    try:
        import tensorflow as tf  # which training does without
        from clu import metric_writers
    except ImportError:
        _log.info("TensorBoard is off: clu's writer needs TensorFlow (pip install tensorflow tensorboard)")
    else:
        tf.config.set_visible_devices([], "GPU")  # or it would take the memory of them all
        opened.append(metric_writers.SummaryWriter(os.fspath(workdir)))
    if config.log.wandb:
        opened.append(WeightsAndBiases(workdir, config))
    return opened


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on where the workdir's does.

    Without WANDB_MODE nothing leaves the machine: the run lies in WORKDIR/wandb, and `wandb sync` uploads it.
    """

    def __init__(self, workdir: epath.Path, config: Config):
        import wandb

        self._wandb, identity = wandb, workdir / "wandb_id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=config.log.wandb,
            id=identity.read_text(),
            name=workdir.name,
            dir=None if "://" in os.fspath(workdir) else os.fspath(workdir),
            config=config_check.flatten(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        self._run.log(dict(scalars), step=step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]):
        self._run.log({name: self._wandb.Histogram(array) for name, array in arrays.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]):
        self._run.log({name: [self._wandb.Image(image) for image in row] for name, row in images.items()}, step=step)

    def close(self):
        self._run.finish()
