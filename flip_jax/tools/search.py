"""Find the rows of an index that are nearest to a text or an image.

Prints the nearest rows to each query with their cosines. The search reads all embeddings written by `flip embed`, a
block at a time, and is exact; above --approximate_above rows it looks them up in an approximate index, which the first
search makes. --text and --image may be repeated. With --out an HTML page shows the hits; it needs no
other file, because their images are read again from the source of the index.
"""

import argparse
import base64
import dataclasses
import html
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from flip_jax import inference, runtime, untrusted
from flip_jax.config import DataConfig
from flip_jax.data import records, transforms
from flip_jax.runtime import UserError
from flip_jax.tools import approximate, embed, options
from flip_jax.tools import index as index_lib
from flip_jax.tools.index import Hit, Index

EXAMPLE = 'flip search --index=index --model=runs/b16 --text="a red fox" --out=hits.html'

SIZE = 160  # pixels of an image on a page of hits
APPROXIMATE_ABOVE = 1_000_000  # rows; reading 2 GB of embeddings takes seconds
Query = tuple[str, np.ndarray | None]  # title, and the image if the query is one


def query_image(path: str, size: int, data: DataConfig) -> np.ndarray:
    """Decode an image file as the model takes it, uint8 [size, size, 3]; UserError if it cannot be used."""
    try:
        content = untrusted.read_file(path, records.MAX_IMAGE)
    except OSError as error:
        raise UserError(f"--image {path!r} cannot be read ({error.strerror})") from None
    try:
        return transforms.decode(content, size, data)
    except transforms.BadImage as error:
        raise UserError(f"--image {path!r}: {error}; it must be one of {', '.join(transforms.FORMATS)}") from None


class Thumbnails:
    """The images of hits, read again from where the index says that they are in the source."""

    def __init__(self, source: Any, data: DataConfig):
        self._source, self._data = source, data

    def __call__(self, hit: Hit) -> np.ndarray | str | None:
        """Return uint8 [SIZE, SIZE, 3], the reason why there is none, or None for a source without images."""
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


def page(queries: Sequence[Query], hits: list[list[Hit]], thumbnails: Thumbnails) -> str:
    """Return an HTML page of the hits of each query; it needs no other file."""
    parts = []
    for (title, shown), found in zip(queries, hits, strict=True):
        parts.append(f"<h2>{_image_tag(shown)} {html.escape(title)}</h2>\n<div class=hits>")
        for hit in found:
            caption = html.escape(" | ".join(hit.texts))
            key = html.escape(hit.key)
            parts.append(
                f"<figure>{_image_tag(thumbnails(hit))}<figcaption><b>{hit.score:.3f}</b> {caption}"
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
        f"<!doctype html>\n<html><head><meta charset=utf-8><title>flip search</title><style>{style}</style></head>"
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _image_tag(image):
    """Return an img tag with its content, a box with the reason why there is none, or nothing."""
    if not isinstance(image, np.ndarray):
        return f"<div class=none>{html.escape(image)}</div>" if image else ""
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip search`."""
    parser.add_argument(
        "--index", required=True, type=pathlib.Path, metavar="DIR", help="folder written by `flip embed`"
    )
    options.add_model(parser, help="folder of the run, or of the step, that made the index")
    parser.add_argument("--text", action="append", default=[], help="text to search for; may be repeated")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image to search for; may be repeated"
    )
    parser.add_argument("--top", type=options.positive, default=20, metavar="N", help="hits per query (default: 20)")
    parser.add_argument(
        "--approximate_above",
        type=options.positive,
        default=APPROXIMATE_ABOVE,
        metavar="N",
        help=f"rows; up to them the search is exact (default: {APPROXIMATE_ABOVE})",
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.html", help="page that shows the hits")
    parser.add_argument("--source", help="where the images are now, if they were moved since")
    options.add_tfds_dir(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run `flip search`."""
    runtime.enable_compile_cache()
    texts, images, out = arguments.text, arguments.image, arguments.out
    if not texts and not images:
        raise UserError("no query: give --text=TEXT, --image=FILE, or several of them")
    if out and out.suffix != ".html":
        raise UserError(f"--out must end in .html, got {str(out)!r}")
    if out and not out.absolute().parent.is_dir():
        raise UserError(f"--out {str(out)!r} is in a folder that does not exist: create it or use another path")
    index = Index(arguments.index)
    encoder = inference.load(arguments.model)
    index_lib.refuse_classifier(encoder)
    index.check(encoder)
    data, size = encoder.config.data, encoder.config.model.image.image_size
    if arguments.tfds_dir:
        data = dataclasses.replace(data, tfds_dir=arguments.tfds_dir)
    thumbnails = _thumbnails(arguments.source or index.settings["source"], index, data) if out else None
    queries: list[Query] = [(text, None) for text in texts]
    embedded = [encoder.encode_text(texts)] if texts else []
    if images:
        pixels = [query_image(path, size, data) for path in images]
        queries += [(path, query_image(path, SIZE, data)) for path in images]
        embedded.append(np.asarray(encoder.encode_image(np.stack(pixels))))
    query_QxE = np.concatenate(embedded)
    if index.settings["rows"] <= arguments.approximate_above:
        hits = index.nearest(query_QxE, arguments.top)
    elif approximate.is_installed():
        hits = approximate.nearest(arguments.index, index, query_QxE, arguments.top)
    else:
        print('reading all rows; with an approximate index it is faster: pip install -e ".[search]"', file=sys.stderr)
        hits = index.nearest(query_QxE, arguments.top)
    for (title, _), found in zip(queries, hits, strict=True):
        print(title)
        for hit in found:
            row = f"{hit.score:.4f}  {hit.key}  {' | '.join(hit.texts)}"
            print(f"  {untrusted.plain(row, lines=False)}")
    if out:
        options.write_text("--out", out, page(queries, hits, thumbnails))
        print(f"written: {out}")


def _thumbnails(source, index, data):
    """Open the source of an index, before the search: it may have been moved."""
    try:
        return Thumbnails(embed.open_source(source, data, index.settings["embedded"] == "texts"), data)
    except UserError as error:
        raise UserError(f"{error}; --out reads it again: if it was moved, use --source to say where it is") from None
