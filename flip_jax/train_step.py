"""The pure train step: loss, gradients and update, over the global batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import models, optim, sharding
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.models import classifier
from flip_jax.models.flip import FLIP

LESS_AND_LESS = REMAT[1:]  # what "auto" tries on accelerators
SPARE = 0.1  # of a device's memory: what `least_recompute` leaves free


class TrainState(NamedTuple):
    """All that a step changes; `step` counts the updates done."""

    step: jax.Array
    params: Any
    opt_state: Any


class Program(NamedTuple):
    """A run's compiled functions, and what its state looks like (shapes, types and shardings)."""

    graphdef: nnx.GraphDef
    inputs: tuple[str, str]  # what of a batch `step` gets
    state: TrainState
    init: Callable[[], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def make_loss_and_grads(graphdef: nnx.GraphDef, microbatches: int) -> Callable[..., tuple[jax.Array, Any]]:
    """loss_and_grads(params, image uint8 [B, H, W, 3], text int32 [B, T], mask_key) over the global batch.

    With several microbatches the towers see one after the other: first for the embeddings alone, then, knowing the
    gradient of the loss by each embedding, for the gradients. Masks are those of the whole batch in both passes.
    """

    def encode(params, image, text, masks):
        """Both embeddings, and what is to be added to the loss of their comparison."""
        model: FLIP = nnx.merge(graphdef, params)
        return model.encode_pairs(image, text, masks)

    def compare(params, image_BxE, text_BxE):
        model: FLIP = nnx.merge(graphdef, params)
        return model.compare(image_BxE, text_BxE)

    def one_pass(params, image, text, masks):
        *embeddings, auxiliary = encode(params, image, text, masks)
        return compare(params, *embeddings) + auxiliary

    def two_passes(params, *batch):
        parts = sharding.split(batch, microbatches)
        image, text, auxiliary = jax.lax.map(lambda part: encode(params, *part), parts)
        embeddings = sharding.join((image, text))
        value, (grads, *by_embedding) = jax.value_and_grad(compare, argnums=(0, 1, 2))(params, *embeddings)

        def surrogate(params, part, by_image, by_text):
            image, text, auxiliary = encode(params, *part)
            return jnp.sum(image * by_image) + jnp.sum(text * by_text) + auxiliary / microbatches

        def add(grads, part):
            return jax.tree.map(jnp.add, grads, jax.grad(surrogate)(params, *part)), None

        grads, _ = jax.lax.scan(add, grads, (parts, *sharding.split(by_embedding, microbatches)))
        return value + jnp.mean(auxiliary), grads

    def loss_and_grads(params, image, text, mask_key):
        masks = nnx.merge(graphdef, params).masks(image, text, mask_key)
        if microbatches > 1:
            return two_passes(params, image, text, masks)
        return jax.value_and_grad(one_pass)(params, image, text, masks)

    return loss_and_grads


def make_program(config: Config, mesh: Mesh) -> Program:
    """Builds, inside `jax.set_mesh(mesh)`, what trains, resumes and compiles ahead of time alike."""
    optimizer, schedule = optim.make_optimizer(config), optim.learning_rate(config)
    init_key, mask_key = jax.random.split(jax.random.key(config.seed))

    def build():
        return models.build(config, nnx.Rngs(init_key))

    graphdef, abstract_params = nnx.split(nnx.eval_shape(build))
    if config.finetune.classes:
        inputs, loss_and_grads = ("image", "label"), classifier.make_loss_and_grads(graphdef, config.finetune)
    else:
        inputs, loss_and_grads = ("image", "text"), make_loss_and_grads(graphdef, config.microbatches)

    def init():
        params = nnx.to_pure_dict(nnx.split(build())[1])
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def step(state, image, target):
        # The mask depends on seed, step and the row in the global batch, not on the layout of the devices.
        value, grads = loss_and_grads(state.params, image, target, jax.random.fold_in(mask_key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        report = {"loss": value, "learning_rate": schedule(state.step)}
        if not config.finetune.classes:
            report["logit_scale"] = nnx.merge(graphdef, state.params).scale()
        return TrainState(state.step + 1, params, opt_state), report

    whole = NamedSharding(mesh, PartitionSpec())
    param_shardings = jax.tree.map(lambda x: x.sharding, sharding.place(abstract_params, mesh))
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
        inputs,
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings),
        jax.jit(init, out_shardings=shardings),
        jax.jit(step, in_shardings=(shardings, rows, rows), out_shardings=(shardings, whole), donate_argnums=0),
    )


def lower(program: Program, config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The step, traced and lowered for the devices of a mesh, which need not exist."""
    size, length, rows = config.model.image.image_size, config.model.text.context_length, sharding.batch_sharding(mesh)
    image = jax.ShapeDtypeStruct((config.global_batch_size, size, size, 3), jnp.uint8, sharding=rows)
    shape = (config.global_batch_size, length) if "text" in program.inputs else (config.global_batch_size,)
    target = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        return program.step.lower(program.state, image, target)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled program needs of a device's memory, its arguments included."""
    stats = compiled.memory_analysis()
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return peak + stats.output_size_in_bytes - stats.alias_size_in_bytes


def policies(config: Config, limit: int | None) -> tuple[str, ...]:
    """The remat policies to try in turn, on devices of `limit` bytes (None: not known, as on CPUs).

    Of "auto", on accelerators, not "none": what "dots" computes again takes them less time than to write it to their
    memory and to read it (docs/scale.md).
    """
    if config.model.remat != "auto":
        return (config.model.remat,)
    return REMAT if limit is None else LESS_AND_LESS


def least_recompute(config: Config, mesh: Mesh, limit: int | None) -> tuple[str, Program, int]:
    """The remat policy, the program with its step compiled, and the bytes that it needs of each device.

    Of `config.model.remat` "auto", the first of `policies` that leaves a tenth of `limit` bytes free (None: the first).

    Raises:
      ValueError: the step does not fit, whatever is recomputed.
    """
    refusals = []
    for policy in policies(config, limit):
        program = make_program(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy)), mesh)
        try:
            compiled = lower(program, config, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusals.append(f"  {policy}: {str(error).splitlines()[0]}")
            continue
        peak = peak_bytes(compiled)
        if limit is None or peak <= (1 - SPARE) * limit or config.model.remat != "auto":
            return policy, program._replace(step=compiled), peak
        refusals.append(f"  {policy}: {peak / 2**30:.1f} GiB of {limit / 2**30:.1f}, with less than a tenth to spare")
    raise ValueError(
        f"the train step at config.global_batch_size {config.global_batch_size} does not fit into the devices' memory; "
        "raise config.mesh.fsdp or config.microbatches, or lower the batch. Tried config.model.remat\n"
        + "\n".join(refusals)
    )
