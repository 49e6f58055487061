"""The memory of a step: which remat policy fits into the devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flip_jax import sharding, train_step
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.runtime import UserError
from flip_jax.train_step import Program

ON_ACCELERATORS = REMAT[1:]  # the policies that "auto" tries there
SPARE = 0.1  # the share of a device's memory that `least_recompute` leaves free


def lower(program: Program, config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Traces and lowers the step for the devices of a mesh, which need not exist."""
    size, length, rows = config.model.image.image_size, config.model.text.context_length, sharding.batch_sharding(mesh)
    image = jax.ShapeDtypeStruct((config.global_batch_size, size, size, 3), jnp.uint8, sharding=rows)
    shape = (config.global_batch_size, length) if "text" in program.inputs else (config.global_batch_size,)
    target = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        return program.step.lower(program.state, image, target)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that a compiled program needs, its arguments included."""
    stats = compiled.memory_analysis()
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return peak + stats.output_size_in_bytes - stats.alias_size_in_bytes


def policies(config: Config, limit: int | None) -> tuple[str, ...]:
    """Lists the remat policies to try in turn, on devices of `limit` bytes (None: not known, as on CPUs).

    On accelerators "auto" does not try "none": recomputing what "dots" drops takes them less time than writing it to
    memory and reading it back (docs/scale.md).
    """
    if config.model.remat != "auto":
        return (config.model.remat,)
    return REMAT if limit is None else ON_ACCELERATORS


def least_recompute(config: Config, mesh: Mesh, limit: int | None) -> tuple[str, Program, int]:
    """Builds and compiles the program under a remat policy that fits: (policy, program, bytes per device).

    For `config.model.remat` "auto" it is the first of `policies` that leaves a tenth of `limit` bytes free (None: the
    first one).

    Raises:
      UserError: the step does not fit, whatever is recomputed.
    """
    refusals = []
    for policy in policies(config, limit):
        program = train_step.make_program(
            dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy)), mesh
        )
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
    raise UserError(
        f"the train step at config.global_batch_size {config.global_batch_size} does not fit into the devices' memory; "
        "raise config.mesh.fsdp or config.microbatches, or lower the batch. Tried config.model.remat\n"
        + "\n".join(refusals)
    )


def device_memory() -> int | None:
    """Bytes that every device of the run has, or None where that is not known (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    least = int(np.min(multihost_utils.process_allgather(np.int64(stats.get("bytes_limit", 0)))))
    return least or None
