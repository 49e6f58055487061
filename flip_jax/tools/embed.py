"""Embeddings of a source as files: python -m flip_jax.embed --model=DIR --source=SOURCE --out=DIR [--texts]

OUT/part-UNIT-BLOCK.parquet hold a row for each picture, or with --texts for each caption, in the order of the source:
key, texts, item and offset (where the record is in the source), embedding. With --format=npy the embeddings are beside
them in part-UNIT-BLOCK.npy. OUT/index.json says what all of it is. A run that was killed goes on where it was and
writes the same bytes; `flip_jax.search` finds what is near to a text or a picture.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from absl import app, flags
from pyarrow import parquet
from tqdm import tqdm

from flip_jax import config_check, inference, runtime
from flip_jax.config import DataConfig, ModelConfig
from flip_jax.data import sources, transforms
from flip_jax.data.records import CHUNK, END, Pick, Record

INDEX, BAD = "index.json", "bad.jsonl"
IN_FLIGHT = 2  # batches that the devices are given before the first is waited for
_META = b"flip_jax"


class Lines:
    """The lines of a text file, held in memory: keys are line numbers from 1."""

    at_once = CHUNK

    def __init__(self, path: str):
        lines = pathlib.Path(path).read_bytes().split(b"\n")
        self._lines = lines if lines[-1] else lines[:-1]

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The picked lines; blank ones and those that are not UTF-8 are bad."""
        for index, epoch in picks:
            record = {"key": str(index + 1), "epoch": epoch}
            try:
                text = self._lines[index].decode().strip()
                yield record | ({"texts": [text]} if text else {"bad": "no text"}), END
            except UnicodeError:
                yield record | {"bad": "not UTF-8"}, END


def open_source(source: str, data: DataConfig, texts: bool) -> Any:
    """What `source` names: KIND:REST as in training, or for texts also a file with one a line.

    Raises:
      ValueError: it is neither, or not there.
    """
    if texts and os.path.isfile(source):
        return Lines(source)
    try:
        return sources.open_source(source, data, "--source")
    except ValueError as error:
        raise ValueError(f"{error}{'; or a text file, with one text a line' if texts else ''}") from error


def identity(encoder: inference.Encoder) -> dict[str, str]:
    """Hashes of a model's settings and tokenizer, and of its weights: embeddings of different models do not compare."""
    default = config_check.flatten(ModelConfig())
    changed = {k: v for k, v in config_check.flatten(encoder.config.model).items() if default[k] != v}
    settings = [changed, encoder.config.data.resize, encoder.tokenizer.to_json()]
    weights = hashlib.blake2b(digest_size=16)
    for path, value in jax.tree_util.tree_leaves_with_path(encoder.params):
        weights.update(jax.tree_util.keystr(path).encode())
        weights.update(np.asarray(value).tobytes())
    config = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    return {"config_hash": config.hexdigest(), "weights_hash": weights.hexdigest()}


def write_json(path: pathlib.Path, content: Any, writer: int = 0) -> None:
    """Writes a JSON file whole or not at all."""
    new = path.with_name(f".{path.name}.{writer}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(new, path)


class Place(NamedTuple):
    """Where a record is in its source. `ends` is (part's name, where the next begins) for the last one of a part."""

    record: Record
    item: int
    offset: int
    ends: tuple[str, int] | None = None


class Embedding:
    """The folder OUT and the parts that are to be written to it.

    A unit of work is one shard, or `rows_per_part` records of a source that has no shards; a part holds at most
    `rows_per_part` records of one unit and says where the next begins. So what is written does not depend on the number
    of processes, and nothing has to be read again.
    """

    def __init__(self, out: pathlib.Path, source: Any, settings: dict[str, Any], model: str, writer: int = 0):
        self._out, self._source, self._writer = out, source, writer
        self._rows, self._texts = settings["rows_per_part"], settings["embedded"] == "texts"
        self._npy, self._dtype = settings["format"] == "npy", settings["dtype"]
        if not len(source):
            raise ValueError(f"--source {settings['source']!r} is empty")
        self.units = len(source) if source.at_once == 1 else -(-len(source) // self._rows)
        out.mkdir(parents=True, exist_ok=True)
        names = {name for name in os.listdir(out) if not name.endswith(".new")}
        if INDEX in names:
            self.index = json.loads((out / INDEX).read_text())
            for key, ours in settings.items():
                if self.index.get(key) != ours:
                    raise ValueError(
                        f"--out {str(out)!r} was begun with {key} {self.index.get(key)!r}, not {ours!r} "
                        f"(its model: {self.index.get('model')}); use another folder"
                    )
        elif names:
            raise ValueError(f"--out {str(out)!r} is not empty, and was not begun by this tool; use another folder")
        else:
            self.index = {"model": model, **settings}
            write_json(out / INDEX, self.index, writer)

    def run(self, encoder: inference.Encoder, units: Sequence[int], batch_size: int) -> None:
        """Writes the parts of these units that are not there yet."""
        size, data = encoder.config.model.image.image_size, encoder.config.data

        def prepare(place):
            """(texts, picture or text) of each row, or the kind of a bad record."""
            record = place.record
            if "bad" in record:
                return record["bad"]
            if self._texts:
                return [([text], text) for text in record["texts"]] or "no text"
            try:
                return [(record["texts"], transforms.decode(record["image"], size, data))]
            except transforms.BadImage as error:
                return str(error)

        batches = _Batches(encoder, self._texts, batch_size)
        columns, bad, read = collections.defaultdict(list), [], 0
        todo = [unit for unit in units if self._written(unit)[1] != END]
        if len(todo) < len(units):
            print(f"{self._out} holds {len(units) - len(todo)} of {len(units)} shares of the work already")
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
        """The records of the parts of these units that are not there yet. Keeps the total of the progress bar."""
        for done, unit in enumerate(units):
            # How much a shard holds is not known before it is read: the rest is taken to be like what was read.
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
                    name = _name(unit, first + (i - 1) // self._rows)
                    yield place._replace(ends=(name, following.offset if following else END))

    def _records(self, unit):
        """The items of a unit of a source without shards."""
        return range(unit * self._rows, min((unit + 1) * self._rows, len(self._source)))

    def _unit(self, items, offset):
        """The records of these items: of a shard from an offset on, or several that are one each."""
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
        """(number of parts, where the next begins) of a unit."""
        offset = 0
        for block in itertools.count():
            path = self._out / f"{_name(unit, block)}.parquet"
            if offset == END or not path.exists() or (self._npy and not path.with_suffix(".npy").exists()):
                return block, offset
            offset = part_info(path)["next"]

    def _write(self, name, columns, embedding_RxE, meta):
        """A part: each file under another name first, and the Parquet file, which says that it is there, last."""
        if not np.isfinite(embedding_RxE).all():
            raise ValueError(f"{name}: the model gives embeddings that are not finite; use an earlier step of the run")
        embedding_RxE = embedding_RxE.astype(self._dtype)
        kinds = {"key": pa.string(), "texts": pa.list_(pa.string()), "item": pa.int64(), "offset": pa.int64()}
        table = pa.table({column: pa.array(columns[column], kind) for column, kind in kinds.items()})
        new = self._out / f".{name}.{self._writer}.new"
        if self._npy:
            with open(new, "wb") as file:
                np.save(file, embedding_RxE, allow_pickle=False)
            os.replace(new, self._out / f"{name}.npy")
        else:
            flat = pa.array(embedding_RxE.reshape(-1))
            table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, embedding_RxE.shape[1]))
        table = table.replace_schema_metadata({_META: json.dumps({"rows": len(table), **meta})})
        parquet.write_table(table, new, row_group_size=CHUNK * CHUNK, compression="zstd", use_dictionary=False)
        os.replace(new, self._out / f"{name}.parquet")

    def finish(self) -> bool:
        """Completes index.json where all units of all processes are written, and says whether they are."""
        parts, bad, read = {}, [], 0
        for unit in range(self.units):
            blocks, offset = self._written(unit)
            if offset != END:
                return False
            for block in range(blocks):
                meta = part_info(self._out / f"{_name(unit, block)}.parquet")
                parts[_name(unit, block)] = meta["rows"]
                bad += meta["bad"]
                read += meta["read"]
        kinds = dict(sorted(Counter(kind for _, kind in bad).items()))
        if not sum(parts.values()):
            raise ValueError(f"none of the {read} records of {self.index['source']!r} can be used: {kinds}")
        if bad:
            new = self._out / f".{BAD}.{self._writer}.new"
            new.write_text("".join(json.dumps({"key": key, "bad": kind}) + "\n" for key, kind in bad))
            os.replace(new, self._out / BAD)
        self.index |= {"rows": sum(parts.values()), "read": read, "bad": kinds, "parts": parts}
        write_json(self._out / INDEX, self.index, self._writer)
        return True


def write_index(
    encoder: inference.Encoder,
    model: str,
    source: Any,
    out: pathlib.Path,
    *,
    name: str,
    texts: bool = False,
    file_format: str = "parquet",
    dtype: str = "float32",
    rows_per_part: int = 10_000,
    batch_size: int = 256,
    process: int = 0,
    processes: int = 1,
) -> dict[str, Any] | None:
    """Embeds a source, or the share of one of several processes, into the folder `out`; or goes on there.

    `name` and `model` are what index.json calls the source and the model's folder. Returns the contents of index.json,
    or None while other processes have parts to write.

    Raises:
      ValueError: `out` holds something else, or nothing in the source can be used.
    """
    settings = {
        "source": name,
        "items": len(source),
        "embedded": "texts" if texts else "images",
        "format": file_format,
        "dtype": dtype,
        "embed_dim": encoder.config.model.embed_dim,
        "rows_per_part": rows_per_part,
        **identity(encoder),
    }
    embedding = Embedding(out, source, settings, os.path.abspath(model), process)
    embedding.run(encoder, range(process, embedding.units, processes), batch_size)
    return embedding.index if embedding.finish() else None


class _Batches:
    """Pictures or texts to embeddings, in batches of one shape; a few are on the devices while more are made ready."""

    def __init__(self, encoder, texts, batch_size):
        self._encoder, self._texts, self._size = encoder, texts, batch_size
        self._waiting, self._flying, self._done = [], [], []

    def add(self, value):
        self._waiting.append(value)
        if len(self._waiting) == self._size:
            self._start()

    def take(self):
        """All that were added since the last call, [rows, embed_dim] f32."""
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


def part_info(path: pathlib.Path) -> dict[str, Any]:
    """What a part says of itself: rows; records read; [key, kind] of the bad ones; where the next part begins."""
    try:
        return json.loads(parquet.read_schema(path).metadata[_META])
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and run flip_jax.embed again") from error


def _name(unit, block):
    return f"part-{unit:06}-{block:04}"


def _ahead(pool: Executor, function: Any, values: Iterator[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """(value, function of it) in order, with `count` of them in work or waiting."""
    waiting = collections.deque()
    for value in values:
        waiting.append((value, pool.submit(function, value)))
        if len(waiting) > count:
            value, future = waiting.popleft()
            yield value, future.result()
    for value, future in waiting:
        yield value, future.result()


def main(_) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    runtime.enable_compile_cache()
    name, texts = _SOURCE.value, _TEXTS.value
    process, processes = _PROCESS_ID.value, _NUM_PROCESSES.value
    try:
        if (process is None) != (processes is None) or (processes is not None and not 0 <= process < processes):
            raise ValueError(f"--process_id must be in [0, --num_processes), got {process} and {processes}")
        encoder = inference.load(_MODEL.value)
        if processes is None:  # on a TPU pod they are known
            process, processes = jax.process_index(), jax.process_count()
        if _TFDS_DIR.value:
            data = dataclasses.replace(encoder.config.data, tfds_dir=_TFDS_DIR.value)
            encoder.config = dataclasses.replace(encoder.config, data=data)
        out = pathlib.Path(_OUT.value)
        source = open_source(name, encoder.config.data, texts)
        form = {"texts": texts, "file_format": _FORMAT.value, "dtype": _DTYPE.value, "rows_per_part": _ROWS.value}
        share = {"batch_size": _BATCH_SIZE.value, "process": process, "processes": processes}
        index = write_index(encoder, _MODEL.value, source, out, name=name, **form, **share)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not index:
        print(f"{out}: the share of process {process} is done, others are still at work")
        return
    print(f"{out}: {index['rows']} {index['embedded']} of {index['read']} records in {len(index['parts'])} parts")
    for kind, count in index["bad"].items():
        print(f"  bad: {count} {kind} (named in {out / BAD})")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "Folder of a run, or of one of its steps", required=True)
    _SOURCE = flags.DEFINE_string("source", None, "KIND:REST, or a text file with --texts", required=True)
    _OUT = flags.DEFINE_string("out", None, "Folder for the embeddings", required=True)
    _TEXTS = flags.DEFINE_bool("texts", False, "Embed the captions (each a row), or the lines of a text file")
    _FORMAT = flags.DEFINE_enum("format", "parquet", ["parquet", "npy"], "Of the embeddings")
    _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the embeddings")
    _ROWS = flags.DEFINE_integer("rows", 10_000, "Records of a part", lower_bound=1)
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Pictures or texts encoded at once", lower_bound=1)
    _TFDS_DIR = flags.DEFINE_string("tfds_dir", "", "As config.data.tfds_dir (default: the model's)")
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Among how many processes the work is split")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0, with --num_processes")
    app.run(main)
