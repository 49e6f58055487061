"""LAMB, Muon, rates that differ by tower and layer, and the constant schedule: what the paper's runs do not load."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flip_jax.config import OptimConfig
from flip_jax.optim import decay_mask

Part: TypeAlias = optax.GradientTransformation
EMBEDDING = ("patch_kernel", "patch_bias", "cls", "pos_embed", "pre_norm", "token_embed")  # the first layer of a tower


def lamb(adam: Part, decay: Part) -> tuple[Part, ...]:
    """Weights that do not decay keep AdamW's update, as in the authors' code."""
    return adam, decay, optax.masked(by_trust_ratio(), decay_mask)


def muon(adam: Part, decay: Part) -> tuple[Part, ...]:
    """Kernels of blocks and projections by Muon, embeddings, biases and norms by AdamW."""
    return optax.partition({True: by_muon(), False: adam}, is_matrix), decay


# Name -> the parts of an update before the learning rate, from AdamW's: the direction, and the decay added to it.
UPDATES: dict[str, Callable[[Part, Part], tuple[Part, ...]]] = {"lamb": lamb, "muon": muon}


def warmup_constant(peak: float, warmup_steps: float, cooldown_steps: float, total_steps: float) -> optax.Schedule:
    """Rises linearly from 0 to `peak`, stays there, and falls linearly to 0 over the last `cooldown_steps`.

    Until then the rate does not depend on `total_steps`, to the last bit.
    """

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.where(step < warmup_steps, step / max(warmup_steps, 1), 1)
        return peak * jnp.minimum(rise, jnp.clip((total_steps - step) / cooldown_steps, 0, 1) if cooldown_steps else 1)

    return schedule


def by_trust_ratio() -> Part:
    """Gives each update the norm of its weight, each layer of a stack by itself (LAMB, arXiv 1904.00962).

    The learning rate is then the change of a layer as a share of its size. A weight or an update of 0 stays as it is.
    """

    def scale(path, update, weight):
        stacked = any(key.key == "blocks" for key in path)
        axes = tuple(range(stacked, update.ndim))
        size, change = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (weight, update))
        return update * jnp.where((size > 0) & (change > 0), size / change, 1)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


def by_muon() -> Part:
    """Makes all singular values of each matrix about equal and its root mean square 1, each layer of a stack by itself.

    That is about the size of AdamW's updates, and so suits its learning rates.
    """

    def matrices(params):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

    def enlarge(updates, _):
        return jax.tree.map(lambda x: x * max(x.shape[-2:]) ** 0.5, updates)

    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=matrices), optax.stateless(enlarge))


def is_matrix(params: Any) -> Any:
    """Marks the kernels of blocks and projections."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def by_share(optimizer: Part, optim: OptimConfig) -> Part:
    """Multiplies each parameter's whole update, decay included, by its `shares`."""

    def multiply(updates, _):
        return jax.tree.map(jnp.multiply, updates, shares(updates, optim))

    return optax.chain(optimizer, optax.stateless(multiply))


def shares(params: Any, optim: OptimConfig) -> Any:
    """Returns the factor of each rate: the tower's, times `layer_decay` for each layer up to the end of the tower.

    The last norm is 0 layers from the end, the last block 1, the first as many as there are blocks, the embedding one
    more. What belongs to no tower (projections, a head, the scale) has 1.
    """
    rates = {"image": optim.image_rate, "text": optim.text_rate}

    def share(path, x):
        tower, *names = (key.key for key in path)
        if tower not in rates:
            return 1.0
        depth = len(params[tower]["transformer"]["blocks"]["norm1"]["scale"])
        if "blocks" in names:
            return (rates[tower] * optim.layer_decay ** jnp.arange(depth, 0, -1)).reshape(-1, *[1] * (x.ndim - 1))
        return rates[tower] * optim.layer_decay ** (depth + 1 if names[0] in EMBEDDING else 0)

    return jax.tree_util.tree_map_with_path(share, params)
