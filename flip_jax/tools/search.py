"""What in an index of flip_jax.embed is nearest to a query:
python -m flip_jax.search --index=DIR --model=DIR --text="a red fox" [--image=FILE] [--top=20] [--out=hits.html]

Exact: all embeddings are read, a block at a time. --text and --image may be repeated. With --out the hits are drawn, as
a PNG or as an HTML page that needs no other file; their pictures are read again from the source of the index.
"""

import base64
import dataclasses
import html
import io
import json
import logging
import pathlib
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
from absl import app, flags
from PIL import Image
from pyarrow import parquet
from tqdm import tqdm

from flip_jax import inference, runtime
from flip_jax.config import DataConfig
from flip_jax.data import records, transforms
from flip_jax.tools import embed

BLOCK = 8192  # embeddings that are compared at once
SIZE = 160  # pixels of a picture on a page of hits
COLUMNS = 8  # pictures in a row of a PNG
ESCAPES = str.maketrans({code: " " for code in (*range(32), *range(127, 160))})


class Hit(NamedTuple):
    """A row of the index, with its cosine to the query."""

    score: float
    key: str
    texts: list[str]
    item: int
    offset: int


class Index:
    """The complete folder that flip_jax.embed wrote. ValueError if it is none, or files are missing."""

    def __init__(self, folder: pathlib.Path):
        path = folder / embed.INDEX
        if not path.is_file():
            raise ValueError(f"--index {str(folder)!r} has no {embed.INDEX}: it must be a folder of flip_jax.embed")
        try:
            self.settings = json.loads(path.read_text())
            self._npy = self.settings["format"] == "npy"
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: run flip_jax.embed again") from error
        if "parts" not in self.settings:
            raise ValueError(f"--index {str(folder)!r} is not complete yet: run flip_jax.embed again to finish it")
        self._folder, self._parts = folder, self.settings["parts"]
        for name in self._parts:
            for suffix in (".parquet", ".npy") if self._npy else (".parquet",):
                if not (folder / f"{name}{suffix}").is_file():
                    raise ValueError(f"{folder / name}{suffix} is missing: run flip_jax.embed again")

    def check(self, encoder: inference.Encoder) -> None:
        """Raises ValueError for another model than the one that made the embeddings."""
        for name, ours in embed.identity(encoder).items():
            if self.settings[name] != ours:
                raise ValueError(
                    f"--model has {name} {ours}, the index was made with {self.settings[name]}, by the model of "
                    f"{self.settings['model']}; search with that one"
                )

    def nearest(self, query_QxE: np.ndarray, top: int) -> list[list[Hit]]:
        """The `top` rows with the largest inner product with each query, best first; of equal ones the first."""
        queries, first = len(query_QxE), 0
        score_QxK, row_QxK = np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64)
        with tqdm(total=self.settings["rows"], unit=" rows", mininterval=1, delay=2) as bar:
            for block_NxE in self._blocks():
                score_QxN = query_QxE.astype(np.float32) @ block_NxE.astype(np.float32).T
                row_QxN = np.broadcast_to(np.arange(first, first + len(block_NxE)), score_QxN.shape)
                first += len(block_NxE)
                score_QxK, row_QxK = best(
                    np.concatenate([score_QxK, score_QxN], axis=1), np.concatenate([row_QxK, row_QxN], axis=1), top
                )
                bar.update(len(block_NxE))
        rows = self._rows(np.unique(row_QxK))
        return [
            [Hit(float(score), **rows[row]) for score, row in zip(scores, ids, strict=True)]
            for scores, ids in zip(score_QxK, row_QxK, strict=True)
        ]

    def _blocks(self) -> Iterator[np.ndarray]:
        """All embeddings in order, at most `BLOCK` at once in memory."""
        for name, count in self._parts.items():
            if self._npy:
                path = self._folder / f"{name}.npy"
                try:
                    array = np.load(path, mmap_mode="r", allow_pickle=False)
                    blocks = (array[i : i + BLOCK] for i in range(0, count, BLOCK))
                except (ValueError, OSError, EOFError) as error:
                    raise ValueError(f"{path} is damaged: run flip_jax.embed again") from error
            else:
                blocks = self._columns(name)
            seen = 0
            for block in blocks:
                seen += len(block)
                yield block
            if seen != count:
                raise ValueError(f"{self._folder / name} has {seen} rows instead of {count}: run flip_jax.embed again")

    def _columns(self, name):
        path = self._folder / f"{name}.parquet"
        try:
            for batch in parquet.ParquetFile(path).iter_batches(BLOCK, columns=["embedding"]):
                yield batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
        except pa.ArrowException as error:
            raise ValueError(f"{path} is damaged: delete it, and run flip_jax.embed again") from error

    def _rows(self, wanted):
        """The fields of these rows (of the whole index, ascending) by their number."""
        found, first = {}, 0
        for name, count in self._parts.items():
            mine = [row for row in wanted.tolist() if first <= row < first + count]
            if mine:
                columns = [field for field in Hit._fields if field != "score"]
                table = parquet.read_table(self._folder / f"{name}.parquet", columns=columns)
                found |= zip(mine, table.take([row - first for row in mine]).to_pylist(), strict=True)
            first += count
        return found


def best(score_QxN: np.ndarray, row_QxN: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` largest scores of each query and their rows, in descending order; of equal ones the first rows."""
    top = min(top, score_QxN.shape[1])
    if not top:
        return score_QxN, row_QxN
    least_Q = np.partition(score_QxN, -top, axis=1)[:, -top]
    picked = []
    for scores, rows, least in zip(score_QxN, row_QxN, least_Q, strict=True):
        candidates = np.flatnonzero(scores >= least)  # sorting all takes several times as long
        order = candidates[np.lexsort((rows[candidates], -scores[candidates]))][:top]
        picked.append((scores[order], rows[order]))
    return np.stack([scores for scores, _ in picked]), np.stack([rows for _, rows in picked])


def query_image(path: str, size: int, data: DataConfig) -> np.ndarray:
    """The picture of a file as the model takes it, uint8 [size, size, 3]. ValueError if it is none."""
    with open(path, "rb") as file:
        content = file.read(records.MAX_IMAGE + 1)
    if len(content) > records.MAX_IMAGE:
        raise ValueError(f"--image {path!r} has more than {records.MAX_IMAGE} bytes")
    try:
        return transforms.decode(content, size, data)
    except transforms.BadImage as error:
        raise ValueError(f"--image {path!r}: {error}; it must be one of {', '.join(transforms.FORMATS)}") from error


class Pictures:
    """The pictures of hits, read again from the source where the index says that they were."""

    def __init__(self, source: Any, data: DataConfig):
        self._source, self._data = source, data

    def __call__(self, hit: Hit) -> np.ndarray | str | None:
        """uint8 [SIZE, SIZE, 3], the reason why there is none, or None for a source without pictures."""
        if isinstance(self._source, embed.Lines):
            return None
        if hit.item >= len(self._source):
            return "the source has changed"
        record, _ = next(self._source.read([(hit.item, 0)], hit.offset), ({"key": None}, 0))
        if record["key"] != hit.key:
            return "the source has changed"
        try:
            return transforms.decode(record["image"], SIZE, self._data) if "image" in record else record["bad"]
        except transforms.BadImage as error:
            return str(error)


def page(queries: Sequence[tuple[str, np.ndarray | None]], hits: list[list[Hit]], pictures: Pictures) -> str:
    """An HTML page of the hits of each (text, picture or None) query; it needs no other file."""
    parts = []
    for (title, shown), found in zip(queries, hits, strict=True):
        parts.append(f"<h2>{_picture_tag(shown)} {html.escape(title)}</h2>\n<div class=hits>")
        for hit in found:
            caption = html.escape(" | ".join(hit.texts))
            key = html.escape(hit.key)
            parts.append(
                f"<figure>{_picture_tag(pictures(hit))}<figcaption><b>{hit.score:.3f}</b> {caption}"
                f"<small>{key}</small></figcaption></figure>"
            )
        parts.append("</div>")
    style = (
        "body{font:14px sans-serif;margin:2em}.hits{display:flex;flex-wrap:wrap;gap:12px}"
        f"figure{{margin:0;width:{SIZE}px;overflow-wrap:anywhere}}small{{display:block;color:#777}}"
        f"img,.none{{width:{SIZE}px;height:{SIZE}px;display:block}}.none{{background:#eee}}"
        "h2 img{width:64px;height:64px}"
    )
    return (
        f"<!doctype html>\n<html><head><meta charset=utf-8><title>flip_jax.search</title><style>{style}</style></head>"
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _picture_tag(picture):
    """An img with its content, a box with the reason why there is none, or nothing."""
    if not isinstance(picture, np.ndarray):
        return f"<div class=none>{html.escape(picture)}</div>" if picture else ""
    jpeg = io.BytesIO()
    Image.fromarray(picture).save(jpeg, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'


def draw(
    queries: Sequence[tuple[str, np.ndarray | None]], hits: list[list[Hit]], pictures: Pictures, path: pathlib.Path
) -> None:
    """The hits of each query as rows of a PNG, under the query."""
    plt.switch_backend("agg")
    lines = [max(1, -(-len(found) // COLUMNS)) for found in hits]
    figure = plt.figure(figsize=(1.6 * COLUMNS, 2.1 * sum(lines) + 0.4 * len(hits)), layout="constrained")
    blocks = figure.subfigures(len(hits), 1, squeeze=False, height_ratios=lines)[:, 0]
    for block, (title, _), found, count in zip(blocks, queries, hits, lines, strict=True):
        block.suptitle(_printable(title, 100), fontsize=12, parse_math=False)
        grid = block.subplots(count, COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for hit, axes in zip(found, grid.flat, strict=False):
            caption = "\n".join(textwrap.wrap(_printable(" | ".join(hit.texts), 80), 22, max_lines=2, placeholder="…"))
            axes.set_title(f"{hit.score:.3f}\n{caption}", fontsize=7, parse_math=False)
            picture = pictures(hit)
            if isinstance(picture, np.ndarray):
                axes.imshow(picture)
            elif picture:
                axes.text(0.5, 0.5, textwrap.fill(picture, 16), ha="center", va="center", fontsize=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # no font draws all scripts
        figure.savefig(path, dpi=100)
    plt.close(figure)


def _printable(text, limit):
    return "".join(c if c.isprintable() else " " for c in text[:limit])


def main(_) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    runtime.enable_compile_cache()
    texts, images, out = _TEXT.value or [], _IMAGE.value or [], pathlib.Path(_OUT.value) if _OUT.value else None
    try:
        if not texts and not images:
            raise ValueError("give a query: --text=TEXT, --image=FILE, or several of them")
        if out and out.suffix not in (".png", ".html"):
            raise ValueError(f"--out must end in .png or .html, got {str(out)!r}")
        index = Index(pathlib.Path(_INDEX.value))
        encoder = inference.load(_MODEL.value)
        index.check(encoder)
        data, size = encoder.config.data, encoder.config.model.image.image_size
        if _TFDS_DIR.value:
            data = dataclasses.replace(data, tfds_dir=_TFDS_DIR.value)
        pictures = None
        if out:
            name, of_texts = _SOURCE.value or index.settings["source"], index.settings["embedded"] == "texts"
            try:
                pictures = Pictures(embed.open_source(name, data, of_texts), data)
            except ValueError as error:
                raise ValueError(
                    f"{error}; for --out it is read again: if it was moved, say where with --source"
                ) from error
        queries = [(text, None) for text in texts]
        embedded = [encoder.encode_text(texts)] if texts else []
        if images:
            pixels = [query_image(path, size, data) for path in images]
            queries += [(path, query_image(path, SIZE, data)) for path in images]
            embedded.append(np.asarray(encoder.encode_image(np.stack(pixels))))
        hits = index.nearest(np.concatenate(embedded), _TOP.value)
        for (title, _), found in zip(queries, hits, strict=True):
            print(title)
            for hit in found:
                print(f"  {hit.score:.4f}  {hit.key}  {' | '.join(hit.texts)}".translate(ESCAPES))
        if out and out.suffix == ".html":
            out.write_text(page(queries, hits, pictures), encoding="utf-8")
        elif out:
            draw(queries, hits, pictures, out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if out:
        print(f"written: {out}")


if __name__ == "__main__":
    _INDEX = flags.DEFINE_string("index", None, "Folder that flip_jax.embed wrote", required=True)
    _MODEL = flags.DEFINE_string("model", None, "Folder of the run, or of the step, that made it", required=True)
    _TEXT = flags.DEFINE_multi_string("text", None, "A query; may be repeated")
    _IMAGE = flags.DEFINE_multi_string("image", None, "File of a picture to query with; may be repeated")
    _TOP = flags.DEFINE_integer("top", 20, "Hits for each query", lower_bound=1)
    _OUT = flags.DEFINE_string("out", None, "Page of the hits, .png or .html")
    _SOURCE = flags.DEFINE_string("source", None, "Where the pictures are now, if they were moved since")
    _TFDS_DIR = flags.DEFINE_string("tfds_dir", "", "As config.data.tfds_dir (default: the model's)")
    app.run(main)
