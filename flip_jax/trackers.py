"""TensorBoard, Weights & Biases and logs in object stores, each used only by the runs that ask for it.

The first two have the methods of clu's MetricWriter that a run calls: write_scalars, write_histograms, write_images and
close. They do not subclass it, because importing clu.metric_writers imports TensorFlow.
"""

import importlib.util
import logging
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from flip_jax import config_check
from flip_jax.config import Config
from flip_jax.runtime import is_remote

_log = logging.getLogger(__name__)

OBJECT_BYTES = 2**16  # about 100 lines of metrics


def open_trackers(workdir: epath.Path, step: int, config: Config) -> list[Any]:
    """Opens TensorBoard where tensorboardX is installed, and Weights & Biases where a project is named."""
    opened: list[Any] = []
    if importlib.util.find_spec("tensorboardX") is None:
        _log.info("TensorBoard is off: pip install tensorboardX turns it on")
    else:
        opened.append(TensorBoard(workdir, step))
    if config.log.wandb:
        opened.append(WeightsAndBiases(workdir, config))
    return opened


class ObjectLog:
    """Adds to an object store, where nothing can be appended to an object: to PREFIX-000001SUFFIX, -000002 and so on.

    A flush sends the last object again until it holds `OBJECT_BYTES`, so that the bytes sent in all grow linearly with
    those written. Numbers continue after those of the objects that are there already.
    """

    def __init__(self, prefix: str, suffix: str = ""):
        self._prefix, self._suffix = prefix, suffix
        self._data, self._changed = b"", False
        folder, name = os.path.split(prefix)
        ours = re.compile(re.escape(name) + r"-(\d{6,})" + re.escape(suffix))
        found = filter(None, (ours.fullmatch(path.name) for path in epath.Path(folder).glob(f"{name}-*{suffix}")))
        self._number = max((int(match[1]) for match in found), default=0) + 1

    def write(self, data: bytes) -> None:
        self._data += data
        self._changed = True

    def flush(self) -> None:
        """Sends what was written since the last full object, if there is anything new."""
        if not self._changed:
            return
        epath.Path(f"{self._prefix}-{self._number:06}{self._suffix}").write_bytes(self._data)
        self._changed = False
        if len(self._data) >= OBJECT_BYTES:
            self._number, self._data = self._number + 1, b""

    def close(self) -> None:
        self.flush()


class TensorBoard:
    """Writes event files to the workdir with tensorboardX; events after `step`, the step resumed from, are hidden."""

    def __init__(self, workdir: epath.Path, step: int):
        import tensorboardX

        folder = os.fspath(workdir)
        if is_remote(folder):
            # tensorboardX knows only gs and s3, needs a package for each, and sends the whole file at every flush.
            tensorboardX.record_writer.register_writer_factory(folder.split(":")[0], _EventObjects)
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            self._writer.add_histogram(name, array, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, array in images.items():
            self._writer.add_images(name, array, step, dataformats="NHWC")

    def close(self) -> None:
        self._writer.close()


class _EventObjects:
    """The two functions that tensorboardX asks a kind of storage for."""

    @staticmethod
    def open(path: str) -> ObjectLog:
        return ObjectLog(path)

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: an object store has no folders to create."""


class WeightsAndBiases:
    """A run of Weights & Biases, resumed whenever the run in `workdir` is resumed.

    Without WANDB_MODE nothing leaves the machine: the run is kept in WORKDIR/wandb, and `wandb sync` uploads it.
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
            dir=None if is_remote(workdir) else os.fspath(workdir),
            config=config_check.flatten(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: self._wandb.Histogram(array) for name, array in arrays.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: [self._wandb.Image(image) for image in row] for name, row in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
