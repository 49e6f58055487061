"""What other libraries' names have in common: one function gives our parameters theirs, its transpose reads them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flip_jax import config_check
from flip_jax.config import ModelConfig
from flip_jax.models.flip import FLIP, MAX_SCALE
from flip_jax.runtime import UserError

LARGEST = 2**31  # of the integers in a stranger's settings; far larger ones fit into no float
Rename = Callable[[Mapping[str, Any]], dict[str, jax.Array]]  # linear: it only moves numbers


def checked(source: str, **settings: Any) -> ModelConfig:
    """Returns the model that a file of another library describes; UserError, which names it, if it cannot be built."""
    model = ModelConfig(**settings)
    try:
        config_check.from_config_dict({"model": dataclasses.asdict(model)})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return model


def abstract_params(model: ModelConfig) -> dict[str, Any]:
    """Returns the model's parameters as nested dicts of `jax.ShapeDtypeStruct`."""
    state = nnx.split(nnx.eval_shape(lambda: FLIP(model, nnx.Rngs(0))))[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))


def to_ours(
    rename: Rename,
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    file: Any,
    settings: Any,
) -> dict[str, Any]:
    """Turns arrays that `rename` would give into our parameters.

    Raises:
      UserError: names or shapes that differ; all of them are listed, with both sides.
    """
    abstract = abstract_params(model)
    expected = jax.eval_shape(rename, abstract)
    # The scale and the bias of the logits are numbers in one version and arrays of one number in another.
    scalars = [name for name in shapes.keys() & expected.keys() if np.prod(shapes[name]) == expected[name].size == 1]
    differences = [
        f"  {name}: file {shapes.get(name, 'absent')}, "
        f"settings {expected[name].shape if name in expected else 'absent'}"
        for name in sorted(shapes.keys() | expected.keys())
        if name not in scalars
        and (name not in shapes or name not in expected or tuple(shapes[name]) != expected[name].shape)
    ]
    if differences:
        raise UserError(f"{file} is not the model that {settings} describes:\n" + "\n".join(differences))
    theirs = {name: jnp.asarray(read(name).reshape(like.shape)) for name, like in expected.items()}
    # `rename` is a permutation of numbers, so its transpose is its inverse.
    (params,) = jax.linear_transpose(rename, abstract)(theirs)
    return params


def norm(name: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Names a LayerNorm as PyTorch does."""
    return {f"{name}.weight": layer["scale"], f"{name}.bias": layer["bias"]}


def dense(name: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Names a linear layer, and transposes it, as PyTorch does."""
    return {f"{name}.weight": layer["kernel"].T} | ({f"{name}.bias": layer["bias"]} if "bias" in layer else {})


def layers(stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Splits stacked parameters of blocks into those of each."""
    depth = stacked["norm1"]["scale"].shape[0]
    parts = jax.tree.map(lambda x: [y.reshape(y.shape[1:]) for y in jax.lax.split(x, [1] * depth)], stacked)
    return [
        {layer: {leaf: parts[layer][leaf][i] for leaf in stacked[layer]} for layer in stacked} for i in range(depth)
    ]


def fold_positions(model: ModelConfig, image: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an image tower as one of learned positions: cls has none in a fixed table, a bias of patches is added."""
    image = dict(image)
    table, first = jnp.asarray(image["pos_embed"]), int("cls" in image)
    if model.image.positions == "sincos":
        table = table.at[:, :first].set(0)
    if "patch_bias" in image:
        table = table.at[:, first:].add(image["patch_bias"])
    return image | {"pos_embed": table}


def check_finite(weights: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for weights that no library should be given."""
    if broken := [name for name, value in weights.items() if not np.isfinite(value).all()]:
        raise UserError(f"these weights hold values that are not finite: {', '.join(broken)}")


def clipped_scale(model: ModelConfig, logit_scale: Any) -> Any:
    """Returns the scale as other libraries use it: they do not clip it, and ours does with the softmax loss."""
    return jnp.clip(logit_scale, 0, math.log(MAX_SCALE)) if model.loss == "info_nce" else logit_scale
