"""What tests of whole runs share: the command line of a tiny run, its environment and what it leaves behind."""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from conftest import DEVICES, REPO

import flip_jax


def arguments(shards, workdir, **changes):
    """The command line of a run of 24 steps of 32 samples with a tiny model."""
    settings = {
        "data.train": f"webdataset:{shards}/{{00000..00001}}.tar",
        "data.shuffle_window": 50,
        "model.image.image_size": 32,
        "model.image.patch_size": 8,
        "model.image.mask_ratio": 0.5,
        **{
            f"model.{tower}.{key}": v
            for tower in ("image", "text")
            for key, v in (("width", 32), ("depth", 2), ("heads", 4))
        },
        "model.embed_dim": 16,
        "model.text.vocab_size": 100,
        "model.text.context_length": 8,
        "model.dtype": "float32",
        "optim.base_learning_rate": 0.01,
        "global_batch_size": 32,
        "total_samples": 768,
        "warmup_samples": 128,
        "checkpoint.every_steps": 5,
        "log.every_steps": 4,
        **changes,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "main.py", "--config=configs/flip_b16.py", f"--workdir={workdir}", *flags]


# The runs of these tests share few programs: what one compiles, the others load.
CACHE = tempfile.TemporaryDirectory(prefix="flip_jax-compiled-")


def environment(devices=1):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{DEVICES}{devices}",
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }


def run(command, check=True, **env):
    done = subprocess.run(command, cwd=REPO, env=environment(**env), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def final_params(workdir, step=24):
    return flip_jax.load(workdir / "checkpoints" / str(step)).params


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def leaves(tree):
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [np.asarray(tree)]
