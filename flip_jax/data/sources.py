"""The kinds of sources that a setting may name as "KIND:REST", and the order in which their items are read."""

import collections
import hashlib
import importlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flip_jax.config import DataConfig
from flip_jax.data.records import Pick, Record, is_last, take_chunk
from flip_jax.runtime import UserError

Places = list[list[int]]  # [entry of the schedule, offset in it] of each item that is being read

TEXT_FILE = "text file (.txt)"  # the caption name of a member of a tar

# The module and class of each kind; it is imported when a source of that kind is opened.
KINDS: dict[str, str] = {
    "webdataset": "flip_jax.data.shards:WebDataset",
    "tfrecord": "flip_jax.data.shards:TfRecord",
    "parquet": "flip_jax.data.tables:Parquet",
    "csv": "flip_jax.data.tables:Csv",
    "folder": "flip_jax.data.indexed:Folder",
    "karpathy": "flip_jax.data.indexed:Karpathy",
    "tfds": "flip_jax.data.indexed:Tfds",
}


class Schedule:
    """The endless sequence of items that one process reads; `schedule[i]` is computed when asked for.

    An epoch is a new permutation of all items, dealt to the processes in turn, so that each item is read once. Where
    items do not divide by processes, some processes have shorter epochs. UserError if there are fewer items than
    processes.
    """

    def __init__(self, items: int, seed: int, process_index: int = 0, process_count: int = 1):
        if items < process_count:
            raise UserError(
                f"config.data.train has {items} shards for {process_count} processes, and each needs its own: write "
                "more shards (`flip prepare SOURCE OUT --shards=N`), or use fewer processes"
            )
        import grain  # it imports JAX, which worker processes do not need

        self._shuffle = grain.experimental.index_shuffle
        self.per_epoch = len(range(process_index, items, process_count))
        self._last, self._seed, self._index, self._count = items - 1, seed, process_index, process_count

    def __getitem__(self, i: int) -> Pick:
        epoch, j = divmod(i, self.per_epoch)
        position = j * self._count + self._index
        seed = int.from_bytes(hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=4).digest())
        return self._shuffle(position, max_index=self._last, seed=seed, rounds=4), epoch


def open_source(source: str, data: DataConfig, key: str = "source") -> Any:
    """Opens the source that "KIND:REST" names. UserError, with the setting's name `key`, if it cannot be opened."""
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        raise UserError(f'{key} must be "KIND:REST" with KIND one of {", ".join(KINDS)}; got {source!r}')
    rest = os.path.expanduser(rest)  # the shell expands "~" only at the start of a word
    data = with_keys(data, kind, key == "config.data.train")
    try:
        return class_of(kind)(rest, data)
    except (UserError, OSError) as error:  # OSError: the system or the store refuses a path of the source
        raise UserError(f"{key} {source!r}: {error}") from None


def with_keys(data: DataConfig, kind: str, training: bool = True) -> DataConfig:
    """Separates the weights of `data.captions` from the keys, where they have some."""
    if not any("*" in name for name in data.captions):
        return data
    from flip_jax.data import caption_mix  # only runs that draw from several keys need it

    return caption_mix.opened(kind, data, training)


def class_of(kind: str) -> Any:
    """Imports the class of one of `KINDS`."""
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def caption_name(source: Any, record: Record) -> str:
    """Returns the column, key or file that the captions of a record come from, "" if the source does not say."""
    names, place = getattr(source, "caption_names", ()), record.get("caption", -1)
    return names[place] if 0 <= place < len(names) else ""


def describe_captions(source: Any, record: Record) -> str:
    """Says in a line where a record's captions come from, with an example; control characters are escaped."""
    texts, name = record["texts"], caption_name(source, record) or "the source"
    kind = "one text" if len(texts) == 1 else f"{len(texts)} texts"
    count = f"{len(source):,} records; " if source.at_once > 1 else ""  # of shards it is not known before they are read
    return f"{count}captions come from {name}, {kind} in the first, such as {texts[0][:100]!r}"


def in_order(source: Any, indices: Iterator[int]) -> Iterator[Record]:
    """Reads the records of these items, one item after the other."""
    while picks := [(index, 0) for index in itertools.islice(indices, source.at_once)]:
        yield from (record for record, _ in source.read(picks))


def interleave(source: Any, schedule: Schedule, places: Places) -> Iterator[tuple[Places, list[Record]]]:
    """Reads chunks of records without end, from several entries of the schedule in turn, each read ahead by a thread.

    The first of `places` is read next; at the start they are [[0, 0], [1, 0], ...]. Yields each chunk with the places
    after it, from which another call resumes.
    """
    # Why not Grain's InterleaveIterDataset and WindowShuffleIterDataset: a window saved after a resume must resume,
    # too. https://github.com/google/grain/issues/1178 is fixed in Grain 0.2.18, but its interleave still edits the
    # state it was restored from, which is the window's saved start. Measured with 0.2.18 on five shards of 3 to 70
    # records: every first resume was exact, and 33 of 307 second resumes gave other samples.

    # An entry is `at_once` items of the schedule: one shard, or a chunk of single records.
    def open_entry(entry, offset):
        picks = [schedule[i] for i in range(entry * source.at_once, (entry + 1) * source.at_once)]
        return read_ahead(entry, source.read(picks, offset))

    def read_ahead(entry, reader):
        return entry, reader, pool.submit(take_chunk, reader)

    newest = max(entry for entry, _ in places)
    with ThreadPoolExecutor(len(places), "flip_jax-read") as pool:
        slots = collections.deque(open_entry(*place) for place in places)
        while True:
            entry, reader, future = slots.popleft()
            chunk = future.result()
            if is_last(chunk):
                # This entry is read to its end: the next one of the schedule takes its slot.
                newest += 1
                places = [*places[1:], [newest, 0]]
                slots.append(open_entry(newest, 0))
            else:
                places = [*places[1:], [entry, chunk[-1][1]]]
                slots.append(read_ahead(entry, reader))
            yield places, [record for record, _ in chunk]
