"""Measure loading on one core at 224 pixels, next to open_clip and tf.data: images per second, and memory.

usage: python -m benchmarks.input_pipeline 'SHARDS/{00000..00001}.tar' [--open_clip_python=PYTHON]
       [--tensorflow_python=PYTHON] [--rounds=3] [--seconds=10]

PYTHON is the Python of an environment with open_clip, or with TensorFlow. In each round every loader runs in its own
process, one after the other, on the same core; ratios are medians over rounds. Images per core second use the processor
time of all threads, so other work on the machine matters little. Prints JSON lines.
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
from flip_jax.data import pipeline, sources
from flip_jax.data.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parent.parent
WINDOW, RECORD = 10_000, 25_000  # records, and bytes of each, where memory is measured


def flip_jax(pattern, window=peer_loaders.WINDOW, threads=1):
    """Yield endless batches (images, tokens) from the whole training loader."""
    config = Config(
        global_batch_size=peer_loaders.BATCH,
        model=ModelConfig(
            image=ImageConfig(image_size=peer_loaders.SIZE), text=TextConfig(context_length=peer_loaders.TOKENS)
        ),
        data=DataConfig(train=f"webdataset:{pattern}", shuffle_window=window, threads=threads),
    )
    tokenizer = Tokenizer.train(pipeline.caption_sample(config, 2000), 5000)
    for batch in pipeline.train_dataset(config, tokenizer, process_index=0, process_count=1):
        yield batch["image"], batch["text"]


def memory(batches):
    """Return the peak resident size of this process in bytes after two windows of records."""
    for _ in range(2 * WINDOW // peer_loaders.BATCH):
        next(batches)
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def write_shards(folder):
    """Write four tars of 3,000 records with distinct keys and captions and few distinct images of `RECORD` bytes."""
    images = []
    for seed in range(8):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))
        out = io.BytesIO()
        noise.resize((320, 320), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        images.append(out.getvalue().ljust(RECORD, b"\0"))  # decoders stop at the end of the image
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(3000):
                for extension, data in (("jpg", images[i % 8]), ("txt", b"an image of number %d" % i)):
                    info = tarfile.TarInfo(f"{i:05}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def run(command, core=None):
    """Run a command, on one core if given, and return the JSON that it prints."""
    before = os.sched_getaffinity(0)
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        os.sched_setaffinity(0, before)
    return json.loads(done.stdout.splitlines()[-1])


def show(row):
    print(
        json.dumps({key: round(value, 2) if type(value) is float else value for key, value in row.items()}), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--open_clip_python")
    parser.add_argument("--tensorflow_python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--worker", choices=("speed", "memory"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        if flags.worker == "speed":
            print(json.dumps(peer_loaders.measure(flip_jax(flags.shards), flags.seconds)))
        else:
            print(json.dumps(memory(flip_jax(flags.shards, WINDOW, threads=0))))
        sys.stdout.flush()
        os._exit(0)
    own = [sys.executable, "-m", "benchmarks.input_pipeline"]
    paths = sources.open_source(f"webdataset:{flags.shards}", DataConfig(), "SHARDS").paths
    loaders = {"flip_jax": [*own, flags.shards, "--worker=speed", f"--seconds={flags.seconds}"]}
    for name, python in (("open_clip", flags.open_clip_python), ("tensorflow", flags.tensorflow_python)):
        if python:
            loaders[name] = [python, "benchmarks/peer_loaders.py", name, str(flags.seconds), *paths]
    core, rounds = min(os.sched_getaffinity(0)), {name: [] for name in loaders}
    for _ in range(flags.rounds):
        for name, command in loaders.items():
            found = run(command, core)
            speeds = {"images_per_core_second": found["images"] / found["cpu_seconds"]}
            speeds["images_per_second"] = found["images"] / found["seconds"]
            rounds[name].append(speeds)
            show({"loader": name} | speeds)
    for name in list(loaders)[1:]:
        pairs = list(zip(rounds["flip_jax"], rounds[name], strict=True))
        show(
            {"ratio_to": name}
            | {key: statistics.median(ours[key] / peer[key] for ours, peer in pairs) for key in speeds}
        )
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder))
        show(run([*own, f"{folder}/{{0..3}}.tar", "--worker=memory"]))


if __name__ == "__main__":
    main()
