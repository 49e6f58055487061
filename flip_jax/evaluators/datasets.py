"""Data sets as evaluators get them: images, labels, class names and prompts."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flip_jax.config import Config
from flip_jax.data import pipeline, sources
from flip_jax.evaluators import known
from flip_jax.runtime import UserError, say

_log = logging.getLogger(__name__)

SAY_EVERY = 30  # seconds between the lines that stand for a progress bar where there is no terminal
DEFAULT_TEMPLATES = ("a photo of a {}.",)  # the simplest of CLIP's prompts, for sources without their own


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set; `test` and `train` are sources, "" where it has no such split.

    `classes` are the class names in the order of the labels, () if unknown. `labels` are the data set's own names for
    them, in the same order, () if not recorded. `test_names` are the test source's names, in the order of its labels.
    """

    name: str
    test: str
    train: str = ""
    metric: str = "top1"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    labels: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()


@functools.lru_cache
def find(text: str, config: Config) -> Dataset:
    """Returns the data set that a task names: NAME, NAME=SOURCE or SOURCE, optionally with ";train=SOURCE".

    Raises:
      known.Unknown: no data set has this name.
      UserError: the test source cannot be opened, or `config.eval.classnames` is not a file.
    """
    rest, *train = re.split(r";train=(?=.)", text, maxsplit=1)
    named = re.fullmatch(r"([\w-]+)(?:=(.*))?", rest)  # a source has a colon before any "="
    if named:
        return _find_known(named[1], named[2] or "", "".join(train), config)
    return _find_source(text, rest, "".join(train), config)


def _find_source(text: str, source: str, train: str, config: Config) -> Dataset:
    """Describes a source by its own class names and prompts, or those of the settings."""
    opened = sources.open_source(source, config.data)
    names = tuple(opened.class_names or ())
    classes = _read_classes(config.eval.classnames) if config.eval.classnames else _spaced(names)
    templates = tuple(config.eval.templates or opened.templates or DEFAULT_TEMPLATES)
    return Dataset(text, source, train, "top1", classes, templates, test_names=names)


def _find_known(name: str, source: str, train: str, config: Config) -> Dataset:
    """Describes a data set of the table, with `source` and `train` in place of its own splits where they are given."""
    row = known.get(name)
    folder = config.data.tfds_dir or os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    size = "64" if config.model.image.image_size <= 64 else "224"  # the sizes in which data/emoji.py draws
    own = {split: getattr(row, split).replace("DIR", folder).replace("SIZE", size) for split in ("test", "train")}
    test = source or own["test"]
    try:
        opened = sources.open_source(test, config.data)
    except UserError as error:
        if source or row.test.startswith("tfds:"):
            raise
        raise UserError(f"{error}. {known.instruction(name, row, folder)}") from error
    classes, labels = known.recorded_classes(row.classes or name)
    recorded_templates = known.recorded_templates().get(row.templates or name)
    return Dataset(
        name,
        test,
        train or ("" if source else own["train"]),
        row.metric,
        classes or _spaced(opened.class_names),
        tuple(config.eval.templates or recorded_templates or opened.templates or DEFAULT_TEMPLATES),
        labels,
        tuple(opened.class_names or ()),
    )


def _read_classes(name: str) -> tuple[str, ...]:
    """Reads the class names in a file: one per line, or a JSON list."""
    path, wanted = pathlib.Path(name), "config.eval.classnames must be a file with one name per line or a JSON list"
    if not path.is_file():
        raise UserError(f"{wanted}; got {name!r}")
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if text.startswith("[") else text.splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{wanted}; {name!r} cannot be read: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{wanted}; {name!r} has entries that are not strings")
    return tuple(names)


def labelled(dataset: Dataset, config: Config, split: str = "test") -> Iterator[dict[str, Any]]:
    """Yields the batches of a split, with labels that index `dataset.classes`.

    `mask` is also False for images of classes that are not part of the data set. Shows a progress bar on a terminal.

    Raises:
      UserError: the data set has no such split, the source has other classes, or an image has no valid label.
    """
    source = getattr(dataset, split)
    if not source:
        raise UserError(f"{dataset.name} has no {split} split: add ';{split}=SOURCE' to the task")
    opened = sources.open_source(source, config.data)
    class_index = map_labels(source, opened.class_names, dataset)
    for batch in batches(source, config):
        label, mask = batch["label"], batch["mask"]
        outside = mask & ((label < 0) | (label >= len(class_index)) if len(class_index) else label < 0)
        if outside.any():
            key, value = batch["keys"][outside.argmax()], label[outside.argmax()]
            problem = "has no label" if value < 0 else f"has label {value}, outside the {len(class_index)} classes"
            raise UserError(
                f"{source!r}: {outside.sum()} of {mask.sum()} images of a batch: the first, {key}, {problem}"
            )
        if len(class_index):
            label = np.where(mask, class_index[np.where(mask, label, 0)], -1).astype(np.int32)
        yield batch | {"label": label, "mask": mask & (label >= 0)}


def batches(source: str, config: Config, *, with_text: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the batches of `pipeline.eval_dataset` with a progress bar, and warns about images that cannot be used."""
    opened = sources.open_source(source, config.data)
    total = len(opened) if opened.at_once > 1 else None  # the number of records in shards is not known in advance
    read = used = 0
    with Progress(shortened(source), total, " images") as bar:
        for batch in pipeline.eval_dataset(source, config, with_text=with_text):
            yield batch
            read, used = read + sum(map(bool, batch["keys"])), used + batch["mask"].sum()
            bar.update(config.eval.batch_size)
    if used < read:
        _log.warning("%s: %d of the %d images that this process read cannot be used", source, read - used, read)


class Progress(tqdm):
    """A progress bar on a terminal, or a line every `SAY_EVERY` seconds where there is none; in the first process."""

    def __init__(self, name: str, total: int | None, unit: str):
        hidden = jax.process_index() > 0 or None  # None makes tqdm look whether there is a terminal
        super().__init__(desc=name, total=total, unit=unit, leave=False, disable=hidden)
        # A disabled bar keeps nothing.
        self._name, self._unit, self._done, self._said = name, unit, 0, time.perf_counter()

    def update(self, n: float | None = 1) -> bool | None:
        """Adds `n` done."""
        self._done += int(n or 0)
        if self.disable and time.perf_counter() - self._said > SAY_EVERY:
            self._said = time.perf_counter()
            of = f" of {self.total:,}" if self.total else ""
            say(f"{self._name}: {min(self._done, self.total or self._done):,}{of}{self._unit}")
        return super().update(n)


def shortened(name: str) -> str:
    """Cuts the paths in a data set's name, or in a task's, to their ends, which tell them apart."""
    return re.sub(r"(?<=:)(?=[^;]{44})[^;]+?(?=/[^;]{0,36}(;|$))", "...", name)


def map_labels(source: str, names: Sequence[str] | None, dataset: Dataset) -> np.ndarray:
    """Returns the index in `dataset.classes` of each label of a source, -1 for classes outside the data set.

    `names` are the source's class names. Classes of a known data set are matched by name. They are matched by order if
    the source has no names or the same number of classes and: it is a tar, its names are numbers, or it is a folder
    none of whose names is that of a class.

    Raises:
      UserError: the source has other classes.
    """
    count, kind, own = len(dataset.classes), source.partition(":")[0], dataset.name not in known.KNOWN
    if not names or not count or _spaced(names) == dataset.classes or (own and len(names) == count):
        return np.arange(count)
    label_of = {_simplified(name): label for label, name in enumerate(names)}
    recorded = [[_simplified(name) for name in wanted] for wanted in (dataset.labels, dataset.classes)]
    for wanted in recorded:
        unambiguous = len(label_of) == len(names) and len(set(wanted)) == count
        if wanted and unambiguous and label_of.keys() >= set(wanted):
            class_index = np.full(len(names), -1)
            class_index[[label_of[name] for name in wanted]] = np.arange(count)
            return class_index
    numbered = list(names) == [str(i) for i in range(count)]
    no_match = kind == "folder" and not label_of.keys() & {*recorded[0], *recorded[1]}
    if len(names) == count and (kind == "webdataset" or numbered or no_match):
        return np.arange(count)
    raise UserError(
        f"{source!r} has other classes than {dataset.name}: {len(names)} ({', '.join(names[:3])} ...), wanted {count} "
        f"({', '.join((dataset.labels or dataset.classes)[:3])} ...)"
    )


def _spaced(names: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names or ())


def _simplified(name: str) -> str:
    """Keeps lower-case letters and digits only: case and punctuation differ between copies of a data set."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
