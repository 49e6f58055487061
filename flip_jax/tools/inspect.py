"""Report what a data set holds, and draw some of its images with their captions.

Reads and decodes every record, as training would. Prints the number of records, the bad ones by kind, image formats and
sizes, caption lengths and the rate, and writes a grid of random images to inspection.png. With --counts it also counts
the tokens of the captions.
"""

import argparse
import contextlib
import itertools
import pathlib
import time
from collections import Counter
from typing import Any

import numpy as np
from tqdm import tqdm

from flip_jax import runtime
from flip_jax.config import DataConfig
from flip_jax.data import records, sources, token_counts, transforms
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError
from flip_jax.tools import options, units
from flip_jax.tools.removed import priority
from flip_jax.tools.source_units import SourceUnits
from flip_jax.tools.unit_workers import Watch

EXAMPLE = "flip inspect 'webdataset:/data/pairs/{00000..00127}.tar' --out=report"

SIZE = 128  # pixels of an image in the grid
ROWS, COLUMNS = 4, 6
BINS = 60  # of the histogram, at most
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
GRID_FILE = "inspection.png"


def decode(record: records.Record, size: int, data: DataConfig) -> np.ndarray:
    """Decode the centre of a record's image, uint8 [size, size, 3]; BadImage if training cannot use the record."""
    if "bad" in record:
        raise transforms.BadImage(record["bad"])
    if not record["texts"] and record["label"] is None:
        raise transforms.BadImage("no text")
    return transforms.decode(record["image"], size, data)


class Summary:
    """Counts of the records it was given; its memory does not grow with their number.

    It is the same in whatever order units are merged: examples are the first of the source, and the records to be shown
    those with the least random numbers of their own.
    """

    def __init__(self):
        self.read = self.labelled = 0
        self.bad: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}  # of each kind of bad record the first: unit, number, key
        self.origins: Counter[Any] = Counter()  # images by the column, key or file that their captions come from
        self.origin_examples: dict[Any, list[Any]] = {}  # the first of each: unit, number, caption
        self.ignored: Counter[str] = Counter()
        self.tokens: Counter[int] = Counter()  # by id, where there is a tokenizer
        self.notes: list[str] = []
        self.formats: Counter[str] = Counter()
        names = ("width (pixels)", "height (pixels)", "bytes", "caption length")
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in names}
        self.shown: list[list[int]] = []  # a random sample: random number, item and offset in the source

    @property
    def usable(self) -> int:
        """The number of records that training can use."""
        return self.read - self.bad.total()

    def add(self, unit: int, number: int, place: Any, bad: str, image: Any, tokens: list[int]) -> None:
        """Count a record, whose opened image and tokens are given unless `bad` names what is wrong."""
        self.read += 1
        record = place.record
        if bad:
            self.bad[bad] += 1
            self.examples.setdefault(bad, [unit, number, record["key"]])
            return
        self.formats[image.format] += 1
        self.labelled += record["label"] is not None
        for counter, value in zip(self.counts.values(), (*image.size, len(record["image"])), strict=False):
            counter[value] += 1
        self.counts["caption length"].update(map(len, record["texts"]))
        self.tokens.update(tokens)
        if record["texts"]:
            origin = record.get("caption", -1)
            self.origins[origin] += 1
            self.origin_examples.setdefault(origin, [unit, number, record["texts"][0][:100]])
        self._show([[priority(unit, number), place.item, place.offset]])

    def _show(self, some):
        if len(self.shown) < ROWS * COLUMNS or min(some) < self.shown[-1]:
            self.shown = sorted(self.shown + some)[: ROWS * COLUMNS]

    def merge(self, other: dict[str, Any]) -> None:
        """Add the counts of a unit, as `plain` gives them."""
        self.read, self.labelled = self.read + other["read"], self.labelled + other["labelled"]
        for name in ("bad", "origins", "ignored", "formats", "tokens"):
            getattr(self, name).update(other[name])
        for name, counts in other["counts"].items():
            self.counts[name].update(counts)
        for name in ("examples", "origin_examples"):
            mine = getattr(self, name)
            for kind, example in other[name].items():
                mine[kind] = min(mine.get(kind, example), example)
        if other["shown"]:
            self._show(other["shown"])

    def plain(self) -> dict[str, Any]:
        """Return everything as plain data."""
        counters = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Counter)}
        return vars(self) | counters | {"counts": {name: dict(counter) for name, counter in self.counts.items()}}

    def __str__(self) -> str:
        captions = self.counts["caption length"]
        lines = [f"{self.read} records read: {self.usable} usable, {self.bad.total()} bad"]
        lines += [f"  bad: {count} {kind}, first {self.examples[kind][2]}" for kind, count in ordered(self.bad)]
        lines += [f"{captions.total()} captions, {self.labelled} class labels"]
        for name, count in ordered(self.origins):
            lines += [f"  captions of {count} images come from {name}, such as {self.origin_examples[name][2]!r}"]
        lines += self.notes
        lines += [f"formats: {', '.join(f'{count} {name}' for name, count in ordered(self.formats))}"]
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

    def draw(self, path: pathlib.Path, source: Any, data: DataConfig) -> None:
        """Write a PNG of the sampled images, which are read again, with captions, and a histogram of their lengths."""
        from matplotlib.figure import Figure  # slow to import, and workers need none

        from flip_jax.tools import drawing

        shown: list[drawing.Tile] = []
        for _, item, offset in self.shown:
            record, _ = next(source.read([(item, 0)], offset))
            label = "" if record.get("label") is None else f"class {record['label']}"
            with contextlib.suppress(transforms.BadImage):  # the source has changed meanwhile
                shown.append((" | ".join(record.get("texts", ())) or label, decode(record, SIZE, data)))
        figure = Figure(figsize=(12, 12), layout="constrained")
        images, below = figure.subfigures(2, 1, height_ratios=(ROWS, 1))  # type: ignore[misc]
        starts = range(0, ROWS * COLUMNS, COLUMNS)
        drawing.grid(images, [shown[start : start + COLUMNS] for start in starts], COLUMNS)
        axes = below.subplots()
        lengths = self.counts["caption length"]
        # Bins of equally many whole numbers: otherwise some would hold one length more than their neighbours.
        step = -(-(max(lengths, default=0) - min(lengths, default=0) + 1) // BINS)
        edges = np.arange(min(lengths, default=0), max(lengths, default=0) + step + 1, step) - 0.5
        axes.hist(list(lengths), bins=edges, weights=list(lengths.values()))
        axes.set(xlabel="caption length (characters)", ylabel="captions")
        drawing.save(figure, path)


def ordered(counter: Counter[str]) -> list[tuple[str, int]]:
    """Return names and counts, the largest first; ties by name, so that they do not depend on the order of units."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def quantiles(counter: Counter[int]) -> list[int]:
    """Return the `QUANTILES` of values counted by a counter; each is a value that occurred, none is interpolated."""
    values = sorted(counter)
    ranks = np.cumsum([counter[value] for value in values])
    return [values[np.searchsorted(ranks, max(1, q * ranks[-1]))] for q in QUANTILES]


class Inspection(units.Job):
    """Decodes every record of a unit, as training would, and counts."""

    def __init__(self, source: SourceUnits, data: DataConfig, tokenizer: Tokenizer | None = None):
        self._source, self._data, self._tokenizer = source, data, tokenizer

    def open(self) -> None:
        """Open the source."""
        self._source.open()

    def name(self, unit: int) -> str:
        """Say which unit it is."""
        return self._source.describe(unit)

    def payload(self, unit: int) -> Any:
        """Return the rows of a table."""
        return self._source.payload(unit)

    def _look(self, record):
        decode(record, SIZE, self._data)
        tokens = token_counts.of(self._tokenizer, record["texts"]) if self._tokenizer else []
        return transforms.open_image(record["image"], self._data), tokens

    def do(self, unit: int, payload: Any, watch: Watch, limit: int | None = None) -> dict[str, Any]:
        """Return the `Summary` of a unit, or of its first `limit` records."""
        summary = Summary()
        if ignored := getattr(self._source.source, "ignored", None):
            ignored.clear()  # of the units before
        places = itertools.islice(self._source.read(unit, payload), limit)
        for number, place, looked_at in watch(self._look, places):
            bad, image, tokens = "", None, []
            try:
                image, tokens = looked_at.result()
            except transforms.BadImage as error:
                bad = str(error)
            summary.add(unit, number, place, bad, image, tokens)
        summary.ignored.update(getattr(self._source.source, "ignored", {}))
        return summary.plain()


def inspect(
    source: SourceUnits,
    data: DataConfig,
    limit: int | None = None,
    crew: units.Size = units.HERE,
    tokenizer: Tokenizer | None = None,
) -> Summary:
    """Summarise a source by workers, or without them; or its first `limit` records. A tokenizer counts its tokens."""
    job, summary = Inspection(source, data, tokenizer), Summary()
    if limit:
        with tqdm(total=limit, unit=" records", mininterval=1) as bar:
            for unit in range(len(source)):
                if summary.read < limit:
                    summary.merge(job.do(unit, job.payload(unit), Watch(threads=units.cores()), limit - summary.read))
                    bar.update(summary.read - bar.n)
    else:
        with units.Crew(job, crew) as workers:
            skipped = workers.run(range(len(source)), lambda _, found: summary.merge(found))
        summary.notes += [
            f"  skipped: {job.name(unit)}: it ends its worker ({cause})" for unit, cause in skipped.items()
        ]
    opened = source.source
    named = lambda place: sources.caption_name(opened, {"caption": place}) or "the source"  # noqa: E731
    summary.origin_examples = {named(place): example for place, example in sorted(summary.origin_examples.items())}
    summary.origins = Counter({named(place): count for place, count in summary.origins.items()})
    if not summary.origins and (columns := getattr(opened, "without_captions", "")):
        summary.notes += [f"  no captions in config.data.captions ({', '.join(data.captions)}); has {columns}"]
    summary.notes += [f"  ignored: {count} {kind}" for kind, count in ordered(summary.ignored)]
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


def read_tokenizer(path: str) -> Tokenizer:
    """Read a vocabulary file, as config.data.vocab, or the tokenizer of a run or another model."""
    from flip_jax import saved_step  # both are slow to import
    from flip_jax.data import vocabulary

    if not path:
        raise UserError("--counts needs --vocab=PATH: a vocabulary file, as config.data.vocab, or a run")
    if pathlib.Path(path).is_file():
        return vocabulary.read(path)
    if not (found := saved_step.tokenizer(saved_step.newest(path))):
        raise UserError(f"--vocab={path} is a classifier, which has no tokenizer: name a vocabulary file or a run")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip inspect`."""
    options.add_source(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, default=".", metavar="DIR", help=f"folder for {GRID_FILE} (default: .)"
    )
    parser.add_argument(
        "--limit", type=options.positive, metavar="N", help="read the first N records only, in this process"
    )
    parser.add_argument(
        "--counts", type=pathlib.Path, metavar="FILE", help="count the captions' tokens, for model.text.mask_counts"
    )
    parser.add_argument(
        "--vocab", default="", metavar="PATH", help="tokenizer of --counts: as config.data.vocab, or a run"
    )
    add_reading(parser)
    units.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run `flip inspect`."""
    options.require(arguments, "source")
    if arguments.vocab and not arguments.counts:
        raise UserError("--vocab is the tokenizer of --counts: give --counts=FILE, too, or leave it out")
    source, data = open_source(arguments)
    cut = SourceUnits(arguments.source, source, data)
    options.make_folder("--out", arguments.out)
    tokenizer = None
    if arguments.counts:
        tokenizer = read_tokenizer(arguments.vocab)
        options.make_folder("--counts", arguments.counts.parent)
    crew, start = units.size(arguments, len(cut)), time.perf_counter()
    summary = inspect(cut, data, arguments.limit, crew, tokenizer)
    rate = summary.read / (time.perf_counter() - start)
    summary.draw(arguments.out / GRID_FILE, source, data)
    if tokenizer:
        options.write_text("--counts", arguments.counts, token_counts.to_text(tokenizer, summary.tokens))
        found = f"{summary.tokens.total():,} tokens, {len(summary.tokens):,} of {tokenizer.vocab_size:,}"
        summary.notes += [f"{found}: {arguments.counts}"]
    print(f"{runtime.plain(str(summary))}\n{rate:,.0f} records/s, {arguments.out / GRID_FILE}", flush=True)
    if not summary.usable:
        raise UserError(f"no record of {arguments.source} can be used for training; the counts above say why")
