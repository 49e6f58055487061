"""Compiles the train step for machines that are not here: memory, collectives and a bound of its time.

python -m flip_jax.aot --config=configs/flip_l16.py --topology=v3:16x8 [--config.KEY=VALUE ...] [--json]
python -m flip_jax.aot --table=docs/scale.md

A topology is GENERATION:SHAPE in chips (a v3 chip is two devices) and needs `pip install libtpu`, which holds the
compiler and needs no TPU; or cpu:DEVICES. The table has every recipe on 256 cores or chips of each generation; rows
that the file already has are kept. Exit codes: 0 it fits, 1 it does not, 2 wrong usage.
"""

import dataclasses
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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import config_flags

from flip_jax import config_check, metrics, sharding, train, train_step
from flip_jax.config import Config
from flip_jax.config_check import REMAT
from flip_jax.tools import hlo
from flip_jax.train_step import LESS_AND_LESS, SPARE

GIB = 2**30


# What the compiler says of a program that does not fit, early or late.
_REFUSAL = re.compile(r"(?:Used |\()([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G")


class Chip(NamedTuple):
    """A device as jax counts them; GiB, bytes/s, and bytes/s that all its links send together, one way."""

    memory: float
    bandwidth: float
    links: float


# Memory: what the compiler grants (from its refusals). Bandwidths of v5e and v5p: cloud.google.com/tpu/docs.
# Those of v3 (a core has half of a chip's 900 GB/s and 4 x 656 Gbit/s), v4 and v6e are as commonly quoted, not checked.
CHIPS = {
    "TPU v3": Chip(15.48, 450e9, 164e9),
    "TPU v4": Chip(30.75, 1228e9, 300e9),
    "TPU v5 lite": Chip(15.75, 819e9, 200e9),
    "TPU v5": Chip(95.73, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.24, 1638e9, 400e9),
}

RECIPES = ("flip_b16", "flip_l14", "flip_l16", "flip_h14", "clip_b16", "clip_l14", "clip_l16")
SLICES = {"v3-256": "v3:16x8", "v4-256": "v4:4x4x8", "v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4"}
SLICES |= {"v6e-256": "v6e:16x16", "v3-512": "v3:16x16"}
ROWS = [(recipe, name) for recipe in RECIPES for name in SLICES if recipe == "flip_h14" or name != "v3-512"]
FIRST = [("flip_l16", "v3-256"), ("flip_h14", "v3-512")]  # the paper's own
# As "auto" does, from the least recompute to the least memory.
LADDER = [{"model.remat": remat, "mesh.fsdp": fsdp} for remat in LESS_AND_LESS for fsdp in (1, 8)]


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology such as "v5e:16x16", "2*v5e:16x16" (two slices) or "cpu:8".

    Raises:
      ValueError: it is not known, or this machine cannot compile for it.
    """
    found = re.fullmatch(r"(cpu):(\d+)|(?:([1-9]\d*)\*)?((v\d+\w*):\d+(?:x\d+)*)", topology)
    if not found:
        raise ValueError(
            f"--topology={topology} is not [SLICES*]GENERATION:SHAPE, such as v3:16x8, 2*v5e:16x16 or cpu:8"
        )
    jax.config.update("jax_platforms", "cpu")
    if found[1] == "cpu":
        flag = f" --xla_force_host_platform_device_count={found[2]}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
        if jax.device_count() < int(found[2]):
            raise ValueError(f"--topology={topology}: jax has already started with {jax.device_count()} devices")
        return jax.devices()[: int(found[2])]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology={topology} needs the TPU compiler: pip install libtpu")
    # Or libtpu asks the metadata server of a TPU VM that this may not be, and wants to be the only one that is loaded.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options = {"chip_config_name": "megacore"} if found[5] == "v4" else {}  # a chip is one device, as on a TPU VM
    options |= {"num_slices": int(found[3])} if found[3] else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=found[4], **options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"--topology={topology} is refused by libtpu: {error}") from error
    return list(description.devices)


def analyse(config: Config, topology: str) -> dict[str, Any]:
    """What the train step of `config` needs on a topology, as one JSON object (`--json`); bytes and FLOPs per device.

    Of remat "auto", the first policy that fits with a tenth to spare, or else the last.

    Raises:
      ValueError: the topology, mesh and batch do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    train.check_batches(config, mesh)
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    limit = chip and int(chip.memory * GIB)
    for policy in train_step.policies(config, limit):
        model = dataclasses.replace(config.model, remat=policy)
        result = _analyse_one(dataclasses.replace(config, model=model), topology, mesh, limit)
        if result["fits"] and (result["memory"]["limit"] is None or result["memory"]["spare"] >= SPARE):
            break
    return result


def _analyse_one(config, topology, mesh, limit):
    """As `analyse`, of one remat policy on devices of `limit` bytes (None: not known)."""
    kind = mesh.devices.flat[0].device_kind
    result = {
        "topology": topology,
        "device_kind": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "global_batch_size": config.global_batch_size,
        "mask_ratio": config.model.image.mask_ratio,
        "remat": config.model.remat,
    }
    _say(f"compiling for {mesh.size} devices of kind {kind}; this takes a minute or several")
    start = time.perf_counter()
    # Outside of set_mesh: it makes the run's random keys, which cannot lie on devices that are not here.
    program = train_step.make_program(config, mesh)
    lowered = train_step.lower(program, config, mesh)
    result["state_bytes"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    saved = _saved(lowered.as_text(dialect="hlo"), config, mesh)
    needed = sum(array["bytes"] for array in saved)
    try:
        # What is saved may yet shrink, but not to half: no need to compile for minutes to be refused.
        compiled, text = _compile(lowered, mesh) if not limit or needed <= 2 * limit else (None, None)
    except jax.errors.JaxRuntimeError as error:
        refusal = _REFUSAL.search(str(error))
        if not refusal:
            raise
        needed, limit = (int(float(gib) * GIB) for gib in refusal.groups())
        compiled = None
    if compiled is None:
        result["memory"] = {"limit": limit, "peak": needed, "spare": 1 - needed / limit}
        result |= {"fits": False, "largest": saved[:5], "compile_seconds": time.perf_counter() - start}
        return result | {"try": advice(config, mesh.size)}
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    peak = train_step.peak_bytes(compiled)
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
        _say("memory only: this libtpu does not write down what it compiled; take another (pip install -U libtpu)")
        return result
    module = hlo.Module(text)
    flops, passes = module.flops()
    traffic, collectives = module.hbm_bytes(), module.collectives(mesh.shape)
    model_flops = metrics.flops_per_sample(config.model, config.finetune.classes) * config.global_batch_size / mesh.size
    result |= {
        "largest": [{"bytes": size, "array": array, "from": source} for size, array, source in module.largest()],
        "model_flops": model_flops,
        "flops": flops,
        "hbm_bytes": traffic,
        "collectives": [c._asdict() for c in collectives],
    }
    if limit:
        wire_bytes = sum(c.wire_bytes for c in collectives if c.axes != hlo.BETWEEN_SLICES)
        result |= _bounds(kind, passes, traffic, wire_bytes, model_flops)
    return result


def _compile(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, str | None]:
    """The compiled program and its text; None where that cannot be had."""
    if mesh.devices.flat[0].platform == "cpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # By the compiler itself: jaxlib cannot print the instructions of a libtpu that is newer, such as those for v5p.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = next(pathlib.Path(folder).glob("*.after_codegen.txt"), None)
        return compiled, written and written.read_text()


def _bounds(kind, passes, traffic, wire_bytes, model_flops):
    peak = metrics.PEAK_FLOPS[kind]
    seconds = {
        "compute": passes / peak,
        "memory": traffic / CHIPS[kind].bandwidth,
        "links": wire_bytes / CHIPS[kind].links,
    }
    bound = max(seconds, key=seconds.get)
    least = seconds[bound]
    return {"seconds": seconds, "bound_by": bound, "least_seconds": least, "most_mfu": model_flops / peak / least}


def advice(config: Config, device_count: int) -> list[str]:
    """Three settings that need less memory, the cheapest first."""
    remat, fsdp = config.model.remat, config.mesh.fsdp
    smaller = REMAT[REMAT.index(remat) + 1 :]
    options = []
    if fsdp < 8 and device_count % (8 * config.mesh.tensor) == 0:
        options.append("--config.mesh.fsdp=8")
    options += [f"--config.model.remat={policy}" for policy in smaller]
    if config.optim.mu_dtype != "bfloat16":
        options.append("--config.optim.mu_dtype=bfloat16")
    options.append(f"--config.global_batch_size={config.global_batch_size // 2}")
    options.append(f"--config.model.image.mask_ratio={(1 + config.model.image.mask_ratio) / 2:g}")
    return options[:3]


def _saved(text: str, config: Config, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """Of a program that is not partitioned yet: what the loops over layers save for the backward pass, by size."""
    counts: Counter = Counter()
    for loop in re.findall(r" = \((.*)\) while\(", text):
        counts |= Counter(
            array for array in re.findall(r"\w+\[[\d,]+\]", loop) if f",{config.global_batch_size}," in array
        )
    return [
        {
            "bytes": count * hlo.nbytes(array) // sharding.batch_shards(mesh),
            "array": f"{count} x {array}",
            "from": "saved",
        }
        for array, count in sorted(counts.items(), key=lambda item: -item[1] * hlo.nbytes(item[0]))
    ]


def describe(result: dict[str, Any]) -> str:
    """The report as a person reads it."""
    memory, mesh = result["memory"], " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    rows = [
        ("devices", f"{result['devices']} {result['device_kind']} ({mesh})"),
        ("batch", f"{result['global_batch_size']:,}, mask ratio {result['mask_ratio']}, remat {result['remat']}"),
        ("compiled", f"in {result['compile_seconds']:.0f} s"),
        ("memory", _size(memory["peak"])),
    ]
    if memory["limit"]:
        spare = f", {memory['spare']:.0%} spare" if result["fits"] else ""
        rows.append(("", f"of {_size(memory['limit'])}{spare}"))
    if "arguments" in memory:
        rows.append(("", ", ".join(f"{name} {_size(memory[name])}" for name in ("arguments", "temporaries", "code"))))
    if "flops" in result:
        recompute = result["flops"] / result["model_flops"]
        rows.append(("FLOPs", f"{result['flops']:.3g}, {recompute:.2f} times the model's"))
        rows.append(("traffic", f"{_size(result['hbm_bytes'])} to and from memory"))
        for c in result["collectives"]:
            rows.append((c["op"], f"over {' x '.join(c['axes'])}: {c['count']} of {_size(c['bytes'])} in all"))
    if "seconds" in result:
        bounds = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in result["seconds"].items())
        rows.append(("a step", f"at least {1e3 * result['least_seconds']:.0f} ms, bound by {result['bound_by']}"))
        rows.append(("", f"{bounds}; MFU at most {result['most_mfu']:.0%}"))
    rows += [("largest", f"{_size(b['bytes'])} {b['array']} {b['from']}") for b in result["largest"]]
    if not result["fits"]:
        rows += [("try", setting) for setting in result["try"]]
    scarce = memory["limit"] and memory["spare"] < SPARE
    rows.append(("fits", "no" if not result["fits"] else f"with less than {SPARE:.0%} spare" if scarce else "yes"))
    return "\n".join(f"{label:16}{text}" for label, text in rows)


def _size(count: float) -> str:
    exponent = min(max(int(math.log2(max(count, 1)) / 10), 0), 3)
    return f"{count / 1024**exponent:,.2f} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"


HEADER = """# Every recipe on every slice

Written by `python -m flip_jax.aot --table=docs/scale.md`, which compiles the train step for the slice, at a batch of
65,536, with the first of these settings that leaves 10 % of the memory free: {ladder}.
`remat` "auto", which the recipes set, finds the policy; `fsdp` is `--config.mesh.fsdp`.
Memory is per device, of what the compiler grants. Time and MFU are bounds of the compiled program, not measurements:
the longest of matrix products at peak rate, memory traffic and links at full bandwidth. Collectives are those of one
step, with the megabytes that each device holds of them. The command adds the rows that are missing.

| recipe | slice | devices | mask | settings | fits | GiB | of | step, ms | bound | MFU | collectives, MB | compile, s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_table(path: pathlib.Path, measure: Callable[[str, str, dict[str, Any]], dict[str, Any]]) -> None:
    """Adds the missing rows to the table at the head of `path`, each by `measure(recipe, topology, settings)`."""
    table, mark, rest = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    lines = table.splitlines()
    known = {tuple(line.split("|")[1:3]): line for line in lines if line.startswith("| ")}
    rows = {key: known[pair] for key in ROWS if (pair := tuple(f" {part} " for part in key)) in known}
    for key in FIRST + [row for row in ROWS if row not in FIRST]:
        if key in rows:
            continue
        missing = most_freed = 0.0
        for settings in LADDER:
            if settings["mesh.fsdp"] > 1 and missing > most_freed:
                continue
            result, used = measure(key[0], SLICES[key[1]], settings), settings
            most_freed = 2 * result["state_bytes"]  # by sharding it, and its gradients with it
            missing = result["memory"]["peak"] - (1 - SPARE) * result["memory"]["limit"]
            if result["fits"] and missing <= 0:
                break
        rows[key] = _row(key, used, result)
        ladder = ", ".join(_settings(step) for step in LADDER)
        text = HEADER.format(ladder=ladder) + "".join(rows[row] + "\n" for row in ROWS if row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(text + mark + rest)
        path.with_suffix(".part").replace(path)


def _row(key, settings, result):
    memory = result["memory"]
    room = "yes" if memory["spare"] >= SPARE else "barely"
    cells = [*key, result["devices"], result["mask_ratio"], _settings(settings), room if result["fits"] else "no"]
    cells += [f"{memory['peak'] / GIB:.1f}", f"{memory['limit'] / GIB:.2f}"]
    if "seconds" in result:
        sent = (f"{c['count']} {c['op']} {'+'.join(c['axes'])} {c['bytes'] / 1e6:.0f}" for c in result["collectives"])
        cells += [
            f"{1e3 * result['least_seconds']:.0f}",
            result["bound_by"],
            f"{result['most_mfu']:.0%}",
            "; ".join(sent),
        ]
    else:
        cells += [""] * 4
    return "| " + " | ".join(map(str, [*cells, f"{result['compile_seconds']:.0f}"])) + " |"


def _settings(step):
    return f"remat {step['model.remat']}" + (f" fsdp {step['mesh.fsdp']}" if step["mesh.fsdp"] > 1 else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line.

    Raises:
      ValueError: one is unknown, missing or cannot be used; the message says which.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Recipe", flag_values=values, lock_config=True, sys_argv=argv)
    flags.DEFINE_string("topology", None, "GENERATION:SHAPE or cpu:DEVICES", flag_values=values)
    flags.DEFINE_bool("json", False, "One JSON object instead of a table", flag_values=values)
    flags.DEFINE_string("table", None, "Write the table of all recipes to this file", flag_values=values)
    try:
        rest = values(argv)[1:]
        if values.config is not None:
            values.config.lock()  # a recipe that could not be read says so at its first use
    except flags.Error as error:
        raise ValueError(error) from error
    except (KeyError, AttributeError, OSError) as error:
        what = " ".join(str(error.args[0]).split())
        raise ValueError(f"--config: {what} (flip_jax/config.py has all settings)") from error
    if rest:
        raise ValueError(f"unexpected arguments: {' '.join(rest)}")
    if not values.table and not (values.config and values.topology):
        raise ValueError("both --config and --topology are needed, or --table")
    return values


def main(argv: list[str]) -> int:
    """The command line, `argv[0]` being the program. Returns the exit code."""
    try:
        values = parse(argv)
        if values.table:
            write_table(pathlib.Path(values.table), _measure)
            return 0
        result = analyse(config_check.from_config_dict(values.config), values.topology)
    except ValueError as error:
        _say(f"error: {error}\nusage: {__doc__.splitlines()[2]}")
        return 2
    print(json.dumps(result) if values.json else describe(result))
    return 0 if result["fits"] else 1


def _measure(recipe, topology, settings):
    _say(f"{recipe} on {topology}, {_settings(settings)}")
    arguments = [f"--config.{key}={value}" for key, value in settings.items()]
    values = parse(["aot", f"--config=configs/{recipe}.py", f"--topology={topology}", *arguments])
    return analyse(config_check.from_config_dict(values.config), topology)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
