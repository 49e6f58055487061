"""What to do about a step that does not fit into memory, told by what it needs at least."""

import dataclasses
import math

from jax.sharding import Mesh

from flip_jax import memory, optim, sharding, train_step
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.memory import GIB, SPARE
from flip_jax.runtime import UserError


def check(config: Config, mesh: Mesh, limit: int) -> None:
    """Raises UserError, before anything is compiled, where CPUs cannot hold the state and the batch."""
    fixed, row = _least_bytes(config, mesh)
    needed = fixed + row * config.global_batch_size / sharding.batch_shards(mesh)
    if needed > limit:
        alone = f"its state and batch alone need {needed / GIB:.2f} GiB"
        raise UserError(f"{_too_large(config, limit)}: {alone}; {_remedy(config, mesh, limit)}")


def error(config: Config, mesh: Mesh, limit: int | None, tried: list[memory.Trial]) -> UserError:
    """Says what was tried, what each trial needs, and what would fit."""
    rows = [
        f"  remat {trial.config.model.remat}, {trial.config.microbatches} microbatch(es): "
        + ("refused by the compiler" if math.isinf(trial.needed) else f"{trial.needed / GIB:.2f} GiB")
        for trial in tried
    ]
    remedy = _remedy(config, mesh, limit, min(trial.needed for trial in tried))
    return UserError("\n".join([f"{_too_large(config, limit)}; {remedy}. Needed per device:", *rows]))


def _too_large(config: Config, limit: int | None) -> str:
    of = f", {limit / GIB:.2f} GiB each" if limit else ""
    return (
        f"the train step at config.global_batch_size {config.global_batch_size} does not fit into the devices' memory"
        f"{of}"
    )


def _remedy(config: Config, mesh: Mesh, limit: int | None, needed: float = math.inf) -> str:
    """Says what would fit; `needed` is the least that was tried, in bytes."""
    if config.model.remat not in ("auto", REMAT[-1]):
        return "set config.model.remat to auto"
    shards, room = sharding.batch_shards(mesh), (1 - SPARE) * (limit or 0)
    (fixed, row), rows = _least_bytes(config, mesh), config.global_batch_size / shards
    if not config.finetune.classes and config.microbatches != "auto" and fixed + row * rows <= room:
        return "set config.microbatches to auto, which finds the least number that fits"
    if config.finetune.classes and not math.isinf(needed):  # which takes a batch at once
        row = (needed - fixed) / rows
    if room >= fixed + row:
        return f"lower it to {shards * 2 ** int(math.log2((room - fixed) / row))}"
    return (
        f"{fixed / GIB:.2f} GiB per device are needed for the model's parameters, gradients and moments alone: "
        "raise config.mesh.fsdp, which splits them over devices, use more devices or a smaller model"
    )


def _least_bytes(config: Config, mesh: Mesh) -> tuple[float, float]:
    """Estimates the bytes per device that no choice avoids, and those of a row of the batch.

    Beside the state there are gradients, twice while they are summed, none of a frozen tower, and parameters in the
    compute type; beside the row, the patches that are seen. Measured by compiled steps of B/16 and L/16 on CPUs.
    """
    one = dataclasses.replace(memory.resolved(config, REMAT[-1], 1), global_batch_size=sharding.batch_shards(mesh))
    program = train_step.make_program(one, mesh)
    fixed = (
        memory.tree_bytes(program.state)
        + memory.tree_bytes(program.state.params)
        + 2 * memory.tree_bytes(optim.split(program.state.params, config)[0])
        + memory.host_bytes(one, program, mesh)
    )
    return fixed, config.model.image.image_size**2 * 3 * (3.6 if memory.on_cpu(mesh) else 1.6)
