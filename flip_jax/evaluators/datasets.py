"""The data sets that tasks may name, and what evaluators need of a data set: pictures, labels, class names, prompts.

A set is a row of `KNOWN`. Its class names and prompts are in `data/classes.json` and `data/templates.json`, which say
where they are from.
"""

import dataclasses
import difflib
import functools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flip_jax.config import Config
from flip_jax.data import pipeline, sources

_log = logging.getLogger(__name__)

FILES = pathlib.Path(__file__).parent / "data"
PLAIN = ("a photo of a {}.",)  # the plainest of CLIP's prompts, where a source has none
CAPTIONS = "captions"  # in place of a metric: the set has captions and no classes


class Unknown(ValueError):
    """A name that nothing has."""


class Known(NamedTuple):
    """What `KNOWN` says of a set: its splits, its metric, and its entries in data/*.json if they have other names.

    Splits are sources, where DIR is the folder of TFDS (config.data.tfds_dir).
    """

    test: str
    train: str = ""
    metric: str = "top1"  # that CLIP reports it by, or "mean_per_class", or `CAPTIONS`
    classes: str = ""
    templates: str = ""
    export: str = ""  # what CLIP_benchmark calls it, for sets that TFDS does not serve


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as an evaluator gets it: `test` and `train` are sources, "" where there is none.

    `classes` are the class names in the order of the labels, () where a source has none. `labels` are what the set
    itself calls its classes, in the same order, () where that is not recorded. `test_names` are what the test source
    calls them, in the order of its labels.
    """

    name: str
    test: str
    train: str = ""
    metric: str = "top1"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = PLAIN
    labels: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()


def _tfds(test, train="", **more):
    return Known(f"tfds:{test}", train and f"tfds:{train}", **more)


def _tars(name, export="", **more):
    """A set that TFDS does not serve, as the tars that CLIP_benchmark writes."""
    return Known(
        f"webdataset:DIR/{name}/test/*.tar", f"webdataset:DIR/{name}/train/*.tar", export=export or name, **more
    )


_IMAGENET = {
    "imagenet": _tfds("imagenet2012/validation", "imagenet2012/train"),
    "imagenet_v2": _tfds("imagenet_v2/test", classes="imagenet", templates="imagenet"),
    "imagenet_a": _tfds("imagenet_a/test", templates="imagenet"),
    "imagenet_r": _tfds("imagenet_r/test", templates="imagenet"),
    "imagenet_sketch": _tfds("imagenet_sketch/test", classes="imagenet", templates="imagenet"),
    "objectnet": _tars("objectnet", templates="imagenet"),
}
_RETINOPATHY = "diabetic_retinopathy_detection/btgraham-300"
# Splits are those of CLIP_benchmark: the sets' own or VTAB's.
KNOWN = {
    **_IMAGENET,  # with the 7 prompts of the paper
    **{  # with CLIP's 80
        f"{name}_80": known._replace(classes=known.classes or name, templates="imagenet_80")
        for name, known in _IMAGENET.items()
    },
    "aircraft": _tars("aircraft", "fgvc_aircraft", metric="mean_per_class"),
    "caltech101": _tfds("caltech101/test", "caltech101/train", metric="mean_per_class"),
    "cars": _tfds("cars196/test", "cars196/train"),
    "cifar10": _tfds("cifar10/test", "cifar10/train"),
    "cifar100": _tfds("cifar100/test", "cifar100/train"),
    "clevr_count": _tfds("clevr/validation#len:objects/color", "clevr/train#len:objects/color"),
    "clevr_distance": _tars("clevr_distance", "vtab/clevr_closest_object_distance"),
    "country211": _tars("country211"),
    "dmlab": _tfds("dmlab/test", "dmlab/train"),
    "dsprites_orientation": _tfds("dsprites/train[90%:]#label_orientation", "dsprites/train[:80%]#label_orientation"),
    "dsprites_x": _tfds("dsprites/train[90%:]#label_x_position", "dsprites/train[:80%]#label_x_position"),
    "dtd": _tfds("dtd/test", "dtd/train+validation"),
    "emoji": _tfds("emoji/test", "emoji/train"),
    "eurosat": _tfds("eurosat/rgb/train[21600:]", "eurosat/rgb/train[:21600]"),
    "fer2013": _tars("fer2013"),
    "flowers": _tfds("oxford_flowers102/test", "oxford_flowers102/train+validation", metric="mean_per_class"),
    "food101": _tfds("food101/validation", "food101/train"),
    "gtsrb": _tars("gtsrb"),
    "kitti_distance": _tars("kitti_distance", "vtab/kitti_closest_vehicle_distance"),
    "mnist": _tfds("mnist/test", "mnist/train"),
    "pcam": _tfds("patch_camelyon/test", "patch_camelyon/train"),
    "pets": _tfds("oxford_iiit_pet/test", "oxford_iiit_pet/train", metric="mean_per_class"),
    "resisc45": _tfds("resisc45/train[25200:]", "resisc45/train[:25200]"),
    "retinopathy": _tfds(f"{_RETINOPATHY}/test", f"{_RETINOPATHY}/train"),
    "smallnorb_azimuth": _tfds("smallnorb/test[50%:]#label_azimuth", "smallnorb/train#label_azimuth"),
    "smallnorb_elevation": _tfds("smallnorb/test[50%:]#label_elevation", "smallnorb/train#label_elevation"),
    "sst2": _tars("sst2", "renderedsst2"),
    "stl10": _tfds("stl10/test", "stl10/train"),
    "sun397": _tfds("sun397/tfds/test", "sun397/tfds/train"),
    "svhn": _tfds("svhn_cropped/test", "svhn_cropped/train"),
    "ucf101": Known("folder:DIR/ucf101/test", "folder:DIR/ucf101/train"),
    "coco": Known("karpathy:DIR/coco/dataset_coco.json#test", metric=CAPTIONS, export="mscoco_captions"),
    "flickr30k": Known("karpathy:DIR/flickr30k/dataset_flickr30k.json#test", metric=CAPTIONS, export="flickr30k"),
}


@functools.lru_cache
def find(text: str, config: Config) -> Dataset:
    """The data set of a task: NAME, NAME=SOURCE or SOURCE, and maybe ";train=SOURCE" (see `config.Eval`).

    Raises:
      Unknown: the name; with all that are known, the nearest first.
      ValueError: a source that is not there, or class names that are no list of different names.
    """
    name, source, train = re.fullmatch(
        r"(?:([\w-]+)(?:=|$|(?=;train=)))?(.*?)(?:;train=(.+))?", text, re.DOTALL
    ).groups("")
    if not name:
        own = sources.open_source(source, config.data)
        names, templates = own.class_names or (), config.eval.templates or own.templates or PLAIN
        classes = _classes_of_file(config.eval.classnames) if config.eval.classnames else _spaced(names)
        return Dataset(text, source, train, "top1", classes, tuple(templates), test_names=tuple(names))
    if name not in KNOWN:
        nearest = difflib.get_close_matches(name, KNOWN, n=len(KNOWN), cutoff=0)
        raise Unknown(f"there is no data set {name!r}; known are {', '.join(nearest)}, or give a source (KIND:REST)")
    known = KNOWN[name]
    folder = config.data.tfds_dir or os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    test = source or known.test.replace("DIR", folder)
    try:
        own = sources.open_source(test, config.data)
    except ValueError as error:
        if source or known.test.startswith("tfds:"):
            raise
        raise ValueError(f"{error}. {_instruction(name, known, folder)}") from error
    classes, labels = recorded_classes(known.classes or name)
    return Dataset(
        name,
        test,
        train or ("" if source else known.train.replace("DIR", folder)),
        known.metric,
        classes or _spaced(own.class_names),
        tuple(config.eval.templates or recorded_templates().get(known.templates or name) or own.templates or PLAIN),
        labels,
        tuple(own.class_names or ()),
    )


def _instruction(name: str, known: Known, folder: str) -> str:
    """How to get a set that TFDS does not serve."""
    if known.metric == CAPTIONS:
        return (
            f"Put Karpathy's dataset_{name}.json and the folder of its pictures into {folder}/{name}, or say where they"
            f" are: {name}=karpathy:FILE.json#test#FOLDER, or {name}=webdataset:PATTERN for CLIP_benchmark's tars"
        )
    if not known.export:
        return f"Put pictures there, in a folder for each class, or say where they are: {name}=folder:DIR"
    output = f"--dataset_root RAW --output {folder}/{name}"
    return (
        f"Prepare it: `clip_benchmark_export_wds --dataset {known.export} --split test {output}` (pip install "
        f"clip-benchmark), or say where it is: {name}=webdataset:PATTERN, or {name}=folder:DIR, one for each class"
    )


def labelled(dataset: Dataset, config: Config, split: str = "test") -> Iterator[dict[str, Any]]:
    """The batches of `pipeline.eval_dataset` of a split, with labels that are places in `dataset.classes`.

    `mask` is False, too, for pictures of classes that the set leaves out. Shows a progress bar on a terminal.

    Raises:
      ValueError: there is no such split, classes of the source that are not those of the set, a picture without label
        or with one that is outside the classes.
    """
    source = getattr(dataset, split)
    if not source:
        raise ValueError(f"{dataset.name} has no {split} split: add ';{split}=SOURCE' to the task")
    opened = sources.open_source(source, config.data)
    place = places(source, opened.class_names, dataset)
    for batch in batches(source, config):
        label, mask = batch["label"], batch["mask"]
        outside = mask & ((label < 0) | (label >= len(place)) if len(place) else label < 0)
        if outside.any():
            key, value = batch["keys"][outside.argmax()], label[outside.argmax()]
            found = "has no label" if value < 0 else f"has label {value}, outside the {len(place)} classes"
            raise ValueError(
                f"{source!r}: {outside.sum()} of {mask.sum()} pictures of a batch: the first, {key}, {found}"
            )
        if len(place):
            label = np.where(mask, place[np.where(mask, label, 0)], -1).astype(np.int32)
        yield batch | {"label": label, "mask": mask & (label >= 0)}


def batches(source: str, config: Config, *, with_text: bool = False) -> Iterator[dict[str, Any]]:
    """`pipeline.eval_dataset`, counted on a bar where somebody watches: of the first process, on a terminal."""
    opened = sources.open_source(source, config.data)
    total = len(opened) if opened.at_once > 1 else None  # how many records shards hold, nobody knows
    read = used = 0
    with progress(source, total, " pictures") as bar:
        for batch in pipeline.eval_dataset(source, config, with_text=with_text):
            yield batch
            read, used = read + sum(map(bool, batch["keys"])), used + batch["mask"].sum()
            bar.update(config.eval.batch_size)
    if used < read:
        _log.warning("%s: %d of the %d pictures that this process read cannot be used", source, read - used, read)


def progress(name: str, total: int | None, unit: str) -> tqdm:
    """A bar on the terminal of the first process, if it has one."""
    hidden = jax.process_index() > 0 or None  # None: unless on a terminal
    return tqdm(desc=name, total=total, unit=unit, leave=False, disable=hidden)


def _classes_of_file(name: str) -> tuple[str, ...]:
    """The class names in a file, one a line or a JSON list."""
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"config.eval.classnames must be a file with a name a line, or with a JSON list; got {name!r}")
    text = path.read_text(encoding="utf-8")
    return tuple(json.loads(text) if text.startswith("[") else text.splitlines())


@functools.cache
def recorded_classes(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names, and what the set itself calls its classes, as data/classes.json has them; () where it has none."""
    sets = json.loads((FILES / "classes.json").read_text(encoding="utf-8"))["sets"]
    entry = sets.get(name, {})
    if "of" in entry:  # a subset of another set's classes
        whole = sets[entry["of"]]
        names = dict(zip(whole["labels"], whole["classes"], strict=True))
        return tuple(names[label] for label in entry["labels"]), tuple(entry["labels"])
    return tuple(entry.get("classes", ())), tuple(entry.get("labels", ()))


@functools.cache
def recorded_templates() -> dict[str, list[str]]:
    """The prompts in data/templates.json."""
    return json.loads((FILES / "templates.json").read_text(encoding="utf-8"))["templates"]


def places(source: str, names: Sequence[str] | None, dataset: Dataset) -> np.ndarray:
    """For each label of a source its place in `dataset.classes`, -1 for classes that the set leaves out.

    Classes of a known set are found by their names. Else they go by their order: of tars, where the source has numbers
    for names, and of folders if none has the name of a class.
    """
    count, kind, own = len(dataset.classes), source.partition(":")[0], dataset.name not in KNOWN
    if not names or not count or _spaced(names) == dataset.classes or (own and len(names) == count):
        return np.arange(count)
    place = {_plain(name): i for i, name in enumerate(names)}
    known = [list(map(_plain, wanted)) for wanted in (dataset.labels, dataset.classes)]
    for wanted in known:
        if wanted and len(place) == len(names) and len(set(wanted)) == count and place.keys() >= set(wanted):
            places = np.full(len(names), -1)
            places[[place[name] for name in wanted]] = np.arange(count)
            return places
    numbered = list(names) == [str(i) for i in range(count)]
    foreign = kind == "folder" and not place.keys() & {*known[0], *known[1]}
    if len(names) == count and (kind == "webdataset" or numbered or foreign):
        return np.arange(count)
    raise ValueError(
        f"{source!r} has other classes than {dataset.name}: {len(names)} ({', '.join(names[:3])} ...), wanted {count} "
        f"({', '.join((dataset.labels or dataset.classes)[:3])} ...)"
    )


def _spaced(names):
    return tuple(name.replace("_", " ") for name in names or ())


def _plain(name):
    """A name without what is spelt differently from place to place: case, and all but letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def listing() -> str:
    """`KNOWN` as a table in Markdown."""
    lines = ["| set | classes | prompts | headline | looked for in |", "|---|---|---|---|---|"]
    for name, known in KNOWN.items():
        if known.metric == CAPTIONS:
            classes, prompts, headline = "-", "-", "mean_recall"
        else:
            classes = len(recorded_classes(known.classes or name)[0]) or "its own"
            prompts, headline = len(recorded_templates()[known.templates or name]), known.metric
        lines.append(f"| `{name}` | {classes} | {prompts} | {headline} | `{known.test}` |")
    return "\n".join(lines)
