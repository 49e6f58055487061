"""A source cut into units of work: its shards, or some records at a time where it has none."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flip_jax.config import DataConfig
from flip_jax.data import indexed, sources
from flip_jax.data.records import Record

ROWS = 2000  # records of a unit of a source without shards


class Place(NamedTuple):
    """A record and where it is in its source."""

    record: Record
    item: int
    offset: int


class SourceUnits:
    """A source that workers read unit by unit.

    It is pickled for them with the paths of its shards, which are listed once; tables stay here, and workers get the
    rows of their units.
    """

    def __init__(
        self, name: str, source: Any, data: DataConfig, rows: int = ROWS, reopen: Callable[[], Any] | None = None
    ):
        """`reopen` opens a source in a worker that is none of `sources.KINDS`."""
        self.name, self.source, self._rows = name, source, rows
        self._data = source._data if isinstance(source, indexed.Files) else data
        self._kind, _, rest = name.partition(":")
        self._opened_by = None if isinstance(source, indexed.Files) else getattr(source, "paths", rest)
        self._reopen = reopen
        self.items, self.sharded = len(source), source.at_once == 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"source": None}

    def open(self) -> None:
        """Open the source in a worker."""
        if self.source is None and self._reopen:
            self.source = self._reopen()
        elif self.source is None and self._opened_by is not None:
            self.source = sources.class_of(self._kind)(self._opened_by, self._data)

    def __len__(self) -> int:
        return self.items if self.sharded else -(-self.items // self._rows)

    def describe(self, unit: int) -> str:
        """Say which unit it is."""
        if self.sharded and (paths := getattr(self.source, "paths", None)):
            return paths[unit]
        items = self.range(unit)
        return f"{self.name} records {items.start} to {items.stop - 1}"

    def range(self, unit: int) -> range:
        """Return the items of a unit."""
        return range(unit, unit + 1) if self.sharded else range(self.items)[unit * self._rows : (unit + 1) * self._rows]

    def payload(self, unit: int) -> list[Any] | None:
        """Return the rows of a unit of a table, None for other sources, which workers open themselves."""
        if isinstance(self.source, indexed.Files):
            return self.source.rows([(item, 0) for item in self.range(unit)])
        return None

    def read(self, unit: int, rows: list[Any] | None, offset: int = 0) -> Iterator[Place]:
        """Read the records of a unit, of a shard from an offset on."""
        if self.sharded:
            for record, after in self.source.read([(unit, 0)], offset):
                yield Place(record, unit, offset)
                offset = after
            return
        items = iter(self.range(unit))
        if rows is not None:
            yield from (
                Place(record, item, 0) for item, (record, _) in zip(items, indexed.load(rows, self._data), strict=True)
            )
            return
        while some := list(itertools.islice(items, self.source.at_once)):
            found = self.source.read([(item, 0) for item in some])
            yield from (Place(record, item, 0) for item, (record, _) in zip(some, found, strict=True))
