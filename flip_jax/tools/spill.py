"""The files between the passes of `flip prepare`: the records of a unit that were kept, in a random order.

A file holds packed records, then an entry of the index for each, then what is to be known about the unit, as JSON, and
the lengths of both. Records are shuffled in blocks of about `HELD` bytes, so any run of consecutive records is a random
part of its block: each output shard takes one run of each block, with two reads.
"""

import contextlib
import json
import os
import pathlib
import random
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np

HELD = 2**28  # bytes held in memory before they are written
ENTRY = np.dtype([("number", "<i8"), ("end", "<i8")])
_LENGTHS = struct.Struct("<QQ")  # of the index and of the JSON
Parts = list[tuple[str, bytes]]  # extension and content of each file of a sample


class Block(NamedTuple):
    """Records that were shuffled together: of which unit, from which kept record on, and how many are kept."""

    unit: int
    first: int
    count: int


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Return where a process writes a file before it moves it into place; no other process writes there."""
    return path.with_name(f"new-{path.name}-{socket.gethostname()}-{os.getpid()}")


class Writer:
    """Writes the file of a unit, which appears once `finish` is called."""

    def __init__(self, path: pathlib.Path, seed: str):
        self._path, self._new, self._seed = path, temporary(path), seed
        self._file = open(self._new, "wb", buffering=2**20)
        self._block: list[tuple[int, bytes]] = []  # number in the unit, packed content
        self._held, self._end, self.added = 0, 0, 0
        self._blocks: list[int] = []  # numbers of records
        self._index: list[np.ndarray] = []
        self._order: list[np.ndarray] = []  # of each block, which of the records added is at each place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind:
            with contextlib.suppress(OSError):  # the disk is full, which is what ends this
                self._file.close()
            self._new.unlink(missing_ok=True)

    def add(self, number: int, parts: Parts) -> None:
        """Add a record by its number in the unit."""
        content = msgpack.packb(parts)
        self._block.append((number, content))
        self._held += len(content)
        self.added += 1
        if self._held >= HELD:
            self._flush()

    def _flush(self):
        order = list(range(len(self._block)))
        random.Random(f"{self._seed}/block {len(self._blocks)}").shuffle(order)
        entries = np.empty(len(order), ENTRY)
        for i, at in enumerate(order):
            number, content = self._block[at]
            self._file.write(content)
            self._end += len(content)
            entries[i] = number, self._end
        self._order.append(np.array(order, np.int64) + sum(self._blocks))
        self._index.append(entries)
        self._blocks.append(len(order))
        self._block, self._held = [], 0

    def shuffle(self) -> np.ndarray:
        """Write what is held, and return at which place each of the records that were added is."""
        if self._block:
            self._flush()
        return np.argsort(np.concatenate([np.zeros(0, np.int64), *self._order]))

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Complete the file and move it into place. Returns `about` with the numbers of records per block."""
        if self._block:
            self._flush()
        about = about | {"blocks": self._blocks}
        index, text = b"".join(part.tobytes() for part in self._index), json.dumps(about).encode()
        self._file.write(index + text + _LENGTHS.pack(len(index), len(text)))
        self._file.close()
        os.replace(self._new, self._path)
        return about


class Reader:
    """Reads the file of a unit."""

    def __init__(self, path: pathlib.Path):
        self._file = os.open(path, os.O_RDONLY)
        size = os.fstat(self._file).st_size
        index, self._text = _LENGTHS.unpack(_read(self._file, _LENGTHS.size, size - _LENGTHS.size))
        self._about = size - _LENGTHS.size - self._text
        self._index = self._about - index

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)

    def about(self) -> dict[str, Any]:
        """Return what is to be known about the unit."""
        return json.loads(_read(self._file, self._text, self._about))

    def records(self, place: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (number in the unit, packed content) of the records at these places, which ascend."""
        # A record begins where the one before it ends. Between the places are duplicates, which are read and dropped.
        first, stop = int(place[0]), int(place[-1]) + 1
        before = 1 if first else 0
        offset = self._index + (first - before) * ENTRY.itemsize
        entries = np.frombuffer(_read(self._file, (stop - first + before) * ENTRY.itemsize, offset), ENTRY)
        ends = entries["end"].tolist() if before else [0, *entries["end"].tolist()]
        numbers = entries["number"][before:].tolist()
        data = memoryview(_read(self._file, ends[-1] - ends[0], ends[0]))
        for at in place:
            i = int(at) - first
            yield numbers[i], bytes(data[ends[i] - ends[0] : ends[i + 1] - ends[0]])


def _read(descriptor, size, offset):
    parts = []
    while size > 0:  # a system reads at most 2 GiB at once
        part = os.pread(descriptor, size, offset)
        if not part:
            raise EOFError("a file of the first pass is shorter than it was written")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def deal(blocks: list[Block], shards: int, shard: int) -> Iterator[tuple[Block, range]]:
    """Yield each block that has records for a shard, and which of the unit's kept records they are.

    A block is cut into as many runs as there are shards, as long as each other or longer by one. The longer runs go to
    the shards in turn, on and on, so that the shards' sizes differ by at most one record.
    """
    turn = 0
    for block in blocks:
        least, longer = divmod(block.count, shards)
        place = (shard - turn) % shards
        first = block.first + place * least + min(place, longer)
        if least or place < longer:
            yield block, range(first, first + least + (place < longer))
        turn = (turn + longer) % shards
