"""Labels are matched by name: random folders against an independent count, and every way in which names can differ."""

import json
import random

import numpy as np
import pytest
from helpers import png

from flip_jax.config import Config, DataConfig, FinetuneConfig
from flip_jax.data import classes, sources
from flip_jax.data.classes import ClassList
from flip_jax.evaluators import class_file
from flip_jax.runtime import UserError

COLOURS = ("red", "green", "blue")


def matched(names, wanted, empty=(), **more):
    return classes.match("s", names, ClassList(tuple(wanted), "list", **more), empty).index.tolist()


@pytest.mark.parametrize(
    "names, wanted, expected",
    [
        (["blue", "green", "red"], COLOURS, [2, 1, 0]),
        (["Blue", "RED"], COLOURS, [2, 0]),  # one class has no images
        (["light_blue", "red-ish"], ("red ish", "light blue"), [1, 0]),
        (["cafe\u0301", "猫"], ("猫", "café"), [1, 0]),  # accents as macOS writes them, and letters beyond ASCII
        (["#", "*"], ("*", "#"), [1, 0]),
        ([str(i) for i in range(12)], tuple("abcdefghijkl"), list(range(12))),
        (["1", "2", "3"], COLOURS, [0, 1, 2]),
        (["0", "2"], COLOURS, [0, 2]),  # 1 has no images
        (["07", "10"], ("10", "7"), [1, 0]),
        (None, COLOURS, [0, 1, 2]),
        (None, ("0", "1", "3"), [0, 1, -1, 2]),  # label 3 is the class named 3
    ],
)
def test_labels_get_the_class_of_their_name_or_number(names, wanted, expected):
    assert matched(names, wanted) == expected


@pytest.mark.parametrize(
    "names, wanted, message",
    [
        (["blue", "green", "rot"], COLOURS, "Only in the source: rot. Missing in the source: red."),
        (["a", "b", "c"], COLOURS, "other classes than list: a, b, c; wanted red, green, blue"),
        (["0", "3"], COLOURS, "Only in the source: 0, 3"),
        (["1", "2"], COLOURS, "Only in the source: 1, 2"),  # is 1 the first or the second class?
        (["1", "01", "2"], COLOURS, "other classes"),
        (["1", "2", "3"], ("0", "1", "2"), "Only in the source: 3. Missing in the source: 0."),
        (["0", "1", "red"], COLOURS, "Only in the source: 0, 1"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_both_sides(names, wanted, message):
    with pytest.raises(UserError, match=message):
        matched(names, wanted)


def test_empty_folders_show_where_numbers_begin():
    assert matched(["1", "2"], COLOURS, empty=["0"]) == [1, 2]
    assert matched(["2", "3"], COLOURS, empty=["1"]) == [1, 2]


def test_only_a_partial_list_ignores_other_classes():
    assert matched(["blue", "green", "pink", "red"], COLOURS, partial=True) == [2, 1, -1, 0]
    with pytest.raises(UserError, match="Only in the source: pink"):
        matched(["blue", "green", "pink", "red"], COLOURS)
    with pytest.raises(UserError, match="Only in the source: pink"):
        matched(["blue", "pink"], COLOURS, partial=True)


@pytest.mark.parametrize("seed", range(8))
def test_random_folders_have_the_images_and_labels_of_an_independent_count(tmp_path, seed, caplog):
    rng, truth, ignored = random.Random(seed), {}, 0
    names = (
        [str(i) for i in rng.sample(range(200), 12)] if seed % 2 else rng.sample("Ant bee Cat dog Eel fly".split(), 5)
    )
    for name in [*names, ".ipynb_checkpoints", "__MACOSX"]:
        for i in range(rng.randrange(4)):
            folder = tmp_path / name / rng.choice(["", "a", "a/b", ".hidden"])
            extension = rng.choice("jpg JPEG png WebP bmp gif tif TIFF jfif ppm txt heic".split())
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.{extension}").write_bytes(png(i))
            used = extension not in ("txt", "heic") and ".hidden" not in folder.parts and name in names
            if used:
                truth[f"{folder}/{i}.{extension}"] = name
            ignored += name in names and not used
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / names[0] / "last.png").write_bytes(png())
    truth[f"{tmp_path / names[0]}/last.png"] = names[0]
    source = sources.open_source(f"folder:{tmp_path}", DataConfig())
    found = {r["key"]: source.class_names[r["label"]] for r in sources.in_order(source, iter(range(len(source))))}
    assert found == truth and set(source.class_names) == set(truth.values())
    assert source.class_names == sorted(set(truth.values()), key=int if seed % 2 else None)
    assert set(source.empty_classes) == set(names) - set(truth.values())
    (message,) = caplog.messages
    assert f"{len(truth)} images in {len(source.class_names)} classes; ignored: " in message
    assert ".ipynb_checkpoints" in message and (not ignored or "other files" in message or "hidden" in message)


def test_images_without_class_folders_have_no_label(tmp_path):
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "a.jpg").write_bytes(png(0))
    source = sources.open_source(f"folder:{tmp_path}", DataConfig())
    assert source.class_names is None
    assert [(r["image"], r["label"]) for r in sources.in_order(source, iter(range(2)))] == [
        (png(0), None),
        (png(1), None),
    ]


def test_the_sources_of_a_classifier_must_agree(tmp_path):
    for name in ("a/x", "a/y", "b/y", "b/z"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(png())

    def trained(train, count=2):
        return classes.trained(Config(data=DataConfig(train=train), finetune=FinetuneConfig(classes=count)))

    assert trained(f"folder:{tmp_path}/a") == trained(f"2*folder:{tmp_path}/a;folder:{tmp_path}/a") == ("x", "y")
    with pytest.raises(UserError, match="number different classes: x, y; and y, z"):
        trained(f"folder:{tmp_path}/a;folder:{tmp_path}/b")
    with pytest.raises(
        UserError, match="config.finetune.classes 1 is less than the 2 classes of config.data.train: x, y"
    ):
        trained(f"folder:{tmp_path}/a", 1)


FILES = {
    "lines": ("red\r\ngreen\nblue\n\n", ()),
    "bom": ("\ufeffred\ngreen \nblue", ()),
    "list": (json.dumps(COLOURS), ()),
    "object": (json.dumps({"2": "blue", "0": "red", "1": "green"}), ()),
    "from one": (json.dumps({"3": "blue", "1": "red", "2": "green"}), ("1", "2", "3")),
    "folders": (json.dumps({"n1": "red", "n2": "green", "n3": "blue"}), ("n1", "n2", "n3")),
    "pairs": (json.dumps([["n1", "red"], ["n2", "green"], ["n3", "blue"]]), ("n1", "n2", "n3")),
    "keras": (json.dumps({"1": ["n2", "green"], "0": ["n1", "red"], "2": ["n3", "blue"]}), ("n1", "n2", "n3")),
    "torchvision": (json.dumps({"blue": 2, "green": 1, "red": 0}), ()),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_class_names_is_understood(tmp_path, name):
    content, own = FILES[name]
    (tmp_path / "names").write_bytes(content.encode())
    assert class_file.read(str(tmp_path / "names")) == (COLOURS, own)


def test_label_numbers_are_those_of_the_file():
    assert matched(None, COLOURS, own=("1", "2", "3")) == [-1, 0, 1, 2]
    assert matched(["n3", "n1"], COLOURS, own=("n1", "n2", "n3")) == [2, 0]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"red\n\nblue\n", "has no name in line 2"),
        (b"", "has no name in line 1"),
        ("red\ntürkis".encode("latin-1"), "line 2 is not UTF-8 .*iconv"),
        ("red".encode("utf-16"), "line 1 is not UTF-8"),
        (b'["red", ', "begins like JSON, but"),
        (b'{"a": {"b": 1}}', "entries that are not strings"),
        (b'[["0", "red"], ["00", "blue"]]', "the same number twice"),
        (b"[]", "or no names"),
        (b"0 red\n1 blue\n", "has '0' before the first name"),
        (b"n01440764 tench\nn01443537 goldfish\n", "has 'n01440764' before the first name"),
    ],
)
def test_a_file_that_would_shift_or_spoil_names_is_refused(tmp_path, content, message):
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(UserError, match=message):
        class_file.read(str(tmp_path / "names"))


def test_a_match_by_number_says_first_and_last():
    how = classes.match("s", ["0", "2"], ClassList(COLOURS, "names.txt")).how
    assert how == "2 classes, matched in numeric order with the 3 of names.txt: 0 = red ... 2 = blue"
    assert np.array_equal(classes.match("s", ["red"], ClassList(COLOURS, "x")).index, [0])
