"""Run flip_jax's side of step_time.py. It imports only what a train step needs, no recipes and no input pipeline.

usage: python -m benchmarks.own_step MODEL BATCH SETTING MASK,MASK...

BATCH 0 is 32 on CPUs, elsewhere the largest that fits. SETTING is empty or one KEY=VALUE of ModelConfig: attention,
whose default is cuDNN's on GPUs, remat, or unroll, whose default is True on CPUs.
"""

import ast
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from flip_jax import config as config_lib
from flip_jax import memory, metrics, models, runtime, sharding, train_step
from flip_jax.config import Config, ImageConfig, ModelConfig, TextConfig

RATIOS = (0.0, 0.5, 0.75)
# The sizes of configs/flip_b16.py and flip_l16.py, one that CPUs can train, and one to rehearse a call with.
MODELS = {
    "tiny": ModelConfig(
        image=ImageConfig(image_size=64, width=64, depth=2, heads=2),
        text=TextConfig(context_length=8, width=32, depth=2, heads=2),
        embed_dim=32,
    ),
    "vit_s16": ModelConfig(
        image=ImageConfig(width=384, depth=12, heads=6), text=TextConfig(width=256, depth=4, heads=4), embed_dim=384
    ),
    "flip_b16": ModelConfig(),
    "flip_l16": ModelConfig(
        image=ImageConfig(width=1024, depth=24, heads=16),
        text=TextConfig(width=768, depth=12, heads=12),
        embed_dim=768,
    ),
}
PROBES = 64, 128  # batches from whose memory that of others is extrapolated


def device() -> str:
    """Return the device's name in the results of benchmarks."""
    return f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def largest(peaks: tuple[int, int], limit: float) -> int:
    """Double PROBES[0] while it fits into `limit` bytes, if PROBES need `peaks` and memory is linear."""
    by_row = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    batch = PROBES[0]
    while peaks[0] + by_row * (2 * batch - PROBES[0]) <= limit:
        batch *= 2
    return batch


def largest_batch(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Return the largest batch that fits without masking and leaves a tenth of the memory free."""
    limit = (1 - memory.SPARE) * jax.local_devices()[0].memory_stats()["bytes_limit"]
    return largest(in_parallel(lambda batch: memory.peak_bytes(compiled(model, batch, 0.0, mesh)[1]), PROBES), limit)


def in_parallel(function: Callable, values: Iterable) -> tuple:
    """Return the results of `function` for `values`, one thread each, because XLA compiles on one core for long."""
    with ThreadPoolExecutor() as threads:
        return tuple(threads.map(function, values))


def configuration(model: ModelConfig, batch: int, ratio: float) -> Config:
    """Return the settings of a run with the mask ratio."""
    image = dataclasses.replace(model.image, mask_ratio=ratio)
    return Config(global_batch_size=batch, model=dataclasses.replace(model, image=image))


def compiled(model: ModelConfig, batch: int, ratio: float, mesh: jax.sharding.Mesh):
    """Return the program of a run with the mask ratio, and its compiled step."""
    config = configuration(model, batch, ratio)
    with jax.set_mesh(mesh):
        program = train_step.make_program(config, mesh)
    return program, memory.lower(program, config, mesh).compile()


def settings(name: str, change: str) -> ModelConfig:
    """Return a model of MODELS with the defaults of this device and one KEY=VALUE changed."""
    backend = jax.default_backend()
    defaults = {"unroll": backend == "cpu", "attention": "cudnn" if backend == "gpu" else "xla"}
    key, _, value = change.partition("=")
    changed = {key: ast.literal_eval(value) if value in ("True", "False") else value} if change else {}
    dtype = "float32" if backend == "cpu" else "bfloat16"
    return dataclasses.replace(MODELS[name], dtype=dtype, **defaults | changed)


def main(name: str, batch: str, change: str, masks: str) -> None:
    runtime.enable_compile_cache()
    on_cpu, mesh = jax.default_backend() == "cpu", sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    model, ratios = settings(name, change), [float(mask) for mask in masks.split(",")]
    with jax.set_mesh(mesh):
        size = int(batch) or (32 if on_cpu else largest_batch(model, mesh))
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (size, model.image.image_size, model.image.image_size, 3), np.uint8)
        text = rng.integers(1, 30_000, (size, model.text.context_length), np.int32)
        image, text = sharding.to_devices(mesh, image, text)
        built = dict(zip(ratios, in_parallel(lambda ratio: compiled(model, size, ratio, mesh), ratios), strict=True))
        state = built[ratios[0]][0].init()  # masking does not change it, so all programs share one state

        def stepper(step):
            def run(times: int) -> None:
                nonlocal state
                for _ in range(times):
                    state, report = step(state, image, text)
                jax.block_until_ready((state, report))

            return run

        programs = {str(ratio): stepper(step) for ratio, (_, step) in built.items()}
        peak = metrics.peak_flops()
        if on_cpu:
            square, multiply = jnp.ones((turns.PRODUCT, turns.PRODUCT)), jax.jit(jnp.matmul)
            programs["product"] = lambda times: jax.block_until_ready([multiply(square, square) for _ in range(times)])
        about = {
            "version": f"jax {jax.__version__}",
            "device": device(),
            "dtype": model.dtype,
            "batch": size,
            "sample_flops": {
                str(ratio): models.flops_per_sample(configuration(model, size, ratio)) for ratio in RATIOS
            },
            "product_flops": 2 * turns.PRODUCT**3,
            "peak_flops": peak and peak / jax.device_count(),
            "model": dataclasses.asdict(model),
        }
        turns.serve(about, programs)


if __name__ == "__main__":
    main(*sys.argv[1:])
