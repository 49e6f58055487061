"""Damaged steps: found by their manifest, refused or set aside. Imported only by what reads a step."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from flip_jax import manifest
from flip_jax.runtime import UserError, gather, meet, say

# A setting as old as the manifest: a step that has it in its config was written with a manifest.
AS_OLD = b'"checkpoint.strict"'
SHOWN = 3  # files that are named


def set_aside(directory: epath.Path, strict: bool) -> None:
    """Moves the newest step to damaged-STEP if it is damaged, and those before it until one is whole.

    All processes take part: each checks its share of the files.

    Raises:
      UserError: a step is damaged and the run is `strict`.
    """
    steps = manifest.complete(directory)
    while steps:
        step = directory / str(steps.pop())
        found = gather(f"whole/{step.name}", problems(step, jax.process_index(), jax.process_count()))
        if not found:
            return
        resumed = f"step {steps[-1]}" if steps else "the start, because no step is before it"
        if strict:
            raise UserError(
                f"{_describe(step, found)}. The run is to stop at that (config.checkpoint.strict); without it, the "
                f"step is set aside and the run resumes from {resumed}"
            )
        if jax.process_index() == 0:
            moved, count = directory / f"damaged-{step.name}", 1
            while moved.exists():  # the step was trained again, saved, and damaged again
                count += 1
                moved = directory / f"damaged-{step.name}-{count}"
            step.rename(moved)
            say(f"{_describe(step, found)}. It was moved to {moved.name}; the run resumes from {resumed}")
        meet(f"aside/{step.name}")


def refuse(step: epath.Path) -> None:
    """Raises UserError if a step that is about to be read is damaged."""
    if found := problems(step):
        raise UserError(
            f"{_describe(step, found)}. Give another step, WORKDIR/checkpoints/STEP (flip check WORKDIR lists the "
            "whole ones), or resume the run, which sets it aside"
        )


def problems(step: epath.Path, process: int = 0, processes: int = 1) -> list[str]:
    """Lists what is wrong with a step's files; of several processes each checks its share.

    Nothing is known to be wrong with a step of an earlier version, which has no manifest.
    """
    try:
        wanted = json.loads((step / manifest.NAME).read_bytes())
        names = sorted(wanted)[process::processes]
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: _difference(step / name, wanted[name]), names)
        return [f"{name} {wrong}" for name, wrong in zip(names, found, strict=True) if wrong]
    except FileNotFoundError:
        return [f"{manifest.NAME} is missing"] if _had_manifest(step) else []
    except (OSError, ValueError, TypeError) as error:
        return [f"{manifest.NAME} cannot be read: {error}"]


def _difference(file: epath.Path, wanted: list[int]) -> str:
    """Tells how a file differs from its line in the manifest; empty if it does not."""
    try:
        found = manifest.measure(file)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read: {error}"
    return "" if found == wanted else f"has size and crc32c {found}, not {wanted}"


def _had_manifest(step: epath.Path) -> bool:
    """Tells whether the version that wrote a step wrote manifests; earlier ones ended a step with Orbax's file."""
    try:
        config = (step / "config" / "metadata").read_bytes()
    except OSError:
        config = b""
    return AS_OLD in config or not (config or (step / manifest.ORBAX).exists())


def _describe(step: epath.Path, problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more files" if len(problems) > SHOWN else ""
    return f"{os.fspath(step)} is damaged: {'; '.join(problems[:SHOWN])}{more}"
