"""Compile a recipe's train step for hardware you do not have: memory, collectives and a lower bound of its time.

A topology is GENERATION:SHAPE in chips, such as v3:16x8 or tpu7x:4x4x4 (a chip of either is two devices), or
SLICES*GENERATION:SHAPE. It needs the TPU compiler, `pip install -e ".[aot]"`, but no TPU; cpu:DEVICES needs neither.
Exit codes: 0 the step fits, 1 it does not, 2 wrong usage.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from flip_jax import config_check, memory, metrics, models, sharding, train, train_step
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.memory import SPARE
from flip_jax.runtime import UserError
from flip_jax.tools import hlo

EXAMPLE = "flip aot --config=configs/flip_l16.py --topology=v3:16x8 --config.mesh.fsdp=8"
GIB = 2**30


class Chip(NamedTuple):
    """A device as JAX counts them: memory in GiB, bytes/s to it, bytes/s that all its links send together one way."""

    memory: float
    bandwidth: float
    links: float


# The memory is what the compiler grants, read from its refusals. The bandwidths of v5e, v5p and TPU7x are those of
# cloud.google.com/tpu/docs, halved for TPU7x, whose chip is two devices; links are half of the bidirectional figure.
# Those of v3 (a core has half of a chip's 900 GB/s and 4 x 656 Gbit/s), v4 and v6e are as commonly quoted, not checked.
CHIPS = {
    "TPU v3": Chip(15.48, 450e9, 164e9),
    "TPU v4": Chip(30.75, 1228e9, 300e9),
    "TPU v5 lite": Chip(15.75, 819e9, 200e9),
    "TPU v5": Chip(95.73, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.24, 1638e9, 400e9),
    "TPU7x": Chip(94.74, 3690e9, 300e9),
}


def devices(topology: str) -> list[jax.Device]:
    """Return the devices of a topology such as "v5e:16x16", "2*v5e:16x16" (two slices) or "cpu:8".

    Raises:
      UserError: the topology is unknown, or this machine cannot compile for it.
    """
    found = re.fullmatch(r"(cpu):(\d+)|(?:([1-9]\d*)\*)?(((?:v|tpu)\d+\w*):\d+(?:x\d+)*)", topology)
    if not found:
        raise UserError(
            f"--topology={topology} is not [SLICES*]GENERATION:SHAPE, such as v3:16x8, 2*v5e:16x16 or cpu:8"
        )
    jax.config.update("jax_platforms", "cpu")
    if found[1] == "cpu":
        flag = f" --xla_force_host_platform_device_count={found[2]}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
        if jax.device_count() < int(found[2]):
            raise UserError(f"--topology={topology}: JAX has already started with {jax.device_count()} devices")
        return jax.devices()[: int(found[2])]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU compiler: pip install -e '.[aot]'")
    # Otherwise libtpu asks the metadata server of a TPU VM, which this machine may not be, and refuses to be loaded by
    # two processes at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options: dict[str, Any] = {"num_slices": int(found[3])} if found[3] else {}
    if found[5] == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on a TPU VM
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=found[4], **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"--topology={topology} is refused by libtpu: {error}") from None
    return list(description.devices)


def analyse(config: Config, topology: str) -> dict[str, Any]:
    """Return what `--json` prints about the train step of `config` on a topology; bytes and FLOPs are per device.

    For remat and microbatches "auto" it describes what a run would choose, or else the last that was tried.

    Raises:
      UserError: the topology, mesh and batch do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    train.check_batches(config, mesh)
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    limit = int(chip.memory * GIB) if chip else None

    def attempt(choice):
        result = _analyse_choice(choice, topology, mesh, limit)
        arguments = result["memory"].get("arguments", result["state_bytes"] / sharding.batch_shards(mesh))
        return memory.Trial(choice, result["memory"]["peak"], arguments, result)

    for trial in memory.search(config, mesh, limit, attempt):
        result = trial.result
        if result["fits"] and (result["memory"]["limit"] is None or result["memory"]["spare"] >= SPARE):
            break
    return result


def analyse_run(config: Config, topology: str) -> dict[str, Any]:
    """Return `analyse` of a run, or of each of its stages and which needs most memory.

    Raises:
      UserError: as `analyse`.
    """
    if not config.stages:
        return analyse(config, topology)
    results = []
    for number, stage in enumerate(stages := train.plan(config), 1):
        identity = {"stage": f"{number}/{len(stages)}", "image_size": stage.config.model.image.image_size}
        results.append(identity | analyse(stage.config, topology))
    tightest = max(results, key=lambda result: result["memory"]["peak"])
    return {"stages": results, "tightest": tightest["stage"], "fits": all(result["fits"] for result in results)}


def _analyse_choice(config, topology, mesh, limit):
    """`analyse` for one remat policy, one number of microbatches and devices of `limit` bytes (None: unknown)."""
    kind = mesh.devices.flat[0].device_kind
    result = {
        "topology": topology,
        "device_kind": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "global_batch_size": config.global_batch_size,
        "mask_ratio": config.model.image.mask_ratio,
        "remat": config.model.remat,
        "microbatches": config.microbatches,
    }
    _say(f"compiling for {mesh.size} devices of kind {kind}; this takes one to five minutes")
    start = time.perf_counter()
    # Not inside jax.set_mesh: the run's random keys are made here, and the mesh's devices do not exist.
    program = train_step.make_program(config, mesh)
    lowered = memory.lower(program, config, mesh)
    result["state_bytes"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    saved = _saved(lowered.as_text(dialect="hlo"), config, mesh)
    needed = sum(array["bytes"] for array in saved)
    try:
        # The compiler may still shrink what is saved, but not to half: such a refusal is not worth minutes.
        compiled, text = _compile(lowered, mesh) if not limit or needed <= 2 * limit else (None, None)
    except jax.errors.JaxRuntimeError as error:
        refusal = memory.refusal(error)
        if not refusal or math.isinf(refusal[0]):
            raise
        needed, limit = map(int, refusal)
        compiled, text = None, None
    seconds = time.perf_counter() - start
    if compiled is None:
        result["memory"] = {"limit": limit, "peak": needed, "spare": 1 - needed / limit}
        result |= {"fits": False, "largest": saved[:5], "compile_seconds": seconds}
        return result | {"try": advice(config, mesh.size)}
    stats, peak = compiled.memory_analysis(), memory.peak_bytes(compiled)
    result["memory"] = {
        "limit": limit,
        "peak": peak,
        "spare": 1 - peak / limit if limit else None,
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    result |= {"fits": not limit or peak <= limit, "largest": [], "compile_seconds": seconds}
    if not result["fits"]:
        result["try"] = advice(config, mesh.size)
    if not text:
        _say("memory only: this libtpu does not dump the compiled program; update it with pip install -U libtpu")
        return result
    return result | _program_costs(hlo.Module(text), config, mesh, bounded=limit is not None)


def _program_costs(module, config, mesh, bounded):
    """FLOPs, memory traffic and collectives of a compiled step and, if `bounded`, the least time they take."""
    flops, passes = module.flops()
    traffic, collectives = module.hbm_bytes(), module.collectives(mesh.shape)
    model_flops = models.flops_per_sample(config) * config.global_batch_size / mesh.size
    costs = {
        "largest": [{"bytes": size, "array": array, "from": source} for size, array, source in module.largest()],
        "model_flops": model_flops,
        "flops": flops,
        "hbm_bytes": traffic,
        "collectives": [c._asdict() for c in collectives],
    }
    if not bounded:
        return costs
    kind = mesh.devices.flat[0].device_kind
    peak, chip = metrics.PEAK_FLOPS[kind], CHIPS[kind]
    wire_bytes = sum(c.wire_bytes for c in collectives if c.axes != hlo.BETWEEN_SLICES)
    seconds = {"compute": passes / peak, "memory": traffic / chip.bandwidth, "links": wire_bytes / chip.links}
    bound = max(seconds, key=seconds.__getitem__)
    least = seconds[bound]
    return costs | {
        "seconds": seconds,
        "bound_by": bound,
        "least_seconds": least,
        "most_mfu": model_flops / peak / least,
    }


def _compile(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, str | None]:
    """Return the compiled program and its HLO text, which is None if the compiler does not dump it."""
    if mesh.devices.flat[0].platform == "cpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # The compiler dumps the text itself: jaxlib cannot print the instructions of a newer libtpu, such as v5p's.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = next(pathlib.Path(folder).glob("*.after_codegen.txt"), None)
        return compiled, written.read_text() if written else None


def advice(config: Config, device_count: int) -> list[str]:
    """Return the three cheapest settings that need less memory."""
    remat, fsdp = config.model.remat, config.mesh.fsdp
    options = []
    if fsdp < 8 and device_count % (8 * config.mesh.tensor) == 0:
        options.append("--config.mesh.fsdp=8")
    options += [f"--config.model.remat={policy}" for policy in REMAT[REMAT.index(remat) + 1 :]]
    if config.optim.mu_dtype != "bfloat16":
        options.append("--config.optim.mu_dtype=bfloat16")
    options.append(f"--config.global_batch_size={config.global_batch_size // 2}")
    options.append(f"--config.model.image.mask_ratio={(1 + config.model.image.mask_ratio) / 2:g}")
    return options[:3]


def _saved(text: str, config: Config, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """Return what the loops over layers save for the backward pass, largest first, from the unpartitioned program."""
    counts: Counter = Counter()
    for loop in re.findall(r" = \((.*)\) while\(", text):
        arrays = re.findall(r"\w+\[[\d,]+\]", loop)
        # Several loops carry the same array, so each array counts as often as the loop that has most of it.
        counts |= Counter(array for array in arrays if f",{config.global_batch_size}," in array)
    by_size = sorted(counts.items(), key=lambda item: -item[1] * hlo.nbytes(item[0]))
    shards = sharding.batch_shards(mesh)
    return [
        {"bytes": count * hlo.nbytes(array) // shards, "array": f"{count} x {array}", "from": "saved"}
        for array, count in by_size
    ]


def describe(result: dict[str, Any]) -> str:
    """Format the result of `analyse_run` for people."""
    if "stages" in result:
        memory = next(stage["memory"] for stage in result["stages"] if stage["stage"] == result["tightest"])
        of = f" of {_size(memory['limit'])}" if memory["limit"] else ""
        tightest = f"{'tightest':16}stage {result['tightest']}, {_size(memory['peak'])}{of}"
        return "\n\n".join([*map(describe, result["stages"]), tightest])
    found, mesh = result["memory"], " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    rows = [("stage", f"{result['stage']}, {result['image_size']} px")] if "stage" in result else []
    rows += [
        ("devices", f"{result['devices']} {result['device_kind']} ({mesh})"),
        (
            "batch",
            f"{result['global_batch_size']:,}, mask ratio {result['mask_ratio']}, remat {result['remat']}"
            + (f", {result['microbatches']} microbatches" if result["microbatches"] > 1 else ""),
        ),
        ("compiled", f"in {result['compile_seconds']:.0f} s"),
        ("memory", _size(found["peak"])),
    ]
    if found["limit"]:
        spare = f", {found['spare']:.0%} spare" if result["fits"] else ""
        rows.append(("", f"of {_size(found['limit'])}{spare}"))
    if "arguments" in found:
        rows.append(("", ", ".join(f"{name} {_size(found[name])}" for name in ("arguments", "temporaries", "code"))))
    if "flops" in result:
        recompute = result["flops"] / result["model_flops"]
        rows.append(("FLOPs", f"{result['flops']:.3g}, {recompute:.2f} times the model's"))
        rows.append(("traffic", f"{_size(result['hbm_bytes'])} to and from memory"))
        for c in result["collectives"]:
            rows.append((c["op"], f"over {' x '.join(c['axes'])}: {c['count']}, {_size(c['bytes'])} in all"))
    if "seconds" in result:
        bounds = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in result["seconds"].items())
        rows.append(("step", f"at least {1e3 * result['least_seconds']:.0f} ms, bound by {result['bound_by']}"))
        rows.append(("", f"{bounds}; MFU at most {result['most_mfu']:.0%}"))
    rows += [("largest", f"{_size(b['bytes'])} {b['array']} {b['from']}") for b in result["largest"]]
    if not result["fits"]:
        rows += [("try", setting) for setting in result["try"]]
    scarce = found["limit"] and found["spare"] < SPARE
    rows.append(("fits", "no" if not result["fits"] else f"with less than {SPARE:.0%} spare" if scarce else "yes"))
    return "\n".join(f"{label:16}{text}" for label, text in rows)


def _size(count: float) -> str:
    exponent = min(max(int(math.log2(max(count, 1)) / 10), 0), 3)
    return f"{count / 1024**exponent:,.2f} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; `--config.KEY=VALUE` is collected by the command line itself."""
    parser.add_argument(
        "--config", required=True, metavar="RECIPE", help="configs/NAME.py[:ARG]; --config.KEY=VALUE changes a setting"
    )
    parser.add_argument(
        "--topology", required=True, help="[SLICES*]GENERATION:SHAPE, the shape in chips; or cpu:DEVICES"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def main(arguments: argparse.Namespace) -> int:
    """Print the analysis and return 0 if the step fits, 1 if not."""
    try:
        config = config_check.read_recipe([f"--config={arguments.config}", *arguments.config_changes])
        result = analyse_run(config, arguments.topology)
    except UserError as error:
        error.exit_code = 2  # because 1 says that the step does not fit
        raise
    print(json.dumps(result) if arguments.json else describe(result))
    return 0 if result["fits"] else 1
