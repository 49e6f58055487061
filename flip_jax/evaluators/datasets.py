"""Data sets as evaluators get them: images, labels, class names and prompts."""

import collections
import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flip_jax.config import Config, DataConfig
from flip_jax.data import classes, eval_batches, sources
from flip_jax.evaluators import class_file, known
from flip_jax.evaluators.known import recorded_classes, recorded_templates
from flip_jax.runtime import UserError, say

_log = logging.getLogger(__name__)

SAY_EVERY = 30  # seconds between the lines that stand for a progress bar where there is no terminal
DEFAULT_TEMPLATES = ("a photo of a {}.",)  # the simplest of CLIP's prompts, for sources without their own
SOURCE_ITSELF = "the source itself"
OTHER_CLASS = "class outside the data set"


@dataclasses.dataclass
class Seen:
    """What became of the images of a test split: how many were used, and how many skipped for each reason.

    `empty` are the classes that none of them is of.
    """

    used: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    empty: tuple[str, ...] = ()

    def skipped_text(self) -> str:
        """Formats the skipped images by their reason."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped.most_common())
        return f"{self.skipped.total()} skipped{kinds and f' ({kinds})'}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set; `test` and `train` are sources, "" where it has no such split.

    `classes` are the class names in the order of the labels, () if unknown, and `whose` says where they come from.
    `labels` are the data set's own names for them, in the same order, () if it has no others.
    """

    name: str
    test: str
    train: str = ""
    metric: str = "top1"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    labels: tuple[str, ...] = ()
    whose: str = ""
    seen: Seen = dataclasses.field(default_factory=Seen, compare=False)

    def note_classes(self, count_C: np.ndarray) -> None:
        """Records which classes have no images, from the number of images of each class."""
        names = self.classes or [str(number) for number in range(len(count_C))]
        self.seen.empty = tuple(name for name, count in zip(names, count_C, strict=False) if not count)


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
    names, own, whose = classes.spaced(opened.class_names), (), SOURCE_ITSELF
    if config.eval.classnames:
        names, own = class_file.read(config.eval.classnames)
        whose = config.eval.classnames
    templates = tuple(config.eval.templates or opened.templates or DEFAULT_TEMPLATES)
    return Dataset(text, source, train, "top1", names, templates, own, whose)


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
        raise UserError(f"{error}. {known.instruction(name, row, folder)}") from None
    names, labels = recorded_classes(row.classes or name)
    recorded = recorded_templates().get(row.templates or name)
    return Dataset(
        name,
        test,
        train or ("" if source else own["train"]),
        row.metric,
        names or classes.spaced(opened.class_names),
        tuple(config.eval.templates or recorded or opened.templates or DEFAULT_TEMPLATES),
        labels,
        name if names else SOURCE_ITSELF,
    )


def with_training_names(dataset: Dataset, config: Config) -> Dataset:
    """Returns the data set with the classes of its training split, unless a table or a file names the classes."""
    names, _ = _names(dataset.train, config.data)
    if dataset.whose != SOURCE_ITSELF or not names:
        return dataset
    return dataclasses.replace(dataset, classes=classes.spaced(names), whose=f"the training split {dataset.train!r}")


def with_classifier_names(dataset: Dataset, names: tuple[str, ...] | None, config: Config) -> Dataset:
    """Returns the data set with the classes of a classifier, whose checkpoint has `names`: None if it has no entry.

    Without names, labels are numbers. Checkpoints from before names were saved also take a source with as many names,
    in the order of that time.
    """
    count = config.finetune.classes
    own, _ = _names(dataset.test, config.data)
    if names:
        return dataclasses.replace(dataset, classes=names, labels=(), whose="the classes that were trained")
    if config.eval.classnames and dataset.whose == config.eval.classnames:
        return dataset
    if names is None and own and len(own) == count:
        _log.warning(
            "%s: the checkpoint is from before class names were saved: the %d classes of %r are taken to be those that "
            "were trained, in the same order",
            *(dataset.name, count, dataset.test),
        )
        own = sorted(own) if "folder:" in config.data.train else own  # folders were sorted as text
        return dataclasses.replace(dataset, classes=tuple(own), labels=(), whose="the checkpoint without class names")
    numbers = tuple(str(number) for number in range(count))
    return dataclasses.replace(
        dataset, classes=numbers, labels=(), whose="the classifier, which was trained on numbers"
    )


@functools.lru_cache
def _names(source: str, data: DataConfig) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Returns the class names of a source, None if it has none, and its class folders without images."""
    opened = sources.open_source(source, data)
    return opened.class_names and tuple(opened.class_names), tuple(getattr(opened, "empty_classes", ()))


def match(dataset: Dataset, config: Config, split: str = "test") -> classes.Match | None:
    """Finds the class of each label of a split, None for a data set without a list of classes.

    Raises:
      UserError: the data set has no such split, or the source has other classes.
    """
    source = getattr(dataset, split)
    if not source:
        raise UserError(f"{dataset.name} has no {split} split: add ';{split}=SOURCE' to the task")
    names, empty = _names(source, config.data)
    if not dataset.classes:
        return None
    wanted = classes.ClassList(dataset.classes, dataset.whose, dataset.labels, partial=dataset.whose in known.KNOWN)
    return classes.match(source, names, wanted, empty)


def labelled(dataset: Dataset, config: Config, split: str = "test") -> Iterator[dict[str, Any]]:
    """Yields the batches of a split, with labels that index `dataset.classes`, and says how these were found.

    `mask` is also False for images of classes that are not part of the data set. Shows a progress bar on a terminal.

    Raises:
      UserError: the data set has no such split, the source has other classes, or an image has no valid label.
    """
    found, source = match(dataset, config, split), getattr(dataset, split)
    seen = dataset.seen if split == "test" else Seen()
    _say_once(f"{source}: {found.how}" if found else f"{source}: labels are numbers; it has no class names")
    for batch in batches(source, config, seen=seen):
        label, mask = batch["label"], batch["mask"]
        outside = mask & (label < 0)
        if found:
            inside = (label >= 0) & (label < len(found.index))
            mapped = np.where(inside, found.index[np.where(inside, label, 0)], -1).astype(np.int32)
            # Only classes that have a name can be told to be outside the data set.
            outside |= mask & (~inside | ((mapped < 0) & (not found.ignores)))
        if outside.any():
            key, value = batch["keys"][outside.argmax()], label[outside.argmax()]
            problem = f"has label {value}, outside the {len(dataset.classes)} classes"
            if value < 0:
                problem = "has no label; the test splits of some data sets have -1 instead, and cannot be scored"
            raise UserError(
                f"{source!r}: {outside.sum()} of {mask.sum()} images of a batch: the first, {key}, {problem}"
            )
        if found:
            label, used = mapped, mask & (mapped >= 0)
            if others := int(mask.sum() - used.sum()):
                seen.skipped[OTHER_CLASS] += others
                seen.used -= others
            mask = used
        yield batch | {"label": label, "mask": mask}


@functools.cache
def _say_once(line: str) -> None:
    say(line)


def batches(
    source: str, config: Config, *, with_text: bool = False, seen: Seen | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the batches of `eval_batches.eval_dataset` with a progress bar; counts and warns of unusable images."""
    opened = sources.open_source(source, config.data)
    total = len(opened) if opened.at_once > 1 else None  # the number of records in shards is not known in advance
    seen, skipped = Seen() if seen is None else seen, collections.Counter()
    with Progress(shortened(source), total, " images") as bar:
        for batch in eval_batches.eval_dataset(source, config, with_text=with_text):
            skipped.update(filter(None, batch["bad"]))
            seen.used += int(batch["mask"].sum())
            yield batch
            bar.update(config.eval.batch_size)
    seen.skipped.update(skipped)
    if skipped:
        _log.warning("%s: %s of the images that this process read", source, Seen(skipped=skipped).skipped_text())


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
