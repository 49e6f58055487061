"""Report what a data set holds, and draw some of its images with their captions.

Reads and decodes every record, as training would. Prints the number of records, the bad ones by kind, image formats and
sizes, caption lengths and the rate, and writes a grid of random images to inspection.png.
"""

import argparse
import io
import pathlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from flip_jax import runtime
from flip_jax.config import DataConfig
from flip_jax.data import records, sources, transforms
from flip_jax.tools import drawing, options

EXAMPLE = "flip inspect 'webdataset:/data/pairs/{00000..00127}.tar' --out=report"

SIZE = 128  # pixels of an image in the grid
ROWS, COLUMNS = 4, 6
BINS = 60  # of the histogram, at most
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
CHUNK = 256  # records decoded together
GRID_FILE = "inspection.png"


def each(
    source: Any, function: Callable[[records.Record], Any], first: int = 0, read: int = 0, limit: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Apply a function to each record from item `first` on, in order, in parallel, under a progress bar.

    Yields (number of finished items, result); `read` is the number of records before `first`.
    """
    total = limit or (None if not first else round(read / first * len(source)))
    with ThreadPoolExecutor() as pool, tqdm(total=total, initial=read, unit=" records", mininterval=1) as bar:
        for item in range(first, len(source), source.at_once):
            items = range(item, min(item + source.at_once, len(source)))
            found = sources.in_order(source, iter(items))
            while chunk := records.take(found, min(CHUNK, limit - bar.n) if limit else CHUNK):
                for result in pool.map(function, chunk):
                    yield item, result
                bar.update(len(chunk))
            # An item may be one record or a shard of thousands: extrapolate the total from those read so far.
            bar.total = limit or round(bar.n / items.stop * len(source))


def decode(record: records.Record, size: int, data: DataConfig) -> np.ndarray:
    """Decode the centre of a record's image, uint8 [size, size, 3]; BadImage if training cannot use the record."""
    if "bad" in record:
        raise transforms.BadImage(record["bad"])
    if not record["texts"] and record["label"] is None:
        raise transforms.BadImage("no text")
    return transforms.decode(record["image"], size, data)


class Summary:
    """Counts of the records it was given; its memory does not grow with their number."""

    def __init__(self):
        self.read = self.labelled = 0
        self.bad: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.origins: Counter[str] = Counter()  # images by the column, key or file that their captions come from
        self.origin_examples: dict[str, str] = {}
        self.notes: list[str] = []
        self.formats: Counter[str] = Counter()
        names = ("width (pixels)", "height (pixels)", "bytes", "caption length")
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in names}
        self.shown: list[drawing.Tile] = []  # a random sample of captions and images
        self._random = random.Random(0)

    @property
    def usable(self) -> int:
        """The number of records that training can use."""
        return self.read - self.bad.total()

    def add(self, record: records.Record, bad: str, image_format: str, size: tuple[int, int], pixels: Any) -> None:
        """Count a record; its image is described by the other arguments unless `bad` names what is wrong."""
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
        # Reservoir sampling: every usable record is equally likely to be shown.
        place = len(self.shown) if len(self.shown) < ROWS * COLUMNS else self._random.randrange(self.usable)
        if place < ROWS * COLUMNS:
            label = "" if record["label"] is None else f"class {record['label']}"
            self.shown[place : place + 1] = [(" | ".join(record["texts"]) or label, pixels)]

    def __str__(self) -> str:
        captions = self.counts["caption length"]
        lines = [f"{self.read} records read: {self.usable} usable, {self.bad.total()} bad"]
        lines += [f"  bad: {count} {kind}, first {self.examples[kind]}" for kind, count in self.bad.most_common()]
        lines += [f"{captions.total()} captions, {self.labelled} class labels"]
        for name, count in self.origins.most_common():
            lines += [f"  captions of {count} images come from {name}, such as {self.origin_examples[name]!r}"]
        lines += self.notes
        lines += [f"formats: {', '.join(f'{count} {name}' for name, count in self.formats.most_common())}"]
        lines += [f"{'quantile':16}" + "".join(f"{q:>9.0%}" for q in QUANTILES)]
        for name, counter in self.counts.items():
            if counter:
                lines += [f"{name:16}" + "".join(f"{value:>9}" for value in quantiles(counter))]
        bins: Counter[int] = Counter()
        for length, count in captions.items():
            bins[length.bit_length()] += count
        for i in range(min(bins, default=0), max(bins, default=-1) + 1):
            bar = "#" * round(40 * bins[i] / max(bins.values()))
            lines += [f"{f'{2**i // 2} to {2**i - 1} characters':>24} {bins[i]:>9} {bar}"]
        return "\n".join(lines)

    def draw(self, path: pathlib.Path) -> None:
        """Write a PNG of the sampled images with their captions, above a histogram of caption lengths."""
        figure = Figure(figsize=(12, 12), layout="constrained")
        images, below = figure.subfigures(2, 1, height_ratios=(ROWS, 1))  # type: ignore[misc]
        starts = range(0, ROWS * COLUMNS, COLUMNS)
        drawing.grid(images, [self.shown[start : start + COLUMNS] for start in starts], COLUMNS)
        axes = below.subplots()
        lengths = self.counts["caption length"]
        # Bins of equally many whole numbers: otherwise some would hold one length more than their neighbours.
        step = -(-(max(lengths, default=0) - min(lengths, default=0) + 1) // BINS)
        edges = np.arange(min(lengths, default=0), max(lengths, default=0) + step + 1, step) - 0.5
        axes.hist(list(lengths), bins=edges, weights=list(lengths.values()))
        axes.set(xlabel="caption length (characters)", ylabel="captions")
        drawing.save(figure, path)


def quantiles(counter: Counter[int]) -> list[int]:
    """Return the `QUANTILES` of values counted by a counter; each is a value that occurred, none is interpolated."""
    values = sorted(counter)
    ranks = np.cumsum([counter[value] for value in values])
    return [values[np.searchsorted(ranks, max(1, q * ranks[-1]))] for q in QUANTILES]


def inspect(source: Any, data: DataConfig, limit: int | None = None) -> Summary:
    """Summarise a source, or its first `limit` records, in one pass."""

    def look(record):
        try:
            pixels = decode(record, SIZE, data)
        except transforms.BadImage as error:
            return record, str(error), "", (0, 0), None
        image = Image.open(io.BytesIO(record["image"]), formats=transforms.FORMATS)
        return record, "", image.format, image.size, pixels

    summary = Summary()
    for _, looked_at in each(source, look, limit=limit):
        summary.add(*looked_at)
        record, bad = looked_at[:2]
        if not bad and record["texts"]:
            name = sources.caption_name(source, record) or "the source"
            summary.origins[name] += 1
            summary.origin_examples.setdefault(name, record["texts"][0][:100])
    if not summary.origins and (columns := getattr(source, "without_captions", "")):
        summary.notes += [f"  no captions in config.data.captions ({', '.join(data.captions)}); has {columns}"]
    ignored = getattr(source, "ignored", {})
    summary.notes += [f"  ignored: {count} {kind}" for kind, count in ignored.items()]
    return summary


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how records are read."""
    options.add_tfds_dir(parser)
    parser.add_argument(
        "--captions", default="", metavar="NAME,...", help="fields with captions, as config.data.captions"
    )
    parser.add_argument("--image", default="", metavar="NAME", help="field with the images, as config.data.image")


def open_source(arguments: argparse.Namespace) -> tuple[Any, DataConfig]:
    """Open the source that the command line names, and return it with the settings to read it."""
    captions = {"captions": tuple(arguments.captions.split(","))} if arguments.captions else {}
    data = DataConfig(tfds_dir=arguments.tfds_dir, image=arguments.image, **captions)
    return sources.open_source(arguments.source, data, "--source"), data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip inspect`."""
    options.add_source(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, default=".", metavar="DIR", help=f"folder for {GRID_FILE} (default: .)"
    )
    parser.add_argument("--limit", type=options.positive, metavar="N", help="read the first N records only")
    add_reading(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run `flip inspect`."""
    options.require(arguments, "source")
    source, data = open_source(arguments)
    options.make_folder("--out", arguments.out)
    start = time.perf_counter()
    summary = inspect(source, data, arguments.limit)
    rate = summary.read / (time.perf_counter() - start)
    summary.draw(arguments.out / GRID_FILE)
    print(f"{runtime.plain(str(summary))}\n{rate:,.0f} records/s, {arguments.out / GRID_FILE}")
