"""What each masking strategy costs a train step, against random masking at equal tokens.

usage: python -m benchmarks.masking_cost [ROUNDS [BATCH]]

One process times all strategies in turn, round after round, so that a slow minute of the machine meets all of them.
One JSON line for each: the step's FLOPs by XLA's count and its median time; both against random's, for times the median
of the rounds' ratios and the ratio of the fastest, which a busy machine disturbs less; and the time of choosing (or
resizing) alone beyond random's, as a share of random's step. Pictures are masked to 49 of 196 patches with whole
captions, or captions to 16 of 32 tokens with pictures masked at random. The model is small: of a larger one a strategy
takes a smaller share.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from flip_jax import masking, sharding, train_step
from flip_jax.config import Config, ImageConfig, MeshConfig, ModelConfig, TextConfig
from flip_jax.models import vit
from flip_jax.models.flip import FLIP

REPEATS = 5  # of choosing alone, which is quick
MODEL = ModelConfig(
    image=ImageConfig(image_size=224, patch_size=16, width=384, depth=4, heads=6, mask_ratio=0.75),
    text=TextConfig(vocab_size=30_523, context_length=32, width=256, depth=2, heads=4),
    embed_dim=256,
    dtype="float32",
    unroll=True,
)


def models() -> dict[tuple[str, str], ModelConfig]:
    """The model with each strategy, by the tower that is masked and the strategy's name; random comes first."""
    found = {}
    for tower, strategies in (("image", (*masking.STRATEGIES, "resize")), ("text", masking.TEXT_STRATEGIES)):
        for name in sorted(strategies, key=lambda name: name != "random"):
            ratio = {"image": 0.75, "text": 0.5}[tower]
            masked = dataclasses.replace(getattr(MODEL, tower), mask=name, mask_ratio=ratio)
            found[tower, name] = dataclasses.replace(MODEL, **{tower: masked})
    return found


def chooser(model: ModelConfig, image: np.ndarray, text: np.ndarray) -> Callable[[], float]:
    """A function that says how many seconds masks, and smaller pictures where they are resized, take to make."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: FLIP(model, nnx.Rngs(0))))

    @jax.jit
    def choose(key, image, text):
        masks = nnx.merge(graphdef, params).masks(image, text, key)
        return masks, vit.resized(model.image, image) if model.image.mask == "resize" else None

    compiled = choose.lower(jax.random.key(0), image, text).compile()

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
            steps[key] = train_step.lower(program, config, mesh).compile()
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
