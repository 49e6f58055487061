"""A saved step's folder, as tools and runs that start from it find and read it."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from flip_jax import checkpoint, damage, manifest, untrusted
from flip_jax.data.tokenizer import Tokenizer


def newest(path: str | os.PathLike) -> epath.Path:
    """Finds the folder that `path` means: a step or another model itself, or the newest step of that workdir.

    Raises:
      UserError: there is no complete checkpoint nor another model, or it is damaged.
    """
    hub = os.fspath(path).startswith("hf://")
    step = checkpoint.absolute(path)
    if hub or not (step / "state").is_dir():
        steps = [] if hub else manifest.complete(step / "checkpoints")
        if not steps:
            from flip_jax.formats import folders

            return folders.find(path)
        step = step / "checkpoints" / str(steps[-1])
    untrusted.check_folder(step)
    damage.refuse(step)
    return step


def tokenizer(step: epath.Path) -> Tokenizer | None:
    """Reads the tokenizer of a step's folder; None for a classifier, which reads no text."""
    content = read_json(step, "tokenizer")
    return Tokenizer.from_json(content) if content else None


def read_json(step: epath.Path, item: str) -> Any:
    """Reads an item of a step's folder that is JSON."""
    if not (step / item).exists():  # a model of another kind
        from flip_jax.formats import folders

        return folders.read_json(step, item)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(step / item)


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, saved, ours) of every entry that differs; None where one side has none."""
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            yield name, saved.get(name), ours.get(name)
