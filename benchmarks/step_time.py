"""Measure images per second and MFU of the train step at mask 0, 0.5 and 0.75, next to open_clip's.

usage: python -m benchmarks.step_time [--models=flip_l16,flip_b16] [--peer_python=PYTHON] [--shards=SHARDS]

PYTHON is the Python of an environment with open_clip. The data are already on the device. Both sides run the same
sizes, each in its own process. On a CPU all programs take turns, round after round. On an accelerator, whose memory
holds only one process, `plan` lists the measurements, the most telling ones first: each model at its defaults, next to
open_clip, then with one setting changed. The rows of a process are written to --results when it ends, also when it is
cut off by --seconds, SIGTERM or Ctrl-C; the last line of a row counts, and --rounds=0 only draws them. With SHARDS, the
last two minutes are for benchmarks/input_pipeline.py, whose lines go to a file next to --results.

A machine without a package index needs these as wheels, of the versions in setup.py and for its Python. Elsewhere
`pip download --no-deps --only-binary=:all: --python-version=3.12 --platform=manylinux_2_28_x86_64
--platform=manylinux_2_17_x86_64 -d wheels NAME...`, there `pip install --no-index --no-deps wheels/*.whl`. Those before
the semicolons usually come with an image for CUDA; the others are 9 MB:
  the step: jax with its CUDA plugin, flax, optax, etils, absl-py, matplotlib, tqdm;
  open_clip: torch, torchvision, timm, regex, huggingface_hub, safetensors; open_clip_torch, ftfy, wcwidth
  the input: fsspec, orbax-checkpoint, tensorstore, tokenizers, pillow; grain, array_record, ftfy, wcwidth, simplejpeg,
    cykooz-resizer, google-crc32c, portpicker
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from benchmarks import pages, turns

KEYS = ("device", "model", "batch", "framework", "setting", "mask")  # what a row is known by
INPUT_SECONDS = 120  # kept for the input pipeline
OFFICIAL = ("2 CPU cores", "vit_s16", 32)  # device, model and batch of what OFFICIAL_NOTE compares with
HEADER = """# Lab notes on performance

What users need is in [performance.md](../performance.md). The table is written by
`python -m benchmarks.step_time --peer_python=PYTHON`: one train step (forward, backward, AdamW) on random data that are
already on the device, flip_jax next to open_clip with patch dropout at the same sizes and batch, in alternation in the
same call. Medians over rounds, with the fastest and the slowest in brackets. On CPUs in f32, with as many threads as
cores, `model.unroll`, and the malloc settings of that page; elsewhere in bf16, open_clip compiled. `vit_s16` is
ViT-S/16 at 224 px with a text tower of 256 x 4 layers. FLOPs are the model's, without recompute; MFU is their rate as
a share of the data sheet's bf16 peak, and on CPUs as a share of the median rate of XLA's f32 product of 2,048 x 2,048
matrices in the same rounds. The paper reports, for L/16 on TPU v3 and batches that double from mask to mask, times of
1.00 / 0.50 / 0.33 and FLOPs of 1.00 / 0.52 / 0.28.
{official}
![Images per second and time per step](../images/step_time.png)

| device | model | batch | | mask | images/s | ms per step | MFU | time vs mask 0 | FLOPs vs mask 0 | x open_clip |
|---|---|---|---|---|---|---|---|---|---|---|
"""
OFFICIAL_NOTE = """
The official code (t5x on jax 0.4.13, f32) was measured once, outside this script, at the sizes of the CPU rows on a
machine of the same kind: 18.5 / 8.2 to 9.0 / 4.2 s per step at mask 0 / 0.5 / 0.75, which is 1.7 / 3.6 to 3.9 / 7.6
images/s. In another call on that machine open_clip reached 4.5 / 9.7 / 18: the official code has about 0.4 of its
speed. Compare these ratios, not images/s, because the speed of these machines drifts.
"""


class Case(NamedTuple):
    """Programs that take turns: those of `sides`, each (framework, changed setting of flip_jax), at each of `masks`."""

    model: str
    sides: tuple[tuple[str, str], ...]
    masks: tuple[float, ...]


class Measured(NamedTuple):
    """What a side of a model reports about itself, and the seconds of its rounds by mask, and by "product"."""

    about: dict
    times: dict[str, list[float]]


def plan(models: list[str], backend: str) -> list[Case]:
    """List what is measured, in order."""
    own, peer = ("flip_jax", ""), ("open_clip", "")
    if backend == "cpu":
        return [Case(model, (own, peer), (0.0, 0.5, 0.75)) for model in models]
    first = [[Case(model, (own,), (0.0, 0.5, 0.75)), Case(model, (peer,), (0.5,))] for model in models]
    changes = ["remat=dots", "attention=xla", "unroll=True"] if backend == "gpu" else ["remat=dots", "unroll=True"]
    changed = [[Case(model, (("flip_jax", change),), (0.5,)) for change in changes] for model in models]
    last = [[Case(model, (peer,), (mask,)) for mask in (0.0, 0.75)] for model in models]
    return sum(first + changed + last, [])


def summarise(model: str, sides: dict[tuple[str, str], Measured]) -> list[dict]:
    """Return a row for each framework, setting and mask of a model that was measured."""
    products = {  # FLOP/s
        side: about["product_flops"] / float(np.median(times["product"]))
        for side, (about, times) in sides.items()
        if times.get("product")
    }
    rows = []
    for side, (about, times) in sides.items():
        peak = about["peak_flops"] or products.get(("flip_jax", ""))  # unknown for some GPUs
        for mask, seconds in times.items():
            if mask == "product" or not seconds:
                continue
            rate = about["batch"] / float(np.median(seconds))
            row = {key: about[key] for key in ("device", "dtype")} | {"model": model, "batch": about["batch"]}
            if side in products:
                row["product_tflops"] = products[side] / 1e12
            row |= {"framework": side[0], "setting": side[1], "mask": float(mask), "rounds": len(seconds)}
            row |= {"seconds": float(np.median(seconds)), "fastest": min(seconds), "slowest": max(seconds)}
            row |= {"images_per_second": rate, "mfu": rate * about["sample_flops"][mask] / peak if peak else None}
            row |= {"peak_tflops": peak / 1e12 if peak else None}
            row["flops_of_unmasked"] = about["sample_flops"][mask] / about["sample_flops"]["0.0"]
            row["time_of_unmasked"] = ratio(seconds, times.get("0.0"))
            peer = sides.get(("open_clip", ""))
            if side[0] == "flip_jax" and peer and (speed := ratio(peer.times.get(mask), seconds)):
                row["speed_of_open_clip"] = speed * about["batch"] / peer.about["batch"]
            else:
                row["speed_of_open_clip"] = None
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def ratio(above: list[float] | None, below: list[float] | None) -> float | None:
    """Return the median of the ratios of the rounds that both have."""
    return float(np.median([a / b for a, b in zip(above, below, strict=False)])) if above and below else None


def measure(
    case: Case, batch: int, peer_python: str | None, rounds: int, sides: dict[tuple[str, str], Measured]
) -> None:
    """Add to `sides`, those of the case's model, for `summarise`; they are usable even if an exception ends this early.

    open_clip gets the sizes and the batch that flip_jax's side at its defaults reports.
    """
    workers = {}
    masks = ",".join(str(mask) for mask in case.masks)
    try:
        for side in case.sides:
            framework, change = side
            about = sides["flip_jax", ""].about if ("flip_jax", "") in sides else {}
            if framework == "flip_jax":
                # Another policy may leave room for more rows; otherwise two compilations would find the same number.
                size = batch if change.startswith("remat") else about.get("batch", batch)
                command = [sys.executable, "-m", "benchmarks.own_step", case.model, str(size), change, masks]
            elif peer_python and about:
                command = [peer_python, "-m", "benchmarks.open_clip_step", json.dumps(about), masks]
            else:
                continue
            workers[side] = turns.Worker(command)
            sides.setdefault(side, Measured(about | workers[side].about, {}))
        for _ in tqdm(range(rounds), desc=f"{case.model}: {' and '.join(map(' '.join, workers))}"):
            for side, worker in workers.items():
                for name in worker.about["programs"]:
                    sides[side].times.setdefault(name, []).append(worker.seconds(name))
    finally:
        for worker in workers.values():
            worker.close()


def newest(lines: list[dict]) -> list[dict]:
    """Return the last line of each row."""
    return list({tuple(line[key] for key in KEYS): line for line in lines}.values())


def write_table(lines: list[dict], path: pathlib.Path) -> None:
    """Write the page with a row for each of `lines`."""
    shown = any(tuple(line[key] for key in KEYS[:3]) == OFFICIAL for line in lines)
    text = HEADER.format(official=OFFICIAL_NOTE if shown else "")
    for line in lines:
        times = (1000 * line[key] for key in ("seconds", "fastest", "slowest"))
        cells = [line["device"], line["model"], str(line["batch"]), name(line), f"{line['mask']:g}"]
        cells += [f"{line['images_per_second']:.1f}", "{:.0f} ({:.0f} to {:.0f})".format(*times)]
        cells += ["" if line["mfu"] is None else f"{line['mfu']:.0%}"]
        keys = ("time_of_unmasked", "flops_of_unmasked", "speed_of_open_clip")
        cells += ["" if line[key] is None else f"{line[key]:.2f}" for key in keys]
        text += f"| {' | '.join(cells)} |\n"
    pages.write(path, text)


def name(line: dict) -> str:
    """Return the label of a row."""
    return ", ".join(filter(None, (line["framework"], line["setting"])))


def draw(lines: list[dict], path: pathlib.Path) -> None:
    """Draw images per second, and step times next to FLOPs: a row of panels for each device, model and batch."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in KEYS[:3]), []).append(line)
    figure, grid = plt.subplots(len(groups), 2, figsize=(10, 3.6 * len(groups)), squeeze=False, layout="constrained")
    for (group, own), (speed, time) in zip(groups.items(), grid, strict=True):
        masks, bars = sorted({line["mask"] for line in own}), {}
        for line in own:
            bars.setdefault(name(line), {})[line["mask"]] = line["images_per_second"]
        for label in bars:
            points = [(line["mask"], line["time_of_unmasked"]) for line in own if name(line) == label]
            time.plot(*zip(*sorted(point for point in points if point[1]), strict=True), marker="o", label=label)
        for i, (label, values) in enumerate(bars.items()):
            places = [masks.index(mask) + 0.27 * i for mask in values]
            speed.bar_label(speed.bar(places, values.values(), 0.25, label=label), fmt="%.3g", fontsize=8)
        middle = 0.27 * (len(bars) - 1) / 2
        speed.set_xticks([i + middle for i in range(len(masks))], [f"mask {mask:g}" for mask in masks])
        speed.set(ylabel="images/s", title="{1}, batch {2}, {0}".format(*group))
        flops = {line["mask"]: line["flops_of_unmasked"] for line in own}
        time.plot(*zip(*sorted(flops.items()), strict=True), "k--", label="FLOPs")
        time.set(xlabel="mask", ylabel="of mask 0", ylim=(0, 1.05), title="time of a step")
        time.grid(alpha=0.3)
        speed.legend()
        time.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def out_of_time(*_) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", help="entries of own_step.MODELS (default: vit_s16 on CPUs, else flip_l16,flip_b16)"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="rows of a batch (0: 32 on CPUs, else the largest power of two that fits)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer_python", help="Python of an environment with open_clip")
    parser.add_argument("--shards", help="tars for benchmarks/input_pipeline.py")
    parser.add_argument("--seconds", type=int, default=570, help="skip what is not measured after this time")
    parser.add_argument("--results", type=pathlib.Path, default="docs/step_time.jsonl", help="one line per row")
    parser.add_argument("--table", type=pathlib.Path, default="docs/notes/performance.md", help="the page to write")
    parser.add_argument("--chart", type=pathlib.Path, default="docs/images/step_time.png", help="the chart to draw")
    arguments = parser.parse_args()
    plt.switch_backend("agg")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    backend = default_backend()
    if backend == "cpu":
        turns.keep_memory()
    names = arguments.models or ("vit_s16" if backend == "cpu" else "flip_l16,flip_b16")
    sides: dict[str, dict] = {name: {} for name in names.split(",")}
    written: list[dict] = []
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what ends a call does not cost its rows
    signal.alarm(arguments.seconds - (INPUT_SECONDS if arguments.shards else 0))
    try:
        for case in plan(list(sides), backend) if arguments.rounds else ():
            own = sides[case.model]
            try:
                measure(case, arguments.batch, arguments.peer_python, arguments.rounds, own)
            except RuntimeError as error:  # what one process cannot do must not cost the rows of the others
                print(error, file=sys.stderr)
            finally:
                rows = [row for row in summarise(case.model, own) if row not in written]
                written += rows
                pages.append(arguments.results, rows)
                print("".join(json.dumps(row) + "\n" for row in rows), end="", flush=True)
    except TimeoutError:
        print(f"--seconds={arguments.seconds} have passed: the rest is skipped", file=sys.stderr)
    signal.alarm(0)
    if arguments.shards:
        measure_input(arguments.shards, arguments.results.with_suffix(".input.jsonl"))
    lines = newest(pages.read(arguments.results))
    write_table(lines, arguments.table)
    draw(lines, arguments.chart)


def measure_input(shards: str, path: pathlib.Path) -> None:
    """Write to `path` what benchmarks/input_pipeline.py prints within INPUT_SECONDS, and print it."""
    command = [sys.executable, "-m", "benchmarks.input_pipeline", shards, "--rounds=1", "--seconds=5"]
    with path.open("w") as file:
        process = subprocess.Popen(command, cwd=turns.ROOT, stdout=file, start_new_session=True)
        try:
            process.wait(INPUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            print(error, file=sys.stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                os.killpg(process.pid, signal.SIGINT)  # its loaders, too
            process.wait()
    print(path.read_text(), end="", flush=True)


def default_backend() -> str:
    """Return JAX's backend; another process looks, so that this one holds none of the device's memory."""
    look = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(look, stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
