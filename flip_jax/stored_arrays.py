"""Refuses arrays of a checkpoint that would take far more memory than they fill on the disk."""

import math
import os
from typing import Any

import jax
from etils import epath

from flip_jax.runtime import UserError, is_remote

SMALL, RATIO = 2**30, 64  # bytes that are read whatever they fill; weights hardly compress


def checked(step: epath.Path, metadata: Any) -> tuple[str, Any]:
    """Returns the name of a step's weights, and their metadata, from that of its state (None: Orbax cannot read it).

    Where the run kept an average of its weights, "ema", that is taken in the place of "params".

    Raises:
      UserError: there is none; an array in larger chunks than itself, or arrays that are far larger than the files.
    """
    name = "ema" if "ema" in (metadata or {}) else "params"
    saved, size = (metadata or {}).get(name), 0
    if not saved:
        raise UserError(f"{step} has no weights, or says nothing of their shapes: it is damaged; use another step")
    for path, array in jax.tree_util.tree_leaves_with_path(saved):
        size += math.prod(array.shape) * array.dtype.itemsize
        chunk = tuple((array.storage and array.storage.chunk_shape) or array.shape)
        # Reading any part of a chunk unpacks all of it.
        if len(chunk) != len(array.shape) or any(c > max(1, n) for c, n in zip(chunk, array.shape, strict=True)):
            array_name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"{step}: {array_name} of shape {array.shape} is stored in chunks of {chunk}, larger than itself: the "
                "checkpoint is damaged; use another step"
            )
    if size > SMALL and not is_remote(step):
        stored = sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(step) for name in names)
        if size > RATIO * stored:
            raise UserError(
                f"{step}: weights of {size:,} bytes are stored in {stored:,}, at most {RATIO} times as many are read: "
                "the checkpoint is damaged or incomplete; use another step"
            )
    return name, saved
