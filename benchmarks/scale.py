"""Write docs/scale.md: every recipe on a slice of every TPU generation, by the compiler.

python -m benchmarks.scale docs/scale.md        (pip install libtpu; no TPU is needed; one to five minutes per row)

Rows that the page already has are kept, and so is everything after its first "## " heading, so a stopped run can be
started again. Delete a row to measure it again.
"""

import argparse
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import pages
from flip_jax import config_check
from flip_jax.memory import ON_ACCELERATORS, SPARE
from flip_jax.tools import aot

RECIPES = ("flip_b16", "flip_l14", "flip_l16", "flip_h14", "clip_b16", "clip_l14", "clip_l16")
SLICES = {
    "v3-256": "v3:16x8",
    "v4-256": "v4:4x4x8",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
    "tpu7x-128": "tpu7x:4x4x4",
    "v3-512": "v3:16x16",
}
ROWS = [(recipe, name) for recipe in RECIPES for name in SLICES if recipe == "flip_h14" or name != "v3-512"]
FIRST = [("flip_l16", "v3-256"), ("flip_h14", "v3-512")]  # the paper's own
Settings = dict[str, Any]
# The policies that remat "auto" tries, from the least recompute to the least memory, each without and with fsdp.
LADDER: list[Settings] = [{"model.remat": remat, "mesh.fsdp": fsdp} for remat in ON_ACCELERATORS for fsdp in (1, 8)]
HEADER = """# Every recipe on every slice

Written by `python -m benchmarks.scale docs/scale.md`, which adds missing rows. It compiles the train step for the
slice at a batch of 65,536, with the first of these settings that leaves 10 % of the memory free:
{ladder}.
`remat` "auto", which the recipes set, finds the policy; `fsdp` is `--config.mesh.fsdp`.

Memory is per device, next to what the compiler grants. Time and MFU are bounds from the compiled program, not
measurements: the longest of matrix products at peak rate, memory traffic at full bandwidth and collectives at full link
speed. Collectives are those of one step, with the megabytes that each device holds. A v3 or TPU7x chip is two devices.

| recipe | slice | devices | mask | settings | fits | GiB | of | step, ms | bound | MFU | collectives, MB | compile, s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_table(path: pathlib.Path, measure: Callable[[str, str, Settings], dict[str, Any]]) -> None:
    """Add the missing rows to the table at the head of `path`, each by `measure(recipe, topology, settings)`."""
    table = path.read_text().partition("\n## ")[0] if path.exists() else ""
    known = {tuple(line.split(" | ")[:2]): line for line in table.splitlines()}
    rows = {(recipe, name): known.get((f"| {recipe}", name)) for recipe, name in ROWS}
    for recipe, name in FIRST + ROWS:
        if rows[recipe, name]:
            continue
        settings, result = first_that_fits(functools.partial(measure, recipe, SLICES[name]))
        rows[recipe, name] = format_row(recipe, name, settings, result)
        ladder = ", ".join(map(format_settings, LADDER))
        path.parent.mkdir(parents=True, exist_ok=True)
        pages.write(path, HEADER.format(ladder=ladder) + "".join(f"{row}\n" for row in rows.values() if row))


def first_that_fits(measure: Callable[[Settings], dict[str, Any]]) -> tuple[Settings, dict[str, Any]]:
    """Return the first settings of `LADDER` that leave `SPARE` of the memory free, or the last, and their result."""
    missing = most_freed = 0.0
    for settings in LADDER:
        if settings["mesh.fsdp"] > 1 and missing > most_freed:
            continue  # sharding could not free enough, so compiling it would waste minutes
        used, result = settings, measure(settings)
        most_freed = 2 * result["state_bytes"]  # sharding frees at most the state, and gradients of its size
        missing = result["memory"]["peak"] - (1 - SPARE) * result["memory"]["limit"]
        if result["fits"] and missing <= 0:
            break
    return used, result


def format_row(recipe: str, name: str, settings: Settings, result: dict[str, Any]) -> str:
    """Format the line of one recipe on one slice."""
    memory = result["memory"]
    fits = "no" if not result["fits"] else "yes" if memory["spare"] >= SPARE else "barely"
    cells = [recipe, name, result["devices"], result["mask_ratio"], format_settings(settings), fits]
    cells += [f"{memory['peak'] / aot.GIB:.1f}", f"{memory['limit'] / aot.GIB:.2f}"]
    if "seconds" in result:
        sent = (f"{c['count']} {c['op']} {'+'.join(c['axes'])} {c['bytes'] / 1e6:.0f}" for c in result["collectives"])
        cells += [f"{1e3 * result['least_seconds']:.0f}", result["bound_by"], f"{result['most_mfu']:.0%}"]
        cells += ["; ".join(sent)]
    else:
        cells += [""] * 4
    return "| " + " | ".join(map(str, [*cells, f"{result['compile_seconds']:.0f}"])) + " |"


def format_settings(settings: Settings) -> str:
    """Format one step of `LADDER`."""
    fsdp = f" fsdp {settings['mesh.fsdp']}" if settings["mesh.fsdp"] > 1 else ""
    return f"remat {settings['model.remat']}{fsdp}"


def compile_recipe(recipe: str, topology: str, settings: Settings) -> dict[str, Any]:
    """Compile a recipe with changed settings for a topology."""
    print(f"{recipe} on {topology}, {format_settings(settings)}", file=sys.stderr, flush=True)
    changes = ",".join(f"{key}={value}" for key, value in {"microbatches": 1, **settings}.items())
    config = config_check.from_config_dict(importlib.import_module(f"configs.{recipe}").get_config(changes))
    return aot.analyse(config, topology)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=pathlib.Path, help="the page to write")
    write_table(parser.parse_args().path, compile_recipe)
