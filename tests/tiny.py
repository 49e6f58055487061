"""A model and a batch small enough to compile in seconds, for tests of everything that is not their size."""

import dataclasses

import numpy as np

from flip_jax.config import Config, ImageTower, Model, Optim, TextTower

MODEL = Model(
    image=ImageTower(image_size=32, patch_size=8, width=32, depth=2, heads=4, mask_ratio=0.5),
    text=TextTower(vocab_size=64, context_length=8, width=32, depth=2, heads=4),
    embed_dim=16,
    dtype="float32",
)
CONFIG = Config(
    seed=3,
    global_batch_size=16,
    total_samples=160,
    warmup_samples=32,
    model=MODEL,
    optim=Optim(base_learning_rate=2e-4 * 16),
)


def batch(rows=16, seed=0):
    """Random pictures [rows, 32, 32, 3] uint8 and tokens [rows, 8] int32 with padding."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, 32, 32, 3), np.uint8)
    text = rng.integers(1, 64, (rows, 8)).astype(np.int32)
    text[np.arange(8)[None] >= rng.integers(1, 9, rows)[:, None]] = 0
    return image, text


def model_with(**changes):
    """`MODEL` with changed image ("image_KEY"), text ("text_KEY") or own settings."""
    image = {key.removeprefix("image_"): changes.pop(key) for key in list(changes) if key.startswith("image_")}
    text = {key.removeprefix("text_"): changes.pop(key) for key in list(changes) if key.startswith("text_")}
    return dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, **image),
        text=dataclasses.replace(MODEL.text, **text),
        **changes,
    )
