"""Tells whether the files of a source are those that a run was started with, wherever they are now."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flip_jax.data import paths
from flip_jax.runtime import UserError

LOOKED_AT = 16  # files of a source, spread evenly over its list
PART = 2**16  # bytes at the start and at the end of each


def of(files: Sequence[str]) -> dict[str, Any]:
    """Returns the number of files, a hash of their names, and for some of them name, size and a hash of both ends.

    A file that cannot be read now has no size and no hash. UserError if none of several can be read.
    """
    names = "\n".join(map(os.path.basename, files))
    count = min(LOOKED_AT, len(files))
    chosen = [files[i * (len(files) - 1) // max(1, count - 1)] for i in range(count)]
    with ThreadPoolExecutor(LOOKED_AT, "flip_jax-look") as pool:
        looked_at = list(pool.map(_look, chosen))
    if looked_at and all(isinstance(found, OSError) for found in looked_at):
        raise UserError(f"config.data.train: {chosen[0]} cannot be read: {paths.remedy(looked_at[0])}")
    some = [
        [os.path.basename(path), *([None, None] if isinstance(found, OSError) else found)]
        for path, found in zip(chosen, looked_at, strict=True)
    ]
    return {
        "files": len(files),
        "names": hashlib.blake2b(names.encode(errors="replace"), digest_size=8).hexdigest(),
        "some": some,
    }


def _look(path):
    """Returns the size of a file and a hash of its ends, or the error."""
    try:
        with paths.open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(PART)
            file.seek(max(0, size - PART))
            return [size, hashlib.blake2b(head + file.read(PART), digest_size=8).hexdigest()]
    except OSError as error:
        return error


def compare(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    """Refuses sources whose files differ from those of a saved data position.

    Raises:
      UserError: what differs.
    """
    problems = [] if len(saved) == len(ours) else [f"{len(saved)} sources, now {len(ours)}"]
    for number, (then, now) in enumerate(zip(saved, ours, strict=False), 1):
        for key in ("kind", "weight", "files"):
            if then.get(key) != now.get(key):
                problems.append(f"source {number}: {key} {then.get(key)}, now {now.get(key)}")
        pairs = zip(then.get("some", ()), now.get("some", ()), strict=False)
        for (name, size, digest), (our_name, our_size, our_digest) in pairs:
            if name != our_name:
                problems.append(f"{name}, now {our_name}")
            elif None not in (size, our_size) and size != our_size:
                problems.append(f"{name}: {size:,} bytes, now {our_size:,}")
            elif None not in (digest, our_digest) and digest != our_digest:
                problems.append(f"{name}: other content of the same size")
        if then.get("names") != now.get("names") and not problems:
            problems.append(f"source {number}: other file names, or in another order")
    if problems:
        raise UserError(
            "the data position was saved with other data in config.data.train:\n"
            + "".join(f"  {problem}\n" for problem in problems[:10])
            + "Data may move, but names, sizes, contents and order must stay the same; restore them, or start a new "
            "run with config.init_from"
        )
