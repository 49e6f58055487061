"""Muon, for the weights that are matrices."""

from typing import Any

import jax
import optax
import optax.contrib


def by_muon() -> optax.GradientTransformation:
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
