"""The memory of a step: what the devices have, and the remat policy and number of microbatches that fit."""

import dataclasses
import math
import pathlib
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
from flip_jax.runtime import UserError
from flip_jax.train_step import Program

GIB = 2**30
ON_ACCELERATORS = REMAT[1:]  # the policies that "auto" tries there
SPARE = 0.1  # the share of a device's memory that "auto" leaves free
RECORD = 64 * 1024  # bytes of an encoded record in the shuffle window, a generous mean
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
    names, counts = policies(config, limit, _on_cpu(mesh)), part_counts(config, mesh)
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
    config: Config, mesh: Mesh, limit: int | None, recorded: Config | None = None
) -> tuple[Config, Program, int]:
    """Compiles the step with what fits: (config without "auto", program, bytes needed per device).

    What is "auto" is chosen so that a tenth of `limit` bytes stays free (None: the first choice). A resumed run keeps
    the choice of its checkpoint, `recorded`, while that fits, so that it continues with the same bits.

    Raises:
      UserError: the step does not fit, with the batch or the settings that do.
    """

    def attempt(choice):
        program = train_step.make_program(choice, mesh)
        extra = host_bytes(choice, program, mesh)
        arguments = _tree_bytes(program.state) + _image_bytes(choice, mesh) + extra
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
    rows = [
        f"  remat {trial.config.model.remat}, {trial.config.microbatches} microbatch(es): "
        + ("refused by the compiler" if math.isinf(trial.needed) else f"{trial.needed / GIB:.2f} GiB")
        for trial in tried
    ]
    remedy = _remedy(config, mesh, limit, min(trial.needed for trial in tried))
    raise UserError("\n".join([f"{_too_large(config, limit)}; {remedy}. Needed per device:", *rows]))


def check(config: Config, mesh: Mesh, limit: int | None) -> None:
    """Raises UserError, before anything is compiled, where a CPU cannot hold the state and the batch."""
    if not limit or not _on_cpu(mesh):
        return
    fixed, row = _least_bytes(config, mesh)
    needed = fixed + row * config.global_batch_size / sharding.batch_shards(mesh)
    if needed > limit:
        alone = f"its state and batch alone need {needed / GIB:.2f} GiB"
        raise UserError(f"{_too_large(config, limit)}: {alone}; {_remedy(config, mesh, limit)}")


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

    Beside the state there are gradients, twice while they are summed, and parameters in the compute type; beside the
    row, the patches that are seen. Measured by compiled steps of B/16 and L/16 on CPUs.
    """
    one = dataclasses.replace(resolved(config, REMAT[-1], 1), global_batch_size=sharding.batch_shards(mesh))
    program = train_step.make_program(one, mesh)
    fixed = _tree_bytes(program.state) + 3 * _tree_bytes(program.state.params) + host_bytes(one, program, mesh)
    return fixed, config.model.image.image_size**2 * 3 * (3.6 if _on_cpu(mesh) else 1.6)


def host_bytes(config: Config, program: Program, mesh: Mesh) -> float:
    """Bytes that a run holds outside of its step, where that is the same memory (CPUs), as a device's share.

    These are the batch that was assembled and the next one, the state that is being saved, and the shuffle window.
    """
    if not _on_cpu(mesh):
        return 0
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    window = config.data.shuffle_window * RECORD / max(local, 1)
    return 2 * _image_bytes(config, mesh) + _tree_bytes(program.state) + window


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _tree_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _image_bytes(config: Config, mesh: Mesh) -> float:
    return config.global_batch_size / sharding.batch_shards(mesh) * config.model.image.image_size**2 * 3


def device_memory() -> int | None:
    """Bytes that every device of the run may use, or None where that is not known.

    On CPUs it is the memory that is available now, shared by all devices of all processes on a machine.
    """
    own, machine = jax.local_devices(), zlib.crc32(socket.gethostname().encode()) >> 1
    on_cpu = own[0].platform == "cpu"
    limit = (available() if on_cpu else (own[0].memory_stats() or {}).get("bytes_limit")) or 0
    # JAX cuts what processes exchange to 32 bits, so memory is in MiB.
    limits = multihost_utils.process_allgather(np.array([limit >> 20, machine, len(own)], np.int32)).reshape(-1, 3)
    sharing = [limits[limits[:, 1] == name, 2].sum() if on_cpu else 1 for name in limits[:, 1]]
    return (int((limits[:, 0] // sharing).min()) << 20) or None


def available(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that processes of this machine or container can still take: the least of what Linux says, else None."""

    def read(path):
        return path.read_text() if path.is_file() else ""

    found = [1024 * int(kib) for kib in re.findall(r"^MemAvailable: *(\d+) kB", read(root / "proc/meminfo"), re.M)]
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("memory" if controllers else "")  # version 1 or 2
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        # The limits of all groups above hold, too. In a container its own group may be mounted as the top one.
        inner = folder / path.strip("/")
        for group in (inner, *(parent for parent in inner.parents if parent.is_relative_to(folder))):
            most, used = (read(group / name).strip() for name in names)
            if most.isdigit() and used.isdigit():
                # Pages of files are given back when memory is short.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", read(group / "memory.stat"), re.M)
                found.append(max(int(most) - int(used) + (int(cached[1]) if cached else 0), 0))
    return min(found, default=None)
