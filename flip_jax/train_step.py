"""The train step: loss, gradients and update over the global batch, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import masking, models, optim, sharding
from flip_jax.config import Config
from flip_jax.models.flip import FLIP


class TrainState(NamedTuple):
    """All that a step changes; `step` counts the updates done."""

    step: jax.Array
    params: Any
    opt_state: Any


class Program(NamedTuple):
    """A run's compiled functions, and what its state looks like (shapes, types and shardings)."""

    graphdef: nnx.GraphDef
    inputs: tuple[str, str]  # the arrays of a batch that `step` takes
    state: TrainState
    init: Callable[..., TrainState]  # of random parameters, or of those that are given
    step: jax.stages.Wrapped  # (state, image, target) -> (state, dict of scalars)


def make_loss_and_grads(graphdef: nnx.GraphDef, microbatches: int) -> Callable[..., tuple[jax.Array, Any]]:
    """Builds loss_and_grads(params, image uint8 [B, H, W, 3], text int32 [B, T], mask_key) over the global batch.

    With several microbatches the towers encode one after the other: first for the embeddings alone, then, once the
    gradient of the loss by each embedding is known, for the gradients. The loss still compares the full batch, and what
    the towers see is decided once, before the batch is split. `frozen` holds parameters that get no gradient.
    """

    def loss_and_grads(params, image, text, mask_key, frozen=None):
        def model(params) -> FLIP:
            return nnx.merge(graphdef, params | (frozen or {}))

        def encode(params, view):
            return model(params).encode_pairs(view)

        def compare(params, image_BxE, text_BxE):
            return model(params).compare(image_BxE, text_BxE)

        def one_pass(params, view):
            *embeddings, auxiliary = encode(params, view)
            return compare(params, *embeddings) + auxiliary

        def two_passes(params, view):
            parts = sharding.split(view, microbatches)
            image, text, auxiliary = jax.lax.map(lambda part: encode(params, part), parts)
            embeddings = sharding.join((image, text))
            value, (grads, *by_embedding) = jax.value_and_grad(compare, argnums=(0, 1, 2))(params, *embeddings)

            def surrogate(params, part, by_image, by_text):
                # Its gradient is that of the loss by the chain rule: `by_image` and `by_text` are constants here.
                image, text, auxiliary = encode(params, part)
                return jnp.sum(image * by_image) + jnp.sum(text * by_text) + auxiliary / microbatches

            def add(grads, part):
                return jax.tree.map(jnp.add, grads, jax.grad(surrogate)(params, *part)), None

            # The scan starts from the gradient of what only `compare` uses, the scale of the logits.
            grads, _ = jax.lax.scan(add, grads, (parts, *sharding.split(by_embedding, microbatches)))
            return value + jnp.mean(auxiliary), grads

        view = masking.see(model(params).config, mask_key, image, text, microbatches)
        return two_passes(params, view) if microbatches > 1 else jax.value_and_grad(one_pass)(params, view)

    return loss_and_grads


def make_program(config: Config, mesh: Mesh, first: int = 0) -> Program:
    """Builds, inside `jax.set_mesh(mesh)`, the program that trains, resumes and compiles ahead of time.

    `first` is the step before its first one, from which its learning rate counts.
    """
    optimizer, schedule = optim.make_optimizer(config), optim.learning_rate(config)
    init_key, mask_key = jax.random.split(jax.random.key(config.seed))

    def build():
        return models.build(config, nnx.Rngs(init_key))

    graphdef, abstract_params = nnx.split(nnx.eval_shape(build))
    if config.finetune.classes:
        from flip_jax.models import classifier

        inputs, loss_and_grads = ("image", "label"), classifier.make_loss_and_grads(graphdef, config.finetune)
    else:
        inputs, loss_and_grads = ("image", "text"), make_loss_and_grads(graphdef, int(config.microbatches))

    def init(params=None):
        params = nnx.to_pure_dict(nnx.split(build())[1]) if params is None else params
        return TrainState(jnp.int32(0), params, optimizer.init(optim.split(params, config)[0]))

    def step(state, image, target):
        # The mask depends on seed, step and the row in the global batch, not on the layout of the devices.
        params, frozen = optim.split(state.params, config)
        value, grads = loss_and_grads(params, image, target, jax.random.fold_in(mask_key, state.step), frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates) | frozen
        count = state.step - first
        report = {"loss": value, "learning_rate": schedule(count), "next_learning_rate": schedule(count + 1)}
        if "text" in inputs:
            report["logit_scale"] = nnx.merge(graphdef, state.params).scale()
        return TrainState(state.step + 1, params, opt_state), report

    whole = NamedSharding(mesh, PartitionSpec())
    param_shardings = jax.tree.map(lambda x: x.sharding, sharding.place(abstract_params, mesh))
    abstract = jax.eval_shape(init)
    shardings = TrainState(
        whole,
        param_shardings,
        optax.tree.map_params(
            optimizer,
            lambda x, s: x if isinstance(x, optax.MaskedNode) else s,  # a parameter that this part leaves alone
            abstract.opt_state,
            optim.split(param_shardings, config)[0],
            transform_non_params=lambda _: whole,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        ),
    )
    if config.optim.ema:
        from flip_jax import average  # only runs that keep one need it

        init, step, abstract, shardings = average.keep(config.optim.ema, init, step, abstract, shardings)
    rows = sharding.batch_sharding(mesh)
    return Program(
        graphdef,
        inputs,
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings),
        jax.jit(init, out_shardings=shardings),
        jax.jit(step, in_shardings=(shardings, rows, rows), out_shardings=(shardings, whole), donate_argnums=0),
    )
