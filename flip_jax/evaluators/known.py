"""Table of the known data sets: splits, metric, class names, prompts, and how to get the data.

Class names and prompts are in `data/classes.json` and `data/templates.json`, which state their sources.
"""

import difflib
import functools
import json
import pathlib
from typing import Any, NamedTuple

from flip_jax.runtime import UserError

FILES = pathlib.Path(__file__).parent / "data"
CAPTIONS = "captions"  # takes the place of a metric: the data set has captions and no classes


class Unknown(UserError):
    """A task that names an evaluator or a data set that does not exist: no data could make it work."""


class Known(NamedTuple):
    """One row of `KNOWN`.

    Splits are sources; DIR stands for the folder of TFDS (config.data.tfds_dir), SIZE for the drawings that fit the
    model's image size. `classes` and `templates` name entries of data/*.json where these differ from the data set's own
    name.
    """

    test: str
    train: str = ""
    metric: str = "top1"  # the one that CLIP reports, or "mean_per_class", or `CAPTIONS`
    classes: str = ""
    templates: str = ""
    export: str = ""  # CLIP_benchmark's name, for data sets that TFDS does not have


def _tfds(test: str, train: str = "", **more: str) -> Known:
    """Builds the row of a data set that TFDS has."""
    return Known(f"tfds:{test}", train and f"tfds:{train}", **more)


def _tars(name: str, export: str = "", **more: str) -> Known:
    """Builds the row of a data set that TFDS does not have, read from the tars that CLIP_benchmark writes."""
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
# Splits are those of CLIP_benchmark: the data sets' own or VTAB's.
KNOWN = {
    **_IMAGENET,  # the paper's 7 prompts
    **{  # CLIP's 80 prompts
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
    "emoji": _tfds("emoji/SIZE/test", "emoji/SIZE/train"),
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


def get(name: str) -> Known:
    """Returns the row of a data set, or raises `Unknown` with all names, the nearest first."""
    if name not in KNOWN:
        nearest = difflib.get_close_matches(name, KNOWN, n=len(KNOWN), cutoff=0)
        raise Unknown(f"unknown data set {name!r}: known are {', '.join(nearest)}, or give a source (KIND:REST)")
    return KNOWN[name]


@functools.cache
def recorded_classes(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the class names in data/classes.json and the data set's own names for them; () where not recorded."""
    sets = json.loads((FILES / "classes.json").read_text(encoding="utf-8"))["sets"]
    entry: dict[str, Any] = sets.get(name, {})
    if "of" in entry:  # a subset of another data set's classes
        whole = sets[entry["of"]]
        names = dict(zip(whole["labels"], whole["classes"], strict=True))
        return tuple(names[label] for label in entry["labels"]), tuple(entry["labels"])
    return tuple(entry.get("classes", ())), tuple(entry.get("labels", ()))


@functools.cache
def recorded_templates() -> dict[str, list[str]]:
    """Reads the prompts in data/templates.json."""
    return json.loads((FILES / "templates.json").read_text(encoding="utf-8"))["templates"]


def instruction(name: str, known: Known, folder: str) -> str:
    """Returns how to get a data set that TFDS does not have."""
    if known.metric == CAPTIONS:
        return (
            f"Put Karpathy's dataset_{name}.json and its image folder into {folder}/{name}, or give their path: "
            f"{name}=karpathy:FILE.json#test#FOLDER, or {name}=webdataset:PATTERN for CLIP_benchmark's tars"
        )
    if not known.export:
        return f"Put the images there, in one folder per class, or give their path: {name}=folder:DIR"
    output = f"--dataset_root RAW --output {folder}/{name}"
    return (
        f"Prepare it: `clip_benchmark_export_wds --dataset {known.export} --split test {output}` (pip install "
        f"clip-benchmark), or give its path: {name}=webdataset:PATTERN, or {name}=folder:DIR with one folder per class"
    )


def listing() -> str:
    """Formats `KNOWN` as a table in Markdown."""
    lines = ["| data set | classes | prompts | headline | default source |", "|---|---|---|---|---|"]
    for name, known in KNOWN.items():
        if known.metric == CAPTIONS:
            cells = "- | - | mean_recall"
        else:
            classes = len(recorded_classes(known.classes or name)[0]) or "its own"
            prompts = len(recorded_templates()[known.templates or name])
            cells = f"{classes} | {prompts} | {known.metric}"
        lines.append(f"| `{name}` | {cells} | `{known.test}` |")
    return "\n".join(lines)
