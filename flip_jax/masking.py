"""Which image patches stay. A strategy is one function and its name in `STRATEGIES`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def keep_count(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible: rounded down, as the official code does."""
    return int(patches * (1 - mask_ratio))


def smallest(noise: jax.Array, keep: int) -> jax.Array:
    """Positions [B, keep] of the smallest values of each row of `noise` [B, L], in rising order of the noise."""
    return jnp.argsort(noise, axis=1)[:, :keep]


def random(key: jax.Array, patches: jax.Array, keep: int) -> jax.Array:
    """A uniformly random subset for each picture of `patches` [B, L, ...]; int32 positions [B, keep]. Paper, section 3.

    The noise depends on the key and the row in the global batch only, not on how the batch is split over devices.
    """
    return smallest(jax.random.uniform(key, patches.shape[:2]), keep)


STRATEGIES: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {"random": random}
