"""Write the embeddings of a data set's images, or of its captions, to Parquet files.

OUT/part-UNIT-BLOCK.parquet hold a row per image, or with --texts a row per caption, in the order of the source: key,
texts, item and offset (where the record is in the source), embedding. OUT/index.json names the model and the source.
After an interruption the same command resumes, and writes the same bytes. `flip search` finds what is nearest to a text
or an image.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flip_jax import inference, lock, runtime, saved_config, saved_step
from flip_jax.config import DataConfig
from flip_jax.data import paths, sources
from flip_jax.data.records import CHUNK, END, Pick, Record
from flip_jax.runtime import UserError
from flip_jax.tools import index as index_lib
from flip_jax.tools import options, units
from flip_jax.tools.embed_parts import Parts
from flip_jax.tools.source_units import SourceUnits
from flip_jax.tools.unit_workers import ENDS, Watch, gpus

EXAMPLE = "flip embed 'webdataset:/data/pairs/{00000..00127}.tar' index --model=runs/b16"


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


class Embedding(Parts):
    """The folder OUT, its index.json, and the parts to be written to it."""

    def __init__(self, out: pathlib.Path, source: SourceUnits, data: DataConfig, identity: dict[str, Any], model: str):
        """`identity` is what must agree before an earlier run in `out` is resumed."""
        super().__init__(out, source, data, identity)
        if not source.items:
            raise UserError(f"--source {identity['source']!r} is empty")
        options.make_folder("--out", out)
        names = {name for name in os.listdir(out) if not name.endswith(".new") and name != lock.NAME}
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

    def run(self, crew: units.Crew) -> None:
        """Let workers write what is missing, then complete index.json."""
        present = set(os.listdir(self._out))
        first = [index_lib.part_path(self._out, index_lib.part_name(unit, 0)).name for unit in range(len(self._source))]
        todo = [unit for unit, name in enumerate(first) if name not in present or self.written(unit)[1] != END]
        if len(todo) < len(first):
            print(f"{self._out} already holds {len(first) - len(todo)} of {len(first)} units of work")
        for unit in crew.run(todo, lambda *_: None):
            block, _ = self.written(unit)
            nothing = np.zeros((0, self.index["embed_dim"]), np.float32)
            meta = {"next": END, "read": 1, "bad": [(self._source.describe(unit), ENDS)]}
            self.save(index_lib.part_name(unit, block), collections.defaultdict(list), nothing, meta)
        self._finish()

    def _write_index(self):
        index_lib.write_text(self._out / index_lib.INDEX, json.dumps(self.index, indent=1) + "\n")

    def _finish(self):
        parts, bad, read = {}, [], 0
        for unit in range(len(self._source)):
            for block in range(self.written(unit)[0]):
                name = index_lib.part_name(unit, block)
                path = index_lib.part_path(self._out, name)
                if not path.exists():
                    raise UserError(f"--out {str(self._out)!r} must be a folder that all nodes share")
                meta = index_lib.part_info(path)
                parts[name] = meta["rows"]
                bad += meta["bad"]
                read += meta["read"]
        kinds = dict(sorted(Counter(kind for _, kind in bad).items()))
        if not sum(parts.values()):
            raise UserError(f"none of the {read} records of {self.index['source']!r} can be used: {kinds}")
        if bad:
            lines = "".join(json.dumps({"key": key, "bad": kind}) + "\n" for key, kind in bad)
            index_lib.write_text(self._out / index_lib.BAD, lines)
        self.index |= {"rows": sum(parts.values()), "read": read, "bad": kinds, "parts": parts}
        self._write_index()


IDENTITY = "identity"  # the unit that says what the model is


class EmbedJob(units.Job):
    """Embeds units by a model, which workers load once each; those of this machine share its GPUs."""

    uses_model = True

    def __init__(
        self,
        encoder: inference.Encoder | None,
        model: str,
        source: SourceUnits,
        data: DataConfig,
        out: pathlib.Path,
        settings: dict[str, Any],
        batch_size: int,
    ):
        self._encoder, self._model, self._source, self._batch_size = encoder, model, source, batch_size
        self._parts = Parts(out, source, data, settings)

    def open(self) -> None:
        """Load the model and open the source."""
        if not self._encoder:
            runtime.enable_compile_cache()
            self._encoder = load(self._model)
        self._source.open()

    def name(self, unit: Any) -> str:
        """Say which unit it is."""
        return unit if unit == IDENTITY else self._source.describe(unit)

    def payload(self, unit: Any) -> Any:
        """Return the rows of a table."""
        return None if unit == IDENTITY else self._source.payload(unit)

    def do(self, unit: Any, payload: Any, watch: Watch) -> dict[str, Any]:
        """Write the parts of a unit."""
        if unit == IDENTITY:
            return {"embed_dim": self._encoder.config.model.embed_dim, **index_lib.identity(self._encoder)}
        return {"read": self._parts.write(self._encoder, unit, payload, watch, self._batch_size)}


def load(model: str) -> inference.Encoder:
    """Load a model with both towers; UserError if it has one, or does not fit into memory."""
    try:
        encoder = inference.load(model)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"--model {model!r} does not fit into a worker's device: use fewer --workers per GPU"
        ) from error
    index_lib.refuse_classifier(encoder)
    return encoder


def write_index(
    encoder: inference.Encoder | None,
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
    crew: units.Size | None = None,
) -> dict[str, Any]:
    """Embed a source into the folder `out`; resume if it was started.

    Workers load the model themselves; without workers it is done here, by `encoder`. `name` is what index.json calls
    the source. Returns the contents of index.json.

    Raises:
      UserError: `out` holds something else, or no record can be used.
    """
    settings = {
        "source": name,
        "items": len(source),
        "embedded": "texts" if texts else "images",
        "dtype": dtype,
        "rows_per_part": rows_per_part,
    }
    reopen = functools.partial(Lines, name) if isinstance(source, Lines) else None
    cut = SourceUnits(name, source, data, rows_per_part, reopen)
    if not len(cut):
        raise UserError(f"--source {name!r} is empty")
    job = EmbedJob(encoder, model, cut, data, out, settings, batch_size)
    with units.Crew(job, crew or units.Size(threads=units.cores())) as workers:
        found: dict[str, Any] = {}
        if workers.run([IDENTITY], lambda _, identity: found.update(identity), quiet=True):
            raise UserError(f"--model {model!r} ends every worker that loads it: it may not fit into memory")
        place = model if paths.is_remote(model) else os.path.abspath(model)
        embedding = Embedding(out, cut, data, settings | found, place)
        embedding.run(workers)
    return embedding.index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip embed`."""
    options.add_model(parser)
    options.add_source(parser, out=True)
    parser.add_argument("--texts", action="store_true", help="embed the captions of SOURCE, or a text file's lines")
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
    units.add_arguments(parser, "one per GPU, or one")


def main(arguments: argparse.Namespace) -> None:
    """Run `flip embed`."""
    options.require(arguments, "source", "out")
    out = pathlib.Path(arguments.out)
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the workers
    try:
        data = saved_config.read(saved_step.newest(arguments.model)).data
    except (OSError, ImportError) as error:  # the system refuses, or the client of an object store is missing
        raise UserError(
            f"--model {arguments.model!r} cannot be read: {error}; check the path and its credentials"
        ) from None
    if arguments.tfds_dir:
        data = dataclasses.replace(data, tfds_dir=arguments.tfds_dir)
    source = open_source(arguments.source, data, arguments.texts)
    workers = arguments.workers or (0 if arguments.ray else max(1, len(gpus())))
    with lock.hold(out / lock.NAME, f"--out {str(out)!r}"):
        index = write_index(
            None,
            arguments.model,
            source,
            data,
            out,
            name=arguments.source,
            texts=arguments.texts,
            dtype=arguments.dtype,
            rows_per_part=arguments.rows,
            batch_size=arguments.batch_size,
            crew=units.Size(workers, arguments.ray, max(1, units.cores() // max(1, workers))),
        )
    counts = f"{index['rows']} {index['embedded']} of {index['read']} records in {len(index['parts'])} parts"
    print(f"{out}: {counts}")
    for kind, count in index["bad"].items():
        print(f"  bad: {count} {kind} (listed in {out / index_lib.BAD})")
