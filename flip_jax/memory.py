"""The memory of a step: what the devices have, and the remat policy and number of microbatches that fit."""

import dataclasses
import math
import re
import socket
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flip_jax import sharding, train_step
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.train_step import Program

GIB = 2**30
ON_ACCELERATORS = REMAT[1:]  # the policies that "auto" tries there
SPARE = 0.1  # the share of a device's memory that "auto" leaves free
# The compiler's refusal of a program that does not fit, in the words of its early and its late passes.
_REFUSAL = re.compile(r"(?:Used |\()([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G")


class Trial(NamedTuple):
    """A choice of remat policy and microbatches, and the bytes that it needs per device."""

    config: Config
    needed: float
    arguments: float  # state and batch, a part of `needed` that no choice changes
    result: Any  # what the caller compiled


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


def refusal(error: jax.errors.JaxRuntimeError) -> tuple[float, float] | None:
    """Reads (needed, available) bytes from a compiler's refusal; None for any other error."""
    if found := _REFUSAL.search(str(error)):
        needed, available = (float(gib) * GIB for gib in found.groups())
        return needed, available
    return (math.inf, math.inf) if "RESOURCE_EXHAUSTED" in str(error) else None


def policies(config: Config, limit: int | None, on_cpu: bool = False) -> tuple[str, ...]:
    """Lists the remat policies to try in turn, on devices of `limit` bytes (None: unknown).

    On accelerators "auto" does not try "none": recomputing what "dots" drops takes them less time than writing it to
    memory and reading it back (docs/scale.md).
    """
    if config.model.remat != "auto":
        return (config.model.remat,)
    return REMAT if limit is None or on_cpu else ON_ACCELERATORS


def part_counts(config: Config, mesh: Mesh) -> list[int]:
    """Lists the numbers of microbatches to try: those that divide the rows of a device, or the one that is set."""
    if isinstance(config.microbatches, int):
        return [config.microbatches]
    rows = config.global_batch_size // sharding.batch_shards(mesh)
    return [1] if config.finetune.classes else [count for count in range(1, rows + 1) if rows % count == 0]


def search(config: Config, mesh: Mesh, limit: int | None, attempt: Callable[[Config], Trial]) -> Iterator[Trial]:
    """Yields trials of what is "auto", until the caller finds that one fits and stops.

    Every policy comes before a second microbatch: microbatches encode twice, which costs a third more, and recomputing
    everything a quarter (docs/scale.md). With microbatches their number costs little, so the policy that recomputes
    least is tried first.
    """
    names, counts = policies(config, limit, on_cpu(mesh)), part_counts(config, mesh)
    trials = {}
    for name in names:
        trials[name] = [attempt(resolved(config, name, counts[0]))]
        yield trials[name][0]
    for name in dict.fromkeys((names[0], names[-1])) if limit else ():
        while count := _next_count(counts, trials[name], (1 - SPARE) * limit):
            trials[name].append(attempt(resolved(config, name, count)))
            yield trials[name][-1]


def _next_count(counts: list[int], trials: list[Trial], room: float) -> int | None:
    """Finds the least number of microbatches that should fit into `room` bytes, by the last one or two trials."""
    last, count = trials[-1], int(trials[-1].config.microbatches)
    if math.isinf(last.needed):  # the compiler gave no number
        return next((larger for larger in counts if larger >= 4 * count), None)
    # A step needs a constant, at least its arguments, and a part that shrinks with the number.
    part = (last.needed - last.arguments) * count
    if len(trials) > 1 and not math.isinf(trials[-2].needed):
        part = (trials[-2].needed - last.needed) / (1 / int(trials[-2].config.microbatches) - 1 / count)
    constant = last.needed - part / count
    return next((larger for larger in counts if larger > count and constant + part / larger <= room), None)


def resolved(config: Config, remat: str, microbatches: int) -> Config:
    """Returns the config with "auto" replaced by a choice."""
    model = dataclasses.replace(config.model, remat=remat)
    return dataclasses.replace(config, microbatches=microbatches, model=model)


def is_auto(config: Config) -> bool:
    """Tells whether something is left to choose."""
    return "auto" in (config.model.remat, config.microbatches)


def fits(trial: Trial, limit: int | None, spare: float = SPARE) -> bool:
    """Tells whether a trial leaves a share of `limit` bytes free (None: any fits)."""
    return trial.needed <= (1 - spare) * limit if limit else not math.isinf(trial.needed)


def choose(
    config: Config, mesh: Mesh, limit: int | None, recorded: Config | None = None, first: int = 0
) -> tuple[Config, Program, int]:
    """Compiles the step with what fits: (config without "auto", program, bytes needed per device).

    What is "auto" is chosen so that a tenth of `limit` bytes stays free (None: the first choice). A resumed run keeps
    the choice of its checkpoint, `recorded`, while that fits, so that it continues with the same bits.

    Raises:
      UserError: the step does not fit, with the batch or the settings that do.
    """

    def attempt(choice):
        program = train_step.make_program(choice, mesh, first)
        extra = host_bytes(choice, program, mesh)
        arguments = tree_bytes(program.state) + image_bytes(choice, mesh) + extra
        try:
            compiled = lower(program, choice, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            if not (found := refusal(error)):
                raise
            return Trial(choice, found[0], arguments, None)
        return Trial(choice, peak_bytes(compiled) + extra, arguments, program._replace(step=compiled))

    auto, tried = is_auto(config), []
    if auto and recorded:
        remat = config.model.remat if config.model.remat != "auto" else recorded.model.remat
        count = config.microbatches if config.microbatches != "auto" else recorded.microbatches
        again = resolved(config, remat, count)
        if not is_auto(again) and fits(trial := attempt(again), limit, spare=0):
            return trial.config, trial.result, int(trial.needed)
    for trial in search(config, mesh, limit, attempt):
        if trial.result and fits(trial, limit, SPARE if auto else 0):
            return trial.config, trial.result, int(trial.needed)
        tried.append(trial)
    from flip_jax import too_large  # only refusals need it

    raise too_large.error(config, mesh, limit, tried)


def host_bytes(config: Config, program: Program, mesh: Mesh) -> float:
    """Bytes that a run holds outside of its step, where that is the same memory, as a device's share."""
    if not on_cpu(mesh):
        return 0
    from flip_jax import host_memory

    return host_memory.held_bytes(config, program, mesh)


def on_cpu(mesh: Mesh) -> bool:
    """Tells whether the devices are CPUs, whose memory is the machine's own."""
    return mesh.devices.flat[0].platform == "cpu"


def tree_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def image_bytes(config: Config, mesh: Mesh) -> float:
    """Bytes of a batch's images on one device."""
    return config.global_batch_size / sharding.batch_shards(mesh) * config.model.image.image_size**2 * 3


def device_memory() -> int | None:
    """Bytes that every device of the run may use, or None where that is not known.

    On CPUs it is the memory that is available now, shared by all devices of all processes on a machine.
    """
    own, machine = jax.local_devices(), zlib.crc32(socket.gethostname().encode()) >> 1
    shared = own[0].platform == "cpu"
    if shared:
        from flip_jax import host_memory

        limit = host_memory.available() or 0
    else:
        limit = (own[0].memory_stats() or {}).get("bytes_limit") or 0
    # JAX cuts what processes exchange to 32 bits, so memory is in MiB.
    limits = multihost_utils.process_allgather(np.array([limit >> 20, machine, len(own)], np.int32)).reshape(-1, 3)
    sharing = [limits[limits[:, 1] == name, 2].sum() if shared else 1 for name in limits[:, 1]]
    return (int((limits[:, 0] // sharing).min()) << 20) or None
