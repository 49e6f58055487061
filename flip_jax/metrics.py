"""The metrics of a run: metrics.jsonl, the trackers that are installed or asked for, and a progress line."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from flip_jax.config import Config
from flip_jax.runtime import UserError, is_remote

# Peak bf16 FLOP/s of one device as JAX counts them, from data sheets (a TPU v3 or TPU7x chip is two devices).
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """Returns the peak bf16 FLOP/s of all devices of the run, or None for a kind that is not in the table."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] * jax.device_count() if known else None


def check(config: Config) -> None:
    """Raises UserError where the run asks for Weights & Biases and its package is missing."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.log.wandb {config.log.wandb!r} needs Weights & Biases, which is not installed: pip install wandb, "
            "or leave it empty"
        )


def write_parameters(workdir: epath.Path, params: Mapping[str, Any]) -> None:
    """Writes name, shape, type, size and sharding of each parameter, and their total, to WORKDIR/parameters.txt.

    `params` is a nested dict of arrays, or of their shapes; only the first process writes.
    """
    if jax.process_index() == 0:
        from clu import parameter_overview  # slow to import

        # Statistics of the values would need all processes and a fetch of every parameter.
        table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
        (workdir / "parameters.txt").write_text(table + "\n")


class Writer:
    """Writes a run's metrics to WORKDIR/metrics.jsonl and to its trackers, in the first process only.

    An object store gets metrics-000001.jsonl and so on instead, see `trackers.ObjectLog`. When a run resumes at `step`,
    lines of later steps, which are trained again, are dropped first.
    """

    def __init__(self, workdir: epath.Path, step: int, config: Config):
        self._file: str | None = None
        self._objects: Any = None
        self.trackers: list[Any] = []
        if jax.process_index():
            return
        from flip_jax import trackers  # only this process needs them

        if any(workdir.glob("metrics*.jsonl")):
            from flip_jax import metrics_file

            metrics_file.drop_after(workdir, step)
        if is_remote(workdir):
            self._objects = trackers.ObjectLog(os.fspath(workdir / "metrics"), ".jsonl")
        else:
            self._file = os.fspath(workdir / "metrics.jsonl")
        self.trackers = trackers.open_trackers(workdir, step, config)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line {"step": step, name: value, ...}."""
        line = json.dumps({"step": step, **scalars}) + "\n"
        if self._file:
            with open(self._file, "a") as file:
                file.write(line)
        if self._objects:
            self._objects.write(line.encode())
            self._objects.flush()
        for tracker in self.trackers:
            tracker.write_scalars(step, scalars)

    def draw(self, step: int, histograms: Mapping[str, np.ndarray], images: Mapping[str, np.ndarray]) -> None:
        """Gives the trackers arrays of any shape, shown as histograms, and uint8 images [N, H, W, 3]."""
        for tracker in self.trackers:
            tracker.write_histograms(step, histograms)
            tracker.write_images(step, images)

    def close(self) -> None:
        """Flushes and closes the trackers."""
        for tracker in self.trackers:
            tracker.close()


class Progress:
    """Measures rate, time left and MFU of the steps since the last report."""

    def __init__(self, step: int, total_steps: int):
        self._step, self._total_steps, self._peak = step, total_steps, peak_flops()
        self._pauses: dict[str, tuple[int, list[float]]] = {}

    def begin(self, flops_per_sample: float, batch_size: int, last: int, later_flops: float = 0) -> None:
        """Begins the steps of one program, up to `last`; those after it are to take their share of FLOPs in time."""
        self._flops, self._batch_size, self._last = flops_per_sample, batch_size, last
        self._later, self._time = later_flops / flops_per_sample, time.perf_counter()

    def report(self, step: int) -> dict[str, float]:
        """Returns images_per_second since the last call, mfu if the peak is known, and seconds_left with pauses due."""
        now = time.perf_counter()
        rate = (step - self._step) * self._batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        left, total = ((self._last - step) * self._batch_size + self._later) / rate, self._total_steps
        for every, seconds in self._pauses.values():  # those at `step` itself follow the report
            due = total // every - (step - 1) // every + (total % every > 0) if every else 1  # the last step has one
            left += due * sum(seconds) / len(seconds)
        report = {"images_per_second": rate, "seconds_left": left}
        if self._peak:
            report["mfu"] = rate * self._flops / self._peak
        return report

    @contextlib.contextmanager
    def pause(self, kind: str, every: int) -> Iterator[None]:
        """Excludes an evaluation or a save, due at every so many steps and at the last one, from the rate."""
        before = time.perf_counter()
        yield
        seconds = time.perf_counter() - before
        self._time += seconds
        self._pauses.setdefault(kind, (every, []))[1].append(seconds)


def progress_line(step: int, total_steps: int, scalars: Mapping[str, float], stage: str = "") -> str:
    """Formats the line that a person follows on the terminal; its rate is the next update's, as the first one is 0."""
    minutes, seconds = divmod(round(scalars["seconds_left"]), 60)
    mfu = f"  mfu {scalars['mfu']:.1%}" if "mfu" in scalars else ""
    rate = scalars["images_per_second"]
    scale = f"scale {scalars['logit_scale']:.2f}  " if "logit_scale" in scalars else ""
    return (
        f"step {step}/{total_steps}  {stage}samples {scalars['samples_seen']:,}  "
        f"loss {scalars['loss']:.4f}  {scale}lr {scalars['next_learning_rate']:.3g}  "
        f"{rate:,.{1 if rate < 10 else 0}f} images/s{mfu}  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )
