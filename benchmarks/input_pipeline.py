"""Measure loading at 224 pixels, next to open_clip and tf.data: images per second and core, and memory.

usage: python -m benchmarks.input_pipeline 'SHARDS/{00000..00001}.tar' [--open_clip_python=PYTHON]
       [--tensorflow_python=PYTHON] [--rounds=3] [--seconds=10]

PYTHON is the Python of an environment with open_clip, or with TensorFlow. In each round every loader runs in its own
process, one after the other: without workers on one core, with one and two workers on all. Images per core second use
the processor time of all threads and workers, so other work on the machine matters little. Prints JSON lines; ratios
are medians over rounds. Then follow the table of docs/performance.md, the cores that a host needs by the steps of
docs/scale.md, and the memory that loading takes.
"""

import argparse
import io
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile

import numpy as np
from PIL import Image

from benchmarks import peer_loaders
from flip_jax.config import Config, DataConfig, ImageConfig, ModelConfig, TextConfig
from flip_jax.data import pipeline, sources, vocabulary

ROOT = pathlib.Path(__file__).parent.parent
WINDOW, RECORD = 10_000, 25_000  # records, and bytes of each, where memory is measured
WORKERS = sorted({0, 1, 2, max(2, len(os.sched_getaffinity(0)) - 1)})  # the last: a run's default on many cores
CHIPS = {"v3": 8, "v4": 4, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 8}  # devices of a host with four chips


def flip_jax(pattern, workers, size=peer_loaders.SIZE, window=peer_loaders.WINDOW, threads=1):
    """Yield endless batches (images, tokens) from the whole training loader."""
    config = Config(
        global_batch_size=peer_loaders.BATCH,
        model=ModelConfig(image=ImageConfig(image_size=size), text=TextConfig(context_length=peer_loaders.TOKENS)),
        data=DataConfig(train=f"webdataset:{pattern}", shuffle_window=window, workers=workers, threads=threads),
    )
    tokenizer = vocabulary.train(vocabulary.caption_sample(config, 2000), 5000)
    for batch in pipeline.train_dataset(config, tokenizer, process_index=0, process_count=1):
        yield batch["image"], batch["text"]


def memory(batches):
    """Return the peak resident sizes of this process and of its largest worker, after two windows of records."""
    for _ in range(2 * WINDOW // peer_loaders.BATCH):
        next(batches)
    peaks = [0]
    for child in peer_loaders.children():
        status = pathlib.Path(f"/proc/{child}/status").read_text()
        peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_rss_bytes": own, "worker_peak_rss_bytes": max(peaks)}


def write_shards(folder, images, records):
    """Write tars of so many records with distinct keys and captions and few distinct images."""
    for shard, count in enumerate(records):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(count):
                for extension, data in (("jpg", images[i % len(images)]), ("txt", b"an image of number %d" % i)):
                    info = tarfile.TarInfo(f"{i:05}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def noise(size, length=0):
    """Encode eight images of noise, each padded to so many bytes."""
    images = []
    for seed in range(8):
        pixels = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))
        out = io.BytesIO()
        pixels.resize((size, size), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        images.append(out.getvalue().ljust(length, b"\0"))  # decoders stop at the end of the image
    return images


def run(command, cores):
    """Run a command on these cores, and return the JSON that it prints."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        os.sched_setaffinity(0, before)
    return json.loads(done.stdout.splitlines()[-1])


def show(row):
    print(
        json.dumps({key: round(value, 2) if type(value) is float else value for key, value in row.items()}), flush=True
    )


def speeds(found):
    """Return the speeds that follow from a measurement."""
    return {
        "images_per_second": found["images"] / found["seconds"],
        "images_per_core_second": found["images"] / found["cpu_seconds"],
        "main_microseconds_per_image": 1e6 * found["main_seconds"] / found["images"],
    }


def compare(name, ours, theirs):
    """Show the medians of the ratios of two loaders."""
    pairs = list(zip(ours, theirs, strict=True))
    show({"ratio": name} | {key: statistics.median(one[key] / other[key] for one, other in pairs) for key in ours[0]})


def cores_table(page, per_core, hand_on):
    """Return a Markdown table of images per second and cores, for a host of four chips, by the steps of a page."""
    cells, recipes = {}, {}
    for line in page.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if len(row) < 9 or not row[2].isdecimal() or row[5] != "yes":
            continue
        recipe, chip = f"`{row[0]}`, mask {row[3]}", row[1].partition("-")[0]
        images = 65_536 / (float(row[8]) / 1000) / int(row[2]) * CHIPS[chip]
        recipes[recipe] = True
        above = "" if images < hand_on else " (more than one process hands on)"
        cells.setdefault((recipe, chip), f"{images:,.0f}: {np.ceil(images / per_core):.0f}{above}")
    lines = [["recipe", *CHIPS], ["---"] * (1 + len(CHIPS))]
    lines += [[recipe, *(cells.get((recipe, chip), "") for chip in CHIPS)] for recipe in recipes]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--open_clip_python")
    parser.add_argument("--tensorflow_python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--measure", choices=("speed", "memory", "hand_on"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        if flags.measure == "memory":
            found = memory(flip_jax(flags.shards, flags.workers, window=WINDOW, threads=0))
        else:
            size = 16 if flags.measure == "hand_on" else peer_loaders.SIZE
            found = peer_loaders.measure(flip_jax(flags.shards, flags.workers, size), flags.seconds)
        print(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)
    own = [sys.executable, "-m", "benchmarks.input_pipeline"]
    paths = sources.open_source(f"webdataset:{flags.shards}", DataConfig(), "SHARDS").paths
    loaders = {}
    for workers in WORKERS:
        name, count = f"{workers} workers", str(workers)
        loaders[f"flip_jax, {name}"] = [*own, flags.shards, "--measure=speed", f"--workers={count}"]
        loaders[f"flip_jax, {name}"].append(f"--seconds={flags.seconds}")
        for peer, python in (("open_clip", flags.open_clip_python), ("tensorflow", flags.tensorflow_python)):
            if python:
                loaders[f"{peer}, {name}"] = [python, "benchmarks/peer_loaders.py", peer, count, str(flags.seconds)]
                loaders[f"{peer}, {name}"] += paths
    cores, rounds = os.sched_getaffinity(0), {name: [] for name in loaders}
    for _ in range(flags.rounds):
        for name, command in loaders.items():
            found = speeds(run(command, {min(cores)} if name.endswith(" 0 workers") else cores))
            rounds[name].append(found)
            show({"loader": name} | found)
    ours = rounds[f"flip_jax, {max(WORKERS)} workers"]
    compare(f"flip_jax, {max(WORKERS)} workers to 1", ours, rounds["flip_jax, 1 workers"])
    for name in loaders:
        if not name.startswith("flip_jax"):
            same = f"flip_jax, {name.partition(', ')[2]}"
            compare(f"{same} to {name}", rounds[same], rounds[name])
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder), noise(16), [10_000] * 4)
        command = [*own, f"{folder}/{{0..3}}.tar", "--measure=hand_on", f"--workers={max(WORKERS)}"]
        found = [speeds(run([*command, f"--seconds={flags.seconds}"], cores)) for _ in range(flags.rounds)]
    main_time = statistics.median(one["main_microseconds_per_image"] for one in found)
    show({"main_microseconds_per_image of 16 px": main_time, "images_per_second at most": 1e6 / main_time})
    per_core = statistics.median(one["images_per_core_second"] for one in ours)
    print(cores_table((ROOT / "docs" / "scale.md").read_text(), per_core, 1e6 / main_time), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder), noise(320, RECORD), [3000] * 4)
        for workers in (0, max(WORKERS)):
            found = run([*own, f"{folder}/{{0..3}}.tar", "--measure=memory", f"--workers={workers}"], cores)
            show({"memory with workers": workers} | found)


if __name__ == "__main__":
    main()
