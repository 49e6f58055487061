"""Measure what each masking strategy costs a train step, compared with random masking at equal tokens.

usage: python -m benchmarks.masking_cost [ROUNDS [BATCH]]

One process times all strategies in turn, round after round, so that a slow minute of the machine affects all of them.
Prints one JSON line per strategy: the step's FLOPs by XLA's count and its median time; both relative to random masking,
for times the median of the rounds' ratios and the ratio of the fastest, which a busy machine disturbs less; and the
additional time of choosing (or resizing) alone, as a share of the step with random masking. Images are masked to 49 of
196 patches with whole captions, or captions to 16 of 32 tokens with images masked at random. The model is small: in a
larger one a strategy takes a smaller share.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from flip_jax import masking, memory, sharding, train_step
from flip_jax.config import Config, ImageConfig, MeshConfig, ModelConfig, TextConfig

REPEATS = 5  # of choosing alone, which is quick
MODEL = ModelConfig(
    image=ImageConfig(image_size=224, patch_size=16, width=384, depth=4, heads=6, mask_ratio=0.75),
    text=TextConfig(vocab_size=30_523, context_length=32, width=256, depth=2, heads=4),
    embed_dim=256,
    dtype="float32",
    unroll=True,
)


def models() -> dict[tuple[str, str], ModelConfig]:
    """Return the model with each strategy under (masked tower, strategy); random comes first."""
    found = {}
    for tower, strategies in (("image", (*masking.STRATEGIES, "resize")), ("text", masking.TEXT_STRATEGIES)):
        for name in sorted(strategies, key=lambda name: name != "random"):
            ratio = {"image": 0.75, "text": 0.5}[tower]
            masked = dataclasses.replace(getattr(MODEL, tower), mask=name, mask_ratio=ratio)
            found[tower, name] = dataclasses.replace(MODEL, **{tower: masked})
    return found


def chooser(model: ModelConfig, image: np.ndarray, text: np.ndarray) -> Callable[[], float]:
    """Return a function that measures the seconds of choosing, or resizing, what the towers see."""
    see = jax.jit(functools.partial(masking.see, model))
    compiled = see.lower(jax.random.key(0), image, text).compile()

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready([compiled(jax.random.key(0), image, text) for _ in range(REPEATS)])
        return (time.perf_counter() - start) / REPEATS

    return seconds


def main(rounds: str = "20", batch: str = "16") -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (int(batch), 224, 224, 3), np.uint8)
    text = (30_000 * rng.random((int(batch), 32)) ** 4).astype(np.int32) + 1  # few words are frequent
    text[np.arange(32)[None] >= rng.integers(4, 33, (int(batch), 1))] = 0
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        image, text = sharding.to_devices(mesh, image, text)
        steps, choosers = {}, {}
        for key, model in models().items():
            config = Config(global_batch_size=int(batch), model=model)
            program = train_step.make_program(config, mesh)
            steps[key] = memory.lower(program, config, mesh).compile()
            choosers[key] = chooser(model, image, text)
            print(f"compiled {'/'.join(key)}", file=sys.stderr, flush=True)
        state, times = program.init(), {key: [] for key in steps}
        for _ in range(1 + int(rounds)):
            for key, step in steps.items():
                start = time.perf_counter()
                state = jax.block_until_ready(step(state, image, text))[0]
                times[key].append((time.perf_counter() - start, choosers[key]()))
    times = {key: np.array(values[1:]).T for key, values in times.items()}  # the first round warms up
    flops = {key: step.cost_analysis()["flops"] for key, step in steps.items()}
    for key, (own, alone) in times.items():
        base = (key[0], "random")
        random, random_alone = times[base]
        row = {
            "tower": key[0],
            "mask": key[1],
            "gflop": round(flops[key] / 1e9, 3),
            "flops_of_random": round(flops[key] / flops[base], 4),
            "seconds": round(float(np.median(own)), 4),
            "time_of_random": round(float(np.median(own / random)), 3),
            "fastest_of_random": round(float(own.min() / random.min()), 3),
            "choosing_beyond_random": round(float((alone.min() - random_alone.min()) / random.min()), 4),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
