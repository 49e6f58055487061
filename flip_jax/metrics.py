"""What a run reports: metrics.jsonl always, other writers (see writers.py) as there are any, and a progress line."""

import json
import os
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from flip_jax import writers
from flip_jax.config import Config

# Peak bf16 FLOP/s of one device as jax counts them (a TPU v2 or v3 device is one core). Makers' data sheets.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """Peak bf16 FLOP/s of all devices of the run, or None for a kind that is not in the table."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] * jax.device_count() if known else None


class Writer:
    """Adds to WORKDIR/metrics.jsonl, and gives to the other writers; on all processes but the first it does nothing.

    Lines of steps after `step` (of a run that was killed and goes on from there) are dropped first.
    """

    def __init__(self, workdir: epath.Path, step: int, config: Config):
        self._path, self.others = None, []
        if jax.process_index():
            return
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._text = "".join(line + "\n" for line in lines if step_of(line) <= step)
        self._path.write_text(self._text)
        self.others = writers.open_writers(workdir, config)

    def write(self, step: int, scalars: Mapping[str, float]):
        """One line {"step": step, name: value, ...}."""
        if self._path:
            line = json.dumps({"step": step, **scalars}) + "\n"
            self._text += line
            if "://" in os.fspath(self._path):  # nothing is added to what is in an object store
                self._path.write_text(self._text)
            else:
                with open(self._path, "a") as file:
                    file.write(line)
        for other in self.others:
            other.write_scalars(step, scalars)

    def draw(self, step: int, histograms: Mapping[str, np.ndarray], images: Mapping[str, np.ndarray]):
        """Arrays of any shape whose values are counted, and uint8 pictures [N, S, S, 3], for the other writers."""
        for other in self.others:
            other.write_histograms(step, histograms)
            other.write_images(step, images)

    def close(self):
        """Flushes and closes the other writers."""
        for other in self.others:
            other.close()


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut short by a kill."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


class Progress:
    """Rate, time left and MFU of the steps since the last report."""

    def __init__(self, flops_per_sample: float, batch_size: int, step: int, total_steps: int):
        self._flops, self._peak = flops_per_sample, peak_flops()
        self._batch_size, self._total_steps = batch_size, total_steps
        self._step, self._time = step, time.perf_counter()

    def report(self, step: int) -> dict[str, float]:
        """{"images_per_second", "seconds_left", and "mfu" where the device's peak is known} since the last call."""
        now = time.perf_counter()
        rate = (step - self._step) * self._batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        report = {"images_per_second": rate, "seconds_left": (self._total_steps - step) * self._batch_size / rate}
        if self._peak:
            report["mfu"] = rate * self._flops / self._peak
        return report

    def exclude(self, seconds: float):
        """Leaves `seconds` (of an evaluation, say) out of the next report."""
        self._time += seconds


def progress_line(step: int, total_steps: int, scalars: Mapping[str, float]) -> str:
    """What a person follows on the terminal."""
    minutes, seconds = divmod(round(scalars["seconds_left"]), 60)
    mfu = f"  mfu {scalars['mfu']:.1%}" if "mfu" in scalars else ""
    scale = f"scale {scalars['logit_scale']:.2f}  " if "logit_scale" in scalars else ""
    return (
        f"step {step}/{total_steps}  samples {scalars['samples_seen']:,}  loss {scalars['loss']:.4f}  "
        f"{scale}lr {scalars['learning_rate']:.3g}  "
        f"{scalars['images_per_second']:,.0f} images/s{mfu}  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )


def write_parameters(workdir, params):
    """Replaced when the metrics are merged."""
