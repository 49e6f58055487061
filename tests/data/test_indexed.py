"""CSV and TFDS: what was written is read, and what cannot be read is refused with a remedy."""

import csv
import io
import itertools
import json

import numpy as np
import pytest
from etils import epath
from helpers import png, records

from flip_jax.config import DataConfig
from flip_jax.data import paths, sources
from flip_jax.runtime import UserError


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_csv_names_images_by_path(tmp_path, suffix, delimiter):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "é 1.png").write_bytes(png(1))
    (tmp_path / "2.png").write_bytes(png(2))
    (tmp_path / "empty.png").touch()
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / f"pairs.{suffix}"
    rows = [
        ["caption", "filepath", "more"],
        ['with "quotes",\nand a line', f"{tmp_path}/pictures/é 1.png", "x"],
        ["relative", "here.png", ""],
        ["outside", "../2.png", ""],
        ["not there", "nowhere.png", ""],
        ["empty", f"{tmp_path}/empty.png", ""],
        ["device", "/dev/zero", ""],
        ["short row"],
    ]
    (tmp_path / "sub" / "here.png").write_bytes(png(3))
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    path.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode() + b"bad \xff" + delimiter.encode() + b"here.png\n")
    found = records("csv", path)
    assert [(r.get("image"), r.get("texts"), r.get("bad")) for r in found] == [
        (png(1), ['with "quotes",\nand a line'], None),
        (png(3), ["relative"], None),
        (None, None, paths.PARENT),
        *[(None, None, "no image")] * 4,
        (None, None, "caption is not UTF-8"),
    ]
    assert records("csv", path, allow_parent_paths=True)[2]["image"] == png(2)


@pytest.mark.parametrize(
    "line, captions",
    [
        ('1.png,"left open', ["left open"]),
        ('1.png,"closed" early', ["closed early"]),
        ('1.png,"over\ntwo lines"', ["over\ntwo lines"]),
        ('1.png,"' + "x" * 2**20 + 'x"', None),
    ],
)
def test_a_quote_that_is_left_open_swallows_no_other_row(tmp_path, line, captions):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    path = tmp_path / "0.csv"
    path.write_text(f'path,caption\n0.png,zero\n{line}\n2.png,"two"\n\n3.png,three\n')
    found = records("csv", path)
    texts = [[text.strip() for text in record["texts"]] if "texts" in record else None for record in found]
    assert texts == [["zero"], captions, ["two"], ["three"]]
    assert [record.get("bad") for record in found] == [None, None if captions else "no image", None, None]


def test_a_csv_may_be_named_by_a_path_that_goes_up(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "0.csv").write_text("path,caption\n0.png,zero\n")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert [record.get("image") for record in records("csv", "../0.csv")] == [png(0)]


def test_csv_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "0.csv"
    path.write_text("url_of_picture,caption\na,b\n")
    with pytest.raises(
        UserError, match="0.csv lacks a column with paths of images: filepath or .* are 'url_of_picture', 'caption'"
    ):
        records("csv", path)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with the TFDS data sets toy_pairs (several captions each), toy_nested, toy_classes and toy_numbers."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "label": tfds.features.ClassLabel(names=["red_fox", "owl"]),
        "key": tfds.features.Text(),
    }

    def example(i):
        return {
            "image": io.BytesIO(png(i)),
            "captions": [f"caption {j} of {i}" for j in range(i % 3)],
            "label": i % 2,
            "key": f"k{i}",
        }

    def make(name, features, convert):
        class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")
            code_path = epath.Path(__file__)  # TFDS looks it up with a package that it does not install

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield from ((i, convert(example(i))) for i in range(100))

        Toy.name = name
        Toy(data_dir=folder, file_format="array_record").download_and_prepare()

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    make("toy_pairs", features, lambda x: x)
    nested = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    make(
        "toy_nested",
        {"image": features["image"], "captions": nested},
        lambda x: {"image": x["image"], "captions": [{"id": 1, "text": t} for t in x["captions"]]},
    )
    make("toy_classes", {k: features[k] for k in ("image", "label")}, lambda x: {k: x[k] for k in ("image", "label")})
    make("toy_numbers", {"label": np.int64}, lambda x: {"label": x["label"]})
    return DataConfig(tfds_dir=str(folder))


def test_tfds_records_are_those_that_were_written(toys):
    source = sources.open_source("tfds:toy_pairs/train", toys)
    assert len(source) == 100 and source.class_names == ["red_fox", "owl"]
    found = {r["key"]: r for r in sources.in_order(source, iter(range(100)))}
    assert found.keys() == {f"k{i}" for i in range(100)}
    for i in range(100):
        record = found[f"k{i}"]
        assert (record["image"], record["label"]) == (png(i), i % 2)
        assert record["texts"] == [f"caption {j} of {i}" for j in range(i % 3)]


def test_tfds_captions_may_be_nested_or_class_names(toys):
    nested = sources.open_source("tfds:toy_nested/train", toys)
    texts = [tuple(r["texts"]) for r in sources.in_order(nested, iter(range(100)))]
    assert set(texts) == {tuple(f"caption {j} of {i}" for j in range(i % 3)) for i in range(100)}
    classes = sources.open_source("tfds:toy_classes/train", toys)
    assert {(r["label"], *r["texts"]) for r in sources.in_order(classes, iter(range(100)))} == {
        (0, "a photo of a red fox."),
        (1, "a photo of a owl."),
    }


def test_tfds_epochs_hold_every_record_once_and_resume_at_every_place(toys):
    source, schedule = sources.open_source("tfds:toy_pairs/train", toys), sources.Schedule(100, 1)
    whole = list(itertools.islice(sources.interleave(source, schedule, [[0, 0], [1, 0]]), 10))
    stream = [record for _, chunk in whole for record in chunk]
    for epoch in range(3):
        assert sorted(r["key"] for r in stream if r["epoch"] == epoch) == sorted(f"k{i}" for i in range(100))
    for i in range(5):
        assert list(itertools.islice(sources.interleave(source, schedule, whole[i][0]), 3)) == whole[i + 1 : i + 4]


@pytest.mark.parametrize(
    "source, message",
    [
        ("tfds:nonesuch/train", "nonesuch.*Prepare it: `tfds build nonesuch --file_format=array_record --data_dir=.*`"),
        ("tfds:toy_pairs/test", "Unknown split"),
        ("tfds:toy_pairs", "config.data.train 'tfds:toy_pairs': expected tfds:NAME/SPLIT"),
        ("tfds:toy_numbers/train", "needs an image, and txt or caption"),
        ("tfds:emoji/100/train", "the emoji are drawn for 64 and 224 px: .*; got emoji/100"),
    ],
)
def test_tfds_sets_that_cannot_be_read_are_refused_with_a_remedy(toys, source, message):
    with pytest.raises(UserError, match=message):
        sources.open_source(source, toys, "config.data.train")


def test_karpathys_json_is_read_and_other_layouts_are_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    path = tmp_path / "dataset.json"
    entry = {"split": "test", "filename": "0.png", "sentences": [{"raw": "one"}, {"raw": "two"}]}
    path.write_text(json.dumps({"images": [entry, entry | {"split": "train"}]}))
    (record,) = records("karpathy", f"{path}#test")
    assert (record["image"], record["texts"]) == (png(0), ["one", "two"])
    with pytest.raises(UserError, match="has no split 'val'; it has test, train"):
        records("karpathy", f"{path}#val")
    with pytest.raises(UserError, match="expected karpathy:FILE.json#SPLIT with an existing file"):
        records("karpathy", f"{tmp_path}/none.json#test")
    wrong = ([], {"images": 5}, {"images": [5]}, {"images": [entry | {"sentences": ["one"]}]}, {"images": [{}]})
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="does not have Karpathy's layout"):
            records("karpathy", f"{path}#test")
    path.write_text("{")
    with pytest.raises(UserError, match="dataset.json is not JSON"):
        records("karpathy", f"{path}#test")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder; it needs one folder per class"):
        records("folder", tmp_path / "nowhere")
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="has 1 folders but no images"):
        records("folder", tmp_path)
    (tmp_path / "cats" / "0.png").write_bytes(png(0))
    assert [(r["image"], r["label"]) for r in records("folder", tmp_path)] == [(png(0), 0)]
