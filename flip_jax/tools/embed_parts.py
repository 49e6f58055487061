"""The parts that `flip embed` writes: the embeddings of the records of a unit, and where each record is."""

import collections
import itertools
import pathlib
from typing import Any

import numpy as np

from flip_jax import inference
from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.data.records import END
from flip_jax.runtime import UserError
from flip_jax.tools import index as index_lib
from flip_jax.tools.source_units import SourceUnits
from flip_jax.tools.unit_workers import Watch

IN_FLIGHT = 2  # batches queued on the devices before the first is waited for
END_OF_UNIT = (None, None, None)


class Parts:
    """The parts of the units of a source, which a worker writes.

    A unit is one shard, or `rows_per_part` records of a source without shards; a part holds at most `rows_per_part`
    records of one unit and stores where the next begins. So the files do not depend on the number of workers, and
    nothing is read twice.
    """

    def __init__(self, out: pathlib.Path, source: SourceUnits, data: DataConfig, settings: dict[str, Any]):
        self._out, self._source, self._data = out, source, data
        self._rows, self._texts = settings["rows_per_part"], settings["embedded"] == "texts"
        self._dtype = settings["dtype"]

    def write(
        self, encoder: inference.Encoder, unit: int, rows: list[Any] | None, watch: Watch, batch_size: int
    ) -> int:
        """Write the missing parts of a unit; return the number of records that were read."""
        size = encoder.config.model.image.image_size

        def prepare(record):
            """Return (texts, image or text) of each row, or the kind of a bad record."""
            if "bad" in record:
                return record["bad"]
            if self._texts:
                return [([text], text) for text in record["texts"]] or "no text"
            try:
                return [(record["texts"], transforms.decode(record["image"], size, self._data))]
            except transforms.BadImage as error:
                return str(error)

        block, offset = self.written(unit)
        if offset == END:
            return 0
        batches = _Batches(encoder, self._texts, batch_size)
        columns, bad, read, done = collections.defaultdict(list), [], 0, 0
        # A table's part is its whole unit, so an offset is always one in a shard.
        places = self._source.read(unit, rows, offset)
        found = watch(prepare, places, lambda place: place.offset if self._source.sharded else place.item)
        pairs = itertools.pairwise(itertools.chain(found, [END_OF_UNIT]))
        for (_, (record, item, at), result), (_, following, _) in pairs:
            read += 1
            prepared = result.result()
            if isinstance(prepared, str):
                bad.append((record["key"], prepared))
                prepared = []
            for texts, value in prepared:
                for name, cell in (("key", record["key"]), ("texts", texts), ("item", item), ("offset", at)):
                    columns[name].append(cell)
                batches.add(value)
            if read == self._rows or not following:
                meta = {"next": following.offset if following else END, "read": read, "bad": bad}
                self.save(index_lib.part_name(unit, block), columns, batches.take(), meta)
                columns, bad, read, done, block = collections.defaultdict(list), [], 0, done + read, block + 1
        return done

    def written(self, unit: int) -> tuple[int, int]:
        """Return (number of parts, offset of the next one) of a unit."""
        block = offset = 0
        while offset != END and (path := index_lib.part_path(self._out, index_lib.part_name(unit, block))).exists():
            block, offset = block + 1, index_lib.part_info(path)["next"]
        return block, offset

    def save(self, name: str, columns: dict[str, list[Any]], embedding_RxE: np.ndarray, meta: dict[str, Any]) -> None:
        """Write a part; UserError if an embedding is not finite."""
        if not np.isfinite(embedding_RxE).all():
            raise UserError(f"{name}: the model's embeddings are not finite: use an earlier step of the run")
        path = index_lib.part_path(self._out, name)
        index_lib.write_part(path, columns, embedding_RxE.astype(self._dtype), meta)


class _Batches:
    """Embeds images or texts in batches of one shape; a few are on the devices while the next is prepared."""

    def __init__(self, encoder, texts, batch_size):
        self._encoder, self._texts, self._size = encoder, texts, batch_size
        self._waiting, self._flying, self._done = [], [], []

    def add(self, value):
        self._waiting.append(value)
        if len(self._waiting) == self._size:
            self._start()

    def take(self):
        """Return the embeddings of everything added since the last call, [rows, embed_dim] f32."""
        rows = self._size * (len(self._done) + len(self._flying)) + len(self._waiting)
        if self._waiting:
            self._start()
        done = self._done + [np.asarray(array) for array in self._flying]
        self._flying, self._done = [], []
        width = self._encoder.config.model.embed_dim
        return np.concatenate([np.zeros((0, width), np.float32), *done])[:rows]

    def _start(self):
        blank = "" if self._texts else np.zeros_like(self._waiting[0])
        batch = self._waiting + [blank] * (self._size - len(self._waiting))
        encode = self._encoder.encode_text if self._texts else self._encoder.encode_image
        self._flying.append(encode(batch if self._texts else np.stack(batch)))
        self._waiting = []
        if len(self._flying) > IN_FLIGHT:
            self._done.append(np.asarray(self._flying.pop(0)))
