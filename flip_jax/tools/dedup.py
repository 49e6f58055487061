"""Records with the same image, found over all units of a source: `flip prepare --dedup`.

Each unit writes a table of its images' hashes, in their order. A group is a range of hashes: whoever has it reads that
range of every table, so equal images meet in one place, and none holds more than a group.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from flip_jax.tools import spill

GROUP = 2**22  # hashes of a group, about; it takes 0.5 GB
# The rows of a table: both halves of the hash, number in the unit, place in its file, item and offset in the source.
ROWS = 6


def write_table(path: pathlib.Path, rows: list[tuple[bytes, int, int, int]], place: np.ndarray) -> None:
    """Write the table of a unit, from hash, number, item and offset of each record, and its place."""
    table = np.empty((ROWS, len(rows)), np.uint64)
    if rows:
        hashes, *numbers = zip(*rows, strict=True)
        table[:2] = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2).T
        table[2], table[4:], table[3] = numbers[0], numbers[1:], place
    _save(path, table[:, np.lexsort(table[1::-1])])


def _save(path, table):
    new = spill.temporary(path)
    np.ascontiguousarray(table).tofile(new)
    os.replace(new, path)


def _load(path, rows):
    if not path.stat().st_size:  # which cannot be mapped
        return np.zeros((rows, 0), np.uint64)
    return np.memmap(path, np.uint64, "r").reshape(rows, -1)


def groups(records: int) -> int:
    """Return the number of groups for so many records."""
    return max(1, -(-records // GROUP))


def find(tables: Iterable[tuple[int, pathlib.Path]], group: int, count: int, out: pathlib.Path) -> np.ndarray:
    """Write the places of the duplicates in a group, sorted by unit; return unit, number, item, offset of each.

    The first record with an image, in the order of the source, is none.
    """
    parts = [np.zeros((1 + ROWS, 0), np.uint64)]
    for unit, path in tables:
        table = _load(path, ROWS)
        first = np.searchsorted(table[0], np.uint64((group << 64) // count)) if group else 0
        stop = np.searchsorted(table[0], np.uint64((group + 1 << 64) // count)) if group + 1 < count else None
        some = np.array(table[:, first:stop])
        parts.append(np.concatenate([np.full((1, some.shape[1]), unit, np.uint64), some]))
    rows = np.concatenate(parts, axis=1)
    rows = rows[:, np.lexsort((rows[3], rows[0], rows[2], rows[1]))]
    again = np.all(rows[1:3, 1:] == rows[1:3, :-1], axis=0)
    found = rows[:, 1:][:, again]
    _save(out, found[:, np.lexsort((found[4], found[0]))][[0, 4]])
    return found[[0, 3, 5, 6]]


def keep(unit: int, blocks: list[int], duplicates: Iterable[pathlib.Path], out: pathlib.Path) -> dict[str, Any]:
    """Write the places of the records of a unit that are kept, and return how many of each block are."""
    kept = np.ones(sum(blocks), bool)
    for path in duplicates:
        table = _load(path, 2)
        first, stop = np.searchsorted(table[0], np.array([unit, unit + 1], np.uint64))
        kept[table[1, first:stop].astype(np.int64)] = False
    _save(out, np.flatnonzero(kept).astype(np.int64))
    ends = np.cumsum([0, *blocks])
    return {"blocks": [int(kept[a:b].sum()) for a, b in zip(ends, ends[1:], strict=False)]}


def kept(path: pathlib.Path, some: range) -> list[int]:
    """Return the places of some of the kept records of a unit."""
    return np.fromfile(path, np.int64, len(some), offset=8 * some.start).tolist()
