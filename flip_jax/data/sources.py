"""The kinds of sources that a setting may name, "KIND:REST", and the order in which their items are read."""

import collections
import hashlib
import importlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain

from flip_jax.config import DataConfig
from flip_jax.data.records import CHUNK, END, Pick, Record

Places = list[list[int]]

# A kind of source is a class and its place here; it is imported when a source of the kind is opened.
KINDS: dict[str, str] = {
    "webdataset": "flip_jax.data.shards:WebDataset",
    "tfrecord": "flip_jax.data.shards:TfRecord",
    "parquet": "flip_jax.data.shards:Parquet",
    "csv": "flip_jax.data.indexed:Csv",
    "folder": "flip_jax.data.indexed:Folder",
    "karpathy": "flip_jax.data.indexed:Karpathy",
    "tfds": "flip_jax.data.indexed:Tfds",
}


class Schedule:
    """What one process reads, without end: `schedule[i]` is computed on the spot.

    An epoch is a new permutation of all items, dealt out to the processes in turn: none is left out or read twice.
    Where items do not divide by processes, some have shorter epochs. ValueError if items are fewer than processes.
    """

    def __init__(self, items: int, seed: int, process_index: int = 0, process_count: int = 1):
        if items < process_count:
            raise ValueError(
                f"config.data.train has {items} shards for {process_count} processes, and each needs its own: write "
                "more shards (python -m flip_jax.prepare_data), or use fewer processes"
            )
        self.per_epoch = len(range(process_index, items, process_count))
        self._last, self._seed, self._index, self._count = items - 1, seed, process_index, process_count

    def __getitem__(self, i: int) -> Pick:
        epoch, j = divmod(i, self.per_epoch)
        position = j * self._count + self._index
        seed = int.from_bytes(hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=4).digest())
        return grain.experimental.index_shuffle(position, max_index=self._last, seed=seed, rounds=4), epoch


def open_source(source: str, data: DataConfig, key: str = "source") -> Any:
    """The source that "KIND:REST" names. ValueError, naming the setting `key`, if it is of no kind or not there."""
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        raise ValueError(f'{key} must be "KIND:REST" with KIND one of {", ".join(KINDS)}; got {source!r}')
    try:
        module, _, name = KINDS[kind].partition(":")
        return getattr(importlib.import_module(module), name)(rest, data)
    except ValueError as error:
        raise ValueError(f"{key} {source!r}: {error}") from error


def in_order(source: Any, indices: Iterator[int]) -> Iterator[Record]:
    """The records of these items, one item after the other."""
    while picks := [(index, 0) for index in itertools.islice(indices, source.at_once)]:
        yield from (record for record, _ in source.read(picks))


def interleave(source: Any, schedule: Schedule, places: Places) -> Iterator[tuple[Places, list[Record]]]:
    """Chunks of records without end, from several entries of the schedule in turn, each read ahead by a thread.

    A place is [entry, offset in it], and the first is the next to be read; at the start [[0, 0], [1, 0], ...]. Yields
    each chunk with the places after it, from which another call goes on. (Grain's InterleaveIterDataset edits the state
    that it is restored from: what is saved after a first resume leads a second one astray.)
    """

    def open_entry(entry, offset):
        picks = [schedule[i] for i in range(entry * source.at_once, (entry + 1) * source.at_once)]
        return read_ahead(entry, source.read(picks, offset))

    def read_ahead(entry, reader):
        return entry, reader, pool.submit(lambda: list(itertools.islice(reader, CHUNK)))

    newest = max(entry for entry, _ in places)
    with ThreadPoolExecutor(len(places), "flip_jax-read") as pool:
        slots = collections.deque(open_entry(*place) for place in places)
        while True:
            entry, reader, future = slots.popleft()
            chunk = future.result()
            if len(chunk) < CHUNK or chunk[-1][1] == END:
                newest += 1
                places = [*places[1:], [newest, 0]]
                slots.append(open_entry(newest, 0))
            else:
                places = [*places[1:], [entry, chunk[-1][1]]]
                slots.append(read_ahead(entry, reader))
            yield places, [record for record, _ in chunk]
