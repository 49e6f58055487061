"""What is in a source: python -m flip_jax.inspect_data SOURCE [--limit=N] [--out=DIR]

Reads and decodes every record, prints what there is (counts, bad records by kind, picture formats and sizes, caption
lengths, the rate) and draws pictures with their captions to DIR/inspection.png.
"""

import argparse
import io
import os
import pathlib
import random
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tqdm import tqdm

from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms

SIZE = 128  # pixels of a picture in the grid
ROWS, COLUMNS = 4, 6
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
CHUNK = 256  # records that are decoded together


def each(
    source: Any, function: Callable[[sources.Record], Any], first: int = 0, read: int = 0, limit: int | None = None
) -> Iterator[tuple[int, Any]]:
    """`function` of each record from item `first` of a source on, in order and on all cores, under a progress bar.

    Yields (items that are finished, result); `read` is how many records came before `first`.
    """
    total = limit or (None if not first else round(read / first * len(source)))
    with ThreadPoolExecutor() as pool, tqdm(total=total, initial=read, unit=" records", mininterval=1) as bar:
        for item in range(first, len(source), source.at_once):
            items = range(item, min(item + source.at_once, len(source)))
            records = sources.in_order(source, iter(items))
            while chunk := list(islice(records, min(CHUNK, limit - bar.n) if limit else CHUNK)):
                for result in pool.map(function, chunk):
                    yield item, result
                bar.update(len(chunk))
            # An item is a record of some sources, and thousands of others: the rest is taken to be like what was read.
            bar.total = limit or round(bar.n / items.stop * len(source))


def decode(record: sources.Record, size: int, settings: DataConfig) -> np.ndarray:
    """The centre of a record's picture, uint8 [size, size, 3]. BadImage if training and evaluation cannot use it."""
    if "bad" in record:
        raise transforms.BadImage(record["bad"])
    if not record["texts"] and record["label"] is None:
        raise transforms.BadImage("no text")
    return transforms.decode(record["image"], size, settings)


class Summary:
    """What `add` was told of, in memory that does not grow with the number of records."""

    def __init__(self):
        self.read = self.labelled = 0
        self.bad: Counter = Counter()
        self.examples: dict[str, str] = {}
        self.formats: Counter = Counter()
        self.counts = {name: Counter() for name in ("width (pixels)", "height (pixels)", "bytes", "caption length")}
        self.shown: list[tuple[str, np.ndarray]] = []  # a random choice of captions and pictures
        self._random = random.Random(0)

    @property
    def usable(self) -> int:
        return self.read - self.bad.total()

    def add(self, record: sources.Record, bad: str, image_format: str, size: tuple[int, int], pixels: Any) -> None:
        """Counts a record; the picture's properties only where it is not `bad`."""
        self.read += 1
        if bad:
            self.bad[bad] += 1
            self.examples.setdefault(bad, record["key"])
            return
        self.formats[image_format] += 1
        self.labelled += record["label"] is not None
        for counter, value in zip(self.counts.values(), (*size, len(record["image"])), strict=False):
            counter[value] += 1
        self.counts["caption length"].update(map(len, record["texts"]))
        place = len(self.shown) if len(self.shown) < ROWS * COLUMNS else self._random.randrange(self.usable)
        if place < ROWS * COLUMNS:
            label = "" if record["label"] is None else f"class {record['label']}"
            self.shown[place : place + 1] = [(" | ".join(record["texts"]) or label, pixels)]

    def __str__(self) -> str:
        captions = self.counts["caption length"]
        lines = [f"{self.read} records read: {self.usable} usable, {self.bad.total()} bad"]
        lines += [f"  bad: {count} {kind}, first {self.examples[kind]}" for kind, count in self.bad.most_common()]
        lines += [f"{captions.total()} captions, {self.labelled} class labels"]
        lines += [f"formats: {', '.join(f'{count} {name}' for name, count in self.formats.most_common())}"]
        lines += [f"{'quantile':16}" + "".join(f"{q:>9.0%}" for q in QUANTILES)]
        for name, counter in self.counts.items():
            if counter:
                lines += [f"{name:16}" + "".join(f"{value:>9}" for value in quantiles(counter))]
        bins = Counter()
        for length, count in captions.items():
            bins[length.bit_length()] += count
        for i in range(min(bins, default=0), max(bins, default=-1) + 1):
            bar = "#" * round(40 * bins[i] / max(bins.values()))
            lines += [f"{f'{2**i // 2} to {2**i - 1} characters':>24} {bins[i]:>9} {bar}"]
        return "\n".join(lines)

    def draw(self, path: pathlib.Path) -> None:
        """The pictures that were chosen with their captions, above a histogram of caption lengths; PNG."""
        plt.switch_backend("agg")
        figure = plt.figure(figsize=(12, 12))
        grid = figure.add_gridspec(ROWS + 1, COLUMNS, left=0.06, right=0.98, bottom=0.06, top=0.94, hspace=0.5)
        for (caption, pixels), place in zip(self.shown, list(grid)[: ROWS * COLUMNS], strict=False):
            axes = figure.add_subplot(place)
            printable = "".join(c if c.isprintable() else " " for c in caption[:200])
            lines = textwrap.wrap(printable, 26, max_lines=3, placeholder="…")
            axes.set_title("\n".join(lines), fontsize=8, parse_math=False)
            axes.imshow(pixels)
            axes.axis("off")
        axes = figure.add_subplot(grid[ROWS, :])
        lengths = self.counts["caption length"]
        axes.hist(list(lengths), bins=60, weights=list(lengths.values()))
        axes.set(xlabel="caption length (characters)", ylabel="captions")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # no font draws all scripts
            figure.savefig(path, dpi=100)
        plt.close(figure)


def quantiles(counter: Counter) -> list[int]:
    """The `QUANTILES` of values of which a counter says how often each came; values that came, none in between."""
    values = sorted(counter)
    ranks = np.cumsum([counter[value] for value in values])
    return [values[np.searchsorted(ranks, max(1, q * ranks[-1]))] for q in QUANTILES]


def inspect(source: Any, settings: DataConfig, limit: int | None = None) -> Summary:
    """One pass over a source, or its first `limit` records."""

    def look(record):
        try:
            pixels = decode(record, SIZE, settings)
            image = Image.open(io.BytesIO(record["image"]), formats=transforms.FORMATS)
            return record, "", image.format, image.size, pixels
        except transforms.BadImage as error:
            return record, str(error), "", (0, 0), None

    summary = Summary()
    for _, looked_at in each(source, look, limit=limit):
        summary.add(*looked_at)
    return summary


def open_source(arguments: argparse.Namespace) -> tuple[Any, DataConfig]:
    """The source that the command line names, and the settings that it is read with."""
    captions = {"captions": tuple(arguments.captions.split(","))} if arguments.captions else {}
    settings = DataConfig(tfds_dir=arguments.tfds_dir, **captions)
    return sources.open_source(arguments.source, settings, "SOURCE"), settings


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments by which a tool is told its source."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", metavar="SOURCE", help="KIND:REST, as an entry of config.data.train")
    parser.add_argument("--tfds_dir", default="", help="as config.data.tfds_dir")
    parser.add_argument("--captions", default="", help="as config.data.captions, with commas in between")
    return parser


def positive(text: str) -> int:
    """An argument that must be at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    arguments = parser("Says what is in a source.")
    arguments.add_argument("--limit", type=positive, metavar="N", help="read the first N records only")
    arguments.add_argument("--out", type=pathlib.Path, default=".", metavar="DIR", help="folder for inspection.png")
    arguments = arguments.parse_args()
    start = time.perf_counter()
    try:
        summary = inspect(*open_source(arguments), arguments.limit)
        rate = summary.read / (time.perf_counter() - start)
        os.makedirs(arguments.out, exist_ok=True)
        summary.draw(arguments.out / "inspection.png")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{summary}\n{rate:,.0f} records/s, {arguments.out}/inspection.png")


if __name__ == "__main__":
    main()
