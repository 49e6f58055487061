"""The folder that `flip embed` writes and `flip search` reads.

part-UNIT-BLOCK.parquet hold the rows, in the order of the source: key, texts, item and offset (where the record is in
the source) and embedding. index.json names the model and the source, and counts the rows of each part once all parts
are written.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tqdm import tqdm

from flip_jax import config_check, inference, untrusted
from flip_jax.config import ModelConfig
from flip_jax.data.records import CHUNK
from flip_jax.runtime import UserError

INDEX, BAD = "index.json", "bad.jsonl"
BLOCK = 8192  # embeddings compared at once
COLUMNS = {"key": pa.string(), "texts": pa.list_(pa.string()), "item": pa.int64(), "offset": pa.int64()}
PART = re.compile(r"part-\d{6,}-\d{4,}")  # nothing that leads out of the folder
_META = b"flip_jax"


def refuse_classifier(encoder: inference.Encoder) -> None:
    """Raise UserError for a model without a text tower."""
    if encoder.tokenizer is None:
        raise UserError("--model is a fine-tuned classifier without a text tower: use the model it started from")


def identity(encoder: inference.Encoder) -> dict[str, str]:
    """Hash a model's settings and tokenizer, and its weights: embeddings of different models do not compare."""
    default = config_check.flatten(ModelConfig())
    changed = {k: v for k, v in config_check.flatten(encoder.config.model).items() if default[k] != v}
    content = [changed, encoder.config.data.resize, encoder.tokenizer.to_json()]
    weights = hashlib.blake2b(digest_size=16)
    for path, value in jax.tree_util.tree_leaves_with_path(encoder.params):
        weights.update(jax.tree_util.keystr(path).encode())
        weights.update(np.asarray(value).tobytes())
    config = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16)
    return {"config_hash": config.hexdigest(), "weights_hash": weights.hexdigest()}


def part_name(unit: int, block: int) -> str:
    """Return the name of a part, by which index.json lists it."""
    return f"part-{unit:06}-{block:04}"


def part_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file of a part."""
    return folder / f"{name}.parquet"


def temporary(path: pathlib.Path) -> pathlib.Path:
    """Return where a process writes a file before it moves it into place; no other process writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.new")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file atomically."""
    new = temporary(path)
    new.write_text(text)
    os.replace(new, path)


def write_part(
    path: pathlib.Path, columns: dict[str, list[Any]], embedding_RxE: np.ndarray, meta: dict[str, Any]
) -> None:
    """Write a part atomically; `meta` is what `part_info` returns, without the number of rows."""
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in COLUMNS.items()})
    flat = pa.array(embedding_RxE.reshape(-1))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, embedding_RxE.shape[1]))
    table = table.replace_schema_metadata({_META: json.dumps({"rows": len(table), **meta})})
    new = temporary(path)
    parquet.write_table(table, new, row_group_size=CHUNK * CHUNK, compression="zstd", use_dictionary=False)
    os.replace(new, path)


def read_index(path: pathlib.Path) -> dict[str, Any]:
    """Read index.json; UserError if it is damaged."""
    content = untrusted.read_file(path)
    try:
        settings = json.loads(content)
        if not isinstance(settings, dict):
            raise ValueError("no group of settings")
        return settings
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: delete it and run `flip embed` again") from error


def part_info(path: pathlib.Path) -> dict[str, Any]:
    """Return a part's rows, records read, [key, kind] of the bad ones, and the offset at which the next part begins."""
    try:
        metadata = parquet.read_schema(path).metadata or {}
        return json.loads(metadata.get(_META, b""))
    except (pa.ArrowException, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: delete it and run `flip embed` again") from error


class Hit(NamedTuple):
    """A row of the index with its cosine to the query."""

    score: float
    key: str
    texts: list[str]
    item: int
    offset: int


class Index:
    """A complete folder of embeddings; UserError if it is something else, unfinished, or files are missing."""

    def __init__(self, folder: pathlib.Path):
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"--index {str(folder)!r} has no {INDEX}: it must be a folder written by `flip embed`")
        self.settings = read_index(path)
        if "parts" not in self.settings:
            raise UserError(f"--index {str(folder)!r} is not complete: run `flip embed` again to finish it")
        self._folder, self._parts = folder, self.settings["parts"]
        named = {name: count for name, count in self._parts.items() if PART.fullmatch(name) and type(count) is int}
        if named != self._parts:
            raise UserError(f"{path} names parts that `flip embed` does not write: run it again")
        for name in self._parts:
            if not (path := part_path(folder, name)).is_file():
                raise UserError(f"{path} is missing: run `flip embed` again")

    def check(self, encoder: inference.Encoder) -> None:
        """Raise UserError unless this model made the embeddings."""
        for name, ours in identity(encoder).items():
            if self.settings[name] != ours:
                raise UserError(
                    f"--model has {name} {ours}, but the index was made with {self.settings[name]}, by the model of "
                    f"{self.settings['model']}: search with that one"
                )

    def nearest(self, query_QxE: np.ndarray, top: int) -> list[list[Hit]]:
        """Return the `top` rows with the largest inner product with each query, best first; ties in row order."""
        queries, first = len(query_QxE), 0
        score_QxK, row_QxK = np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)
        with tqdm(total=self.settings["rows"], unit=" rows", mininterval=1, delay=2) as bar:
            for block_NxE in self.blocks():
                score_QxN = query_QxE.astype(np.float32) @ block_NxE.astype(np.float32).T
                row_QxN = np.broadcast_to(np.arange(first, first + len(block_NxE)), score_QxN.shape)
                first += len(block_NxE)
                score_QxK, row_QxK = best(
                    np.concatenate([score_QxK, score_QxN], axis=1), np.concatenate([row_QxK, row_QxN], axis=1), top
                )
                bar.update(len(block_NxE))
        return self.hits(score_QxK, row_QxK)

    def hits(self, score_QxK: np.ndarray, row_QxK: np.ndarray) -> list[list[Hit]]:
        """Read the rows that were found for each query."""
        rows = self._rows(np.unique(row_QxK))
        return [
            [Hit(float(score), **rows[row]) for score, row in zip(scores, ids, strict=True)]
            for scores, ids in zip(score_QxK, row_QxK, strict=True)
        ]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all embeddings in order, at most `BLOCK` at a time."""
        for name, count in self._parts.items():
            path, seen = part_path(self._folder, name), 0
            with _reading(path):
                for batch in parquet.ParquetFile(path).iter_batches(BLOCK, columns=["embedding"]):
                    seen += len(batch)
                    yield batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
            if seen != count:
                raise UserError(f"{path} has {seen} rows instead of {count}: delete it and run `flip embed` again")

    def _rows(self, wanted):
        """Return the fields of these rows of the whole index, by row number."""
        found, first = {}, 0
        for name, count in self._parts.items():
            mine = [row for row in wanted.tolist() if first <= row < first + count]
            if mine:
                with _reading(path := part_path(self._folder, name)):
                    table = parquet.read_table(path, columns=list(COLUMNS))
                found |= zip(mine, table.take([row - first for row in mine]).to_pylist(), strict=True)
            first += count
        return found


@contextlib.contextmanager
def _reading(path):
    """Turn pyarrow's errors while reading a part into a UserError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: delete it and run `flip embed` again") from error


def best(score_QxN: np.ndarray, row_QxN: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `top` largest scores of each query and their rows, in descending order; ties in row order."""
    top = min(top, score_QxN.shape[1])
    if not top:
        return score_QxN, row_QxN
    least_Q = np.partition(score_QxN, -top, axis=1)[:, -top]
    picked = []
    for scores, rows, least in zip(score_QxN, row_QxN, least_Q, strict=True):
        candidates = np.flatnonzero(scores >= least)  # sorting all of them would take several times as long
        order = candidates[np.lexsort((rows[candidates], -scores[candidates]))][:top]
        picked.append((scores[order], rows[order]))
    return np.stack([scores for scores, _ in picked]), np.stack([rows for _, rows in picked])
