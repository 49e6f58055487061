"""Write the embeddings of a data set's images, or of its captions, to Parquet files.

OUT/part-UNIT-BLOCK.parquet hold a row per image, or with --texts a row per caption, in the order of the source: key,
texts, item and offset (where the record is in the source), embedding. OUT/index.json names the model and the source.
After an interruption the same command resumes, and writes the same bytes. `flip search` finds what is nearest to a text
or an image.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flip_jax import inference, lock, runtime
from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms
from flip_jax.data.records import CHUNK, END, Pick, Record
from flip_jax.runtime import UserError
from flip_jax.tools import index as index_lib
from flip_jax.tools import options

EXAMPLE = "flip embed --model=runs/b16 --source='webdataset:/data/pairs/{00000..00127}.tar' --out=index"

IN_FLIGHT = 2  # batches queued on the devices before the first is waited for


class Lines:
    """The lines of a text file, held in memory, as a source; keys are line numbers from 1."""

    at_once = CHUNK

    def __init__(self, path: str):
        lines = pathlib.Path(path).read_bytes().split(b"\n")
        self._lines = lines if lines[-1] else lines[:-1]

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Yield the picked lines; blank ones and those that are not UTF-8 are bad records."""
        for index, epoch in picks:
            record = {"key": str(index + 1), "epoch": epoch}
            try:
                text = self._lines[index].decode().strip()
            except UnicodeError:
                yield record | {"bad": "not UTF-8"}, END
            else:
                yield record | ({"texts": [text]} if text else {"bad": "no text"}), END


def open_source(source: str, data: DataConfig, texts: bool) -> Any:
    """Open KIND:REST as in training, or for texts also a text file with one text per line.

    Raises:
      UserError: it is neither.
    """
    if texts and os.path.isfile(source):
        return Lines(source)
    if texts and source.partition(":")[0] not in sources.KINDS:
        kinds = ", ".join(sources.KINDS)
        raise UserError(
            f"--source {source!r} is neither a text file with one text per line nor KIND:REST with KIND one of {kinds}"
        )
    return sources.open_source(source, data, "--source")


class Place(NamedTuple):
    """A record and where it is in its source; the last of a part has `ends`: (part, offset of the next part)."""

    record: Record
    item: int
    offset: int
    ends: tuple[str, int] | None = None


class Embedding:
    """The folder OUT and the parts to be written to it.

    A unit of work is one shard, or `rows_per_part` records of a source without shards; a part holds at most
    `rows_per_part` records of one unit and stores where the next begins. So the files do not depend on the number of
    processes, and nothing is read twice.
    """

    def __init__(
        self,
        out: pathlib.Path,
        source: Any,
        data: DataConfig,
        identity: dict[str, Any],
        model: str,
        process: int = 0,
    ):
        """`identity` is what must agree before an earlier run in `out` is resumed."""
        self._out, self._source, self._data, self._process = out, source, data, process
        self._rows, self._texts = identity["rows_per_part"], identity["embedded"] == "texts"
        self._dtype = identity["dtype"]
        if not len(source):
            raise UserError(f"--source {identity['source']!r} is empty")
        self.units = len(source) if source.at_once == 1 else -(-len(source) // self._rows)
        options.make_folder("--out", out)
        names = {name for name in os.listdir(out) if not name.endswith(".new") and not name.startswith(lock.NAME)}
        if index_lib.INDEX in names:
            self.index = index_lib.read_index(out / index_lib.INDEX)
            for key, ours in identity.items():
                if self.index.get(key) != ours:
                    raise UserError(
                        f"--out {str(out)!r} was started with {key} {self.index.get(key)!r}, not {ours!r} "
                        f"(its model: {self.index.get('model')}): use another folder"
                    )
        elif names:
            raise UserError(f"--out {str(out)!r} is not empty and not from this command: use another folder")
        else:
            self.index = {"model": model, **identity}
            self._write_index()

    def run(self, encoder: inference.Encoder, units: Sequence[int], batch_size: int) -> None:
        """Write the missing parts of these units."""
        size = encoder.config.model.image.image_size

        def prepare(place):
            """Return (texts, image or text) of each row, or the kind of a bad record."""
            record = place.record
            if "bad" in record:
                return record["bad"]
            if self._texts:
                return [([text], text) for text in record["texts"]] or "no text"
            try:
                return [(record["texts"], transforms.decode(record["image"], size, self._data))]
            except transforms.BadImage as error:
                return str(error)

        batches = _Batches(encoder, self._texts, batch_size)
        columns, bad, read = collections.defaultdict(list), [], 0
        todo = [unit for unit in units if self._written(unit)[1] != END]
        if len(todo) < len(units):
            print(f"{self._out} already holds {len(units) - len(todo)} of {len(units)} units of work")
        with ThreadPoolExecutor() as pool, tqdm(unit=" records", mininterval=1) as bar:
            places = self._places(todo, bar)
            for (record, item, offset, ends), prepared in _ahead(pool, prepare, places, 2 * batch_size):
                read += 1
                bar.update()
                if isinstance(prepared, str):
                    bad.append((record["key"], prepared))
                    prepared = []
                for texts, value in prepared:
                    for name, cell in (("key", record["key"]), ("texts", texts), ("item", item), ("offset", offset)):
                        columns[name].append(cell)
                    batches.add(value)
                if ends:
                    self._write(ends[0], columns, batches.take(), {"next": ends[1], "read": read, "bad": bad})
                    columns, bad, read = collections.defaultdict(list), [], 0

    def _places(self, units, bar):
        """Yield the records of the missing parts of these units, and keep the progress bar's total up to date."""
        for done, unit in enumerate(units):
            # A shard's size is unknown until it is read: extrapolate from those read so far.
            bar.total = round(bar.n / done * len(units)) if done else None
            items = [unit]
            if self._source.at_once > 1:
                items = self._records(unit)
                bar.total = sum(map(len, map(self._records, units)))
            first, offset = self._written(unit)
            found = itertools.chain(self._unit(items, offset), [None])
            for i, (place, following) in enumerate(itertools.pairwise(found), 1):
                if i % self._rows and following:
                    yield place
                else:
                    name = index_lib.part_name(unit, first + (i - 1) // self._rows)
                    yield place._replace(ends=(name, following.offset if following else END))

    def _records(self, unit):
        """Return the items of a unit of a source without shards."""
        return range(unit * self._rows, min((unit + 1) * self._rows, len(self._source)))

    def _unit(self, items, offset):
        """Yield the records of a shard from an offset on, or of several items of one record each."""
        items = iter(items)
        while some := list(itertools.islice(items, self._source.at_once)):
            found = self._source.read([(item, 0) for item in some], offset)
            if self._source.at_once > 1:
                yield from (Place(record, item, 0) for item, (record, _) in zip(some, found, strict=True))
                continue
            for record, after in found:
                yield Place(record, some[0], offset)
                offset = after

    def _written(self, unit):
        """Return (number of parts, offset of the next one) of a unit."""
        offset = 0
        for block in itertools.count():
            path = index_lib.part_path(self._out, index_lib.part_name(unit, block))
            if offset == END or not path.exists():
                return block, offset
            offset = index_lib.part_info(path)["next"]

    def _write(self, name, columns, embedding_RxE, meta):
        if not np.isfinite(embedding_RxE).all():
            raise UserError(f"{name}: the model's embeddings are not finite: use an earlier step of the run")
        path = index_lib.part_path(self._out, name)
        index_lib.write_part(path, columns, embedding_RxE.astype(self._dtype), meta, self._process)

    def _write_index(self):
        content = json.dumps(self.index, indent=1) + "\n"
        index_lib.write_text(self._out / index_lib.INDEX, content, self._process)

    def finish(self) -> bool:
        """Complete index.json if all units of all processes are written; return whether they are."""
        parts, bad, read = {}, [], 0
        for unit in range(self.units):
            blocks, offset = self._written(unit)
            if offset != END:
                return False
            for block in range(blocks):
                name = index_lib.part_name(unit, block)
                meta = index_lib.part_info(index_lib.part_path(self._out, name))
                parts[name] = meta["rows"]
                bad += meta["bad"]
                read += meta["read"]
        kinds = dict(sorted(Counter(kind for _, kind in bad).items()))
        if not sum(parts.values()):
            raise UserError(f"none of the {read} records of {self.index['source']!r} can be used: {kinds}")
        if bad:
            lines = "".join(json.dumps({"key": key, "bad": kind}) + "\n" for key, kind in bad)
            index_lib.write_text(self._out / index_lib.BAD, lines, self._process)
        self.index |= {"rows": sum(parts.values()), "read": read, "bad": kinds, "parts": parts}
        self._write_index()
        return True


def write_index(
    encoder: inference.Encoder,
    model: str,
    source: Any,
    data: DataConfig,
    out: pathlib.Path,
    *,
    name: str,
    texts: bool = False,
    dtype: str = "float32",
    rows_per_part: int = 10_000,
    batch_size: int = 256,
    process: int = 0,
    processes: int = 1,
) -> dict[str, Any] | None:
    """Embed a source, or one process's share of it, into the folder `out`; resume if it was started.

    `name` and `model` are what index.json calls the source and the model's folder. Returns the contents of index.json,
    or None while other processes have parts to write.

    Raises:
      UserError: `out` holds something else, or no record can be used.
    """
    identity = {
        "source": name,
        "items": len(source),
        "embedded": "texts" if texts else "images",
        "dtype": dtype,
        "embed_dim": encoder.config.model.embed_dim,
        "rows_per_part": rows_per_part,
        **index_lib.identity(encoder),
    }
    embedding = Embedding(out, source, data, identity, os.path.abspath(model), process)
    embedding.run(encoder, range(process, embedding.units, processes), batch_size)
    return embedding.index if embedding.finish() else None


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


def _ahead(pool: Executor, function: Any, values: Iterator[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """Yield (value, function of it) in order, computing up to `count` of them ahead."""
    waiting = collections.deque()
    for value in values:
        waiting.append((value, pool.submit(function, value)))
        if len(waiting) > count:
            value, future = waiting.popleft()
            yield value, future.result()
    for value, future in waiting:
        yield value, future.result()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip embed`."""
    options.add_model(parser)
    parser.add_argument("--source", required=True, help="data set, KIND:REST, or with --texts a text file")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR", help="folder for the embeddings")
    parser.add_argument("--texts", action="store_true", help="embed captions, or the lines of a text file")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the embeddings (default: float32)"
    )
    parser.add_argument(
        "--rows", type=options.positive, default=10_000, metavar="N", help="records per part (default: 10000)"
    )
    parser.add_argument(
        "--batch_size", type=options.positive, default=256, metavar="N", help="encoded together (default: 256)"
    )
    options.add_tfds_dir(parser)
    parser.add_argument("--num_processes", type=options.positive, metavar="N", help="processes that share the work")
    parser.add_argument("--process_id", type=int, metavar="I", help="this process, from 0, with --num_processes")


def main(arguments: argparse.Namespace) -> None:
    """Run `flip embed`."""
    runtime.enable_compile_cache()
    process, processes = arguments.process_id, arguments.num_processes
    if (process is None) != (processes is None) or (processes is not None and not 0 <= process < processes):
        raise UserError(f"--process_id must be in [0, --num_processes), got {process} and {processes}")
    encoder = inference.load(arguments.model)
    index_lib.refuse_classifier(encoder)
    if processes is None:  # on a TPU pod JAX knows them
        process, processes = jax.process_index(), jax.process_count()
    data = encoder.config.data
    if arguments.tfds_dir:
        data = dataclasses.replace(data, tfds_dir=arguments.tfds_dir)
    own = arguments.out / f"{lock.NAME}-{process}"  # each process writes parts of its own
    with lock.hold(own, f"--out {str(arguments.out)!r}"):
        index = write_index(
            encoder,
            arguments.model,
            open_source(arguments.source, data, arguments.texts),
            data,
            arguments.out,
            name=arguments.source,
            texts=arguments.texts,
            dtype=arguments.dtype,
            rows_per_part=arguments.rows,
            batch_size=arguments.batch_size,
            process=process,
            processes=processes,
        )
    if not index:
        print(f"{arguments.out}: the share of process {process} is done; other processes are still writing")
        return
    counts = f"{index['rows']} {index['embedded']} of {index['read']} records in {len(index['parts'])} parts"
    print(f"{arguments.out}: {counts}")
    for kind, count in index["bad"].items():
        print(f"  bad: {count} {kind} (listed in {arguments.out / index_lib.BAD})")
