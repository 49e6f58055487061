"""The pure train step and the loop around it."""

import collections
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import losses, optim, sharding
from flip_jax.config import Config


from flip_jax.models.flip import FLIP

IN_FLIGHT = 2  # steps given to the devices ahead of the one they work on


class TrainState(NamedTuple):
    """All that a step changes; `step` counts the updates done."""

    step: jax.Array
    params: Any
    opt_state: Any


class Program(NamedTuple):
    """A run's compiled functions, and what its state looks like (shapes, types and shardings)."""

    graphdef: nnx.GraphDef
    state: TrainState
    init: Callable[[], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_loss(graphdef: nnx.GraphDef) -> Callable[..., jax.Array]:
    """loss(params, image uint8 [B, H, W, 3], text int32 [B, T], mask_key) -> the scalar loss over the global batch."""

    def loss(params, image, text, mask_key):
        model: FLIP = nnx.merge(graphdef, params)
        return losses.info_nce(model.encode_image(image, mask_key), model.encode_text(text), model.scale())

    return loss


def make_program(config: Config, mesh: Mesh) -> Program:
    """Builds, inside `jax.set_mesh(mesh)`, what trains, resumes and compiles ahead of time alike."""
    optimizer, schedule = optim.make_optimizer(config), optim.learning_rate(config)
    init_key, mask_key = jax.random.split(jax.random.key(config.seed))

    def build():
        return FLIP(config.model, nnx.Rngs(init_key))

    graphdef, abstract_params = nnx.split(nnx.eval_shape(build))
    loss = make_loss(graphdef)

    def init():
        params = nnx.to_pure_dict(nnx.split(build())[1])
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def step(state, image, text):
        # The mask depends on seed, step and the row in the global batch, not on the layout of the devices.
        value, grads = jax.value_and_grad(loss)(state.params, image, text, jax.random.fold_in(mask_key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        report = {
            "loss": value,
            "logit_scale": nnx.merge(graphdef, state.params).scale(),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), report

    whole = NamedSharding(mesh, PartitionSpec())
    param_shardings = sharding.param_shardings(abstract_params, mesh)
    abstract = jax.eval_shape(init)
    shardings = TrainState(
        whole,
        param_shardings,
        optax.tree.map_params(
            optimizer, lambda _, s: s, abstract.opt_state, param_shardings, transform_non_params=lambda _: whole
        ),
    )
    rows = sharding.batch_sharding(mesh)
    return Program(
        graphdef,
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings),
        jax.jit(init, out_shardings=shardings),
        jax.jit(step, in_shardings=(shardings, rows, rows), out_shardings=(shardings, whole), donate_argnums=0),
    )
