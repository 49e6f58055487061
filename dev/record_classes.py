"""Writes flip_jax/evaluators/data/*.json from published packages: python dev/record_classes.py FOLDER

FOLDER holds the packages: pip install --no-deps --target=FOLDER clip-benchmark==1.6.2 open_clip_torch==3.3.0
mmpretrain==1.2.0. None of them is imported. The class names of TFDS come from the installed TFDS.
"""

import ast
import json
import pathlib
import re
import sys

import tensorflow_datasets as tfds

SOURCES = {
    "clip": "OpenAI's CLIP, as recorded in clip-benchmark 1.6.2 (MIT)",
    "open_clip": "OpenAI's CLIP, as recorded in open_clip_torch 3.3.0 (MIT)",
    "prompts": "OpenAI's CLIP, data/prompts.md (MIT)",
    "torchvision": "the names of the set itself, with blanks for _ and /, as clip-benchmark 1.6.2 takes them",
    "mmpretrain": "the names of the set itself, as recorded in mmpretrain 1.2.0 (Apache-2.0)",
    "tfds": "the names of the set itself, as recorded in tensorflow-datasets 4.9.10 (Apache-2.0)",
}
# {our name: (clip-benchmark's, TFDS's if both have the same order, compared name by name)}
CLIP = {
    "caltech101": ("caltech101_vtab", "caltech101"),
    "clevr_count": ("clevr_count_all", None),
    "clevr_distance": ("clevr_closest_object_distance", None),
    "country211": ("country211", None),
    "dmlab": ("dmlab", None),
    "eurosat": ("eurosat", "eurosat"),
    "fer2013": ("fer2013", None),
    "flowers": ("flowers", "oxford_flowers102"),
    "gtsrb": ("gtsrb", None),
    "kitti_distance": ("kitti_closest_vehicle_distance", None),
    "mnist": ("mnist", "mnist"),
    "pcam": ("pcam", "patch_camelyon"),
    "pets": ("pets", "oxford_iiit_pet"),
    "retinopathy": ("diabetic_retinopathy", "diabetic_retinopathy_detection"),
    "svhn": ("svhn", "svhn_cropped"),
}
OTHER_LABELS = {
    "clevr_count": [str(count) for count in range(3, 11)],
    "fer2013": ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"],  # its folders
}
TEMPLATES = {
    "aircraft": "fgvc_aircraft",
    "caltech101": "caltech101",
    "cars": "cars",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "clevr_count": "clevr_count_all",
    "clevr_distance": "clevr_closest_object_distance",
    "country211": "country211",
    "dmlab": "dmlab",
    "dsprites_orientation": "dsprites_label_orientation",
    "dsprites_x": "dsprites_label_x_position",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "fer2013": "fer2013",
    "flowers": "flowers",
    "food101": "food101",
    "gtsrb": "gtsrb",
    "imagenet_80": "imagenet1k",
    "kitti_distance": "kitti_closest_vehicle_distance",
    "mnist": "mnist",
    "pcam": "pcam",
    "pets": "pets",
    "resisc45": "resisc45",
    "retinopathy": "diabetic_retinopathy",
    "smallnorb_azimuth": "smallnorb_label_azimuth",
    "smallnorb_elevation": "smallnorb_label_elevation",
    "sst2": "renderedsst2",
    "stl10": "stl10",
    "sun397": "sun397",
    "svhn": "svhn",
}


def literal(path: pathlib.Path, name: str):
    """Return the value that a Python file assigns to a name; prompts that are lambdas get {} for their argument."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            if all(isinstance(item, ast.Lambda) for item in node.value.elts):
                parts = [item.body.values for item in node.value.elts]
                return [
                    "".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else "{}" for part in p)
                    for p in parts
                ]
            return (
                sorted(ast.literal_eval(node.value))
                if isinstance(node.value, ast.Set)
                else list(ast.literal_eval(node.value))
            )
    raise KeyError(f"{path}: {name}")


def tfds_labels(name: str) -> list[str]:
    return tfds.builder(name, data_dir="/nonexistent").info.features["label"].names


def classes(folder: pathlib.Path) -> dict[str, dict]:
    benchmark, names_of = folder / "clip_benchmark" / "datasets", {}
    names = json.loads((benchmark / "en_classnames.json").read_text(encoding="utf-8"))
    for ours, (theirs, tfds_name) in CLIP.items():
        names_of[ours] = {"from": "clip", "classes": names[theirs]}
        if labels := OTHER_LABELS.get(ours) or (tfds_name and tfds_labels(tfds_name)):
            names_of[ours]["labels"] = labels
    wnids = literal(benchmark / "builder.py", "all_imagenet_wordnet_ids")
    assert wnids == tfds_labels("imagenet2012")
    names_of["imagenet"] = {"from": "clip", "classes": names["imagenet1k"], "labels": wnids}
    for letter in "ar":
        subset = literal(benchmark / "builder.py", f"imagenet_{letter}_wnids")
        names_of[f"imagenet_{letter}"] = {"from": "clip", "of": "imagenet", "labels": sorted(subset)}
    for ours, tfds_name in {
        "food101": "food101",
        "dtd": "dtd",
        "cars": "cars196",
        "resisc45": "resisc45",
        "sun397": "sun397",
    }.items():
        labels = tfds_labels(tfds_name)
        plain = [re.sub("^/./", "", label).replace("_", " ").replace("/", " ") for label in labels]
        names_of[ours] = {"from": "torchvision" if ours != "resisc45" else "tfds", "classes": plain, "labels": labels}
    for ours, theirs in {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "aircraft": "FGVCAIRCRAFT"}.items():
        plain = literal(folder / "mmpretrain" / "datasets" / "categories.py", f"{theirs}_CATEGORIES")
        names_of[ours] = {"from": "mmpretrain", "classes": [name.replace("_", " ") for name in plain]}
    names_of["stl10"] = {
        "from": "torchvision",
        "classes": ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
    }
    names_of["sst2"] = {"from": "torchvision", "classes": ["negative", "positive"]}
    actions = (pathlib.Path(tfds.__file__).parent / "video" / "ucf101_labels.txt").read_text().split()
    spaced = [re.sub("(?<=[a-z])(?=[A-Z])", " ", action) for action in actions]
    names_of["ucf101"] = {"from": "tfds", "classes": spaced, "labels": actions}
    return names_of


def templates(folder: pathlib.Path) -> dict[str, list[str]]:
    recorded = json.loads((folder / "clip_benchmark/datasets/en_zeroshot_classification_templates.json").read_text())
    prompts = {ours: [prompt.replace("{c}", "{}") for prompt in recorded[theirs]] for ours, theirs in TEMPLATES.items()}
    prompts["imagenet"] = literal(folder / "open_clip" / "zero_shot_metadata.py", "SIMPLE_IMAGENET_TEMPLATES")
    verbs = ("", "using ", "doing ", "during ", "performing ", "practicing ")
    things = ("photo", "video", "example", "demonstration")
    prompts["ucf101"] = [f"a {x} of {a} person {verb}{{}}." for verb in verbs for a in ("a", "the") for x in things]
    prompts["emoji"] = ["{}"]
    return prompts


def write(path: pathlib.Path, key: str, notes: dict, entries: dict) -> None:
    """{**notes, key: entries} as JSON with a line for each entry."""
    head = json.dumps(notes, ensure_ascii=False, indent=1).removesuffix("\n}")
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in sorted(entries.items())
    ]
    path.write_text(f'{head},\n "{key}": {{\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    data = pathlib.Path(__file__).parent.parent / "flip_jax" / "evaluators" / "data"
    packages = pathlib.Path(sys.argv[1])
    notes = {"about": "Written by dev/record_classes.py. Data of others: `from` says whose.", "sources": SOURCES}
    write(data / "classes.json", "sets", notes, classes(packages))
    whose = {"imagenet": "open_clip", "ucf101": "prompts", "others": "clip"}
    write(data / "templates.json", "templates", notes | {"from": whose}, templates(packages))
