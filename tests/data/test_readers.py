"""Records from tars and TFDS against what Python's own tarfile and hand-made files say."""

import gzip
import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
from helpers import SHARED, png, samples, write_tar

from flip_jax.config import DataConfig
from flip_jax.data import shards as shard_files
from flip_jax.data import sources


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path, offset=0):
    return list(shard_files.WebDataset(str(path), DataConfig()).read([(0, 0)], offset))


def records(path, offset=0):
    return [record for record, _ in read(path, offset)]


@pytest.mark.parametrize("items, processes", [(1, 1), (2, 1), (7, 3), (64, 3), (3, 3)])
def test_each_epoch_deals_out_every_item_once(items, processes):
    schedules = [sources.Schedule(items, 5, p, processes) for p in range(processes)]
    assert sum(s.per_epoch for s in schedules) == items
    epochs = []
    for epoch in range(4):
        mine = [[s[epoch * s.per_epoch + j] for j in range(s.per_epoch)] for s in schedules]
        assert {e for picks in mine for _, e in picks} == {epoch}
        assert sorted(index for picks in mine for index, _ in picks) == list(range(items))
        epochs.append([index for picks in mine for index, _ in picks])
    if items > 6:
        assert epochs[0] != epochs[1] and epochs[0] != [sources.Schedule(items, 6)[i][0] for i in range(items)]


def test_more_processes_than_shards_is_refused():
    with pytest.raises(ValueError, match="2 shards for 3 processes.*prepare_data.*, or use fewer processes"):
        sources.Schedule(2, 0, 0, 3)


def test_patterns_expand_as_in_webdataset(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-9.tar", "b-10.tar"):
        (tmp_path / name).touch()

    def expand(pattern):
        return [os.path.basename(p) for p in shard_files.WebDataset(f"{tmp_path}/{pattern}", DataConfig()).paths]

    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("b-{9..10}.tar") == ["b-9.tar", "b-10.tar"]
    assert expand("{b,a}-{10..10}.tar") == ["b-10.tar", "a-10.tar"]
    assert expand("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{a-0?,b-9}.tar") == ["a-08.tar", "a-09.tar", "b-9.tar"]
    for source, message in (
        (
            f"webdataset:{tmp_path}/a-{{08..12}}.tar",
            r"config.data.train .*2 of 5 shards are missing, first .*a-11.tar",
        ),
        (f"webdataset:{tmp_path}/c*.tar", r"1 of 1 shards are missing, first .*c\*.tar"),
        (f"webdataset:{tmp_path}/nowhere/0.tar", "1 of 1 shards are missing"),
        (f"{tmp_path}/a-08.tar", r"config.data.train must be \"KIND:REST\" with KIND one of webdataset, tfrecord"),
        ("", "config.data.train must be"),
        ("webdataset:", "config.data.train must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.open_source(source, DataConfig(), "config.data.train")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_data_are_those_that_tarfile_reads(tmp_path, format):
    long = "d" * 90 + "/" + "e" * 60
    members = [
        (f"{long}/{i}.{extension}", data)
        for i in range(3)
        for extension, data in (("txt", b"x" * i * 300), ("jpg", png(i)))
    ]
    if format != tarfile.USTAR_FORMAT:
        members += [("é" * 80 + "/ü.jpg", b"1"), ("é" * 80 + "/ü.txt", b"2"), ("f" * 150 + ".png", b"3")]
    path = write_tar(tmp_path / "0.tar", [special("d", tarfile.DIRTYPE), ("README", b"no sample"), *members], format)
    with tarfile.open(path) as tar:
        truth = {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and "." in m.name}
    found = {}
    for record in records(path):
        name = record["key"].removeprefix("0.tar/")
        images = [truth[f"{name}.{extension}"] for extension in ("jpg", "png") if f"{name}.{extension}" in truth]
        assert record["image"] == images[0] and record["label"] is None
        assert record["texts"] == [t for t in [truth.get(f"{name}.txt", b"").decode()] if t]
        found[name] = record
    assert found.keys() == {name.rpartition(".")[0] for name in truth}


def test_samples_follow_webdatasets_rules(tmp_path):
    path = write_tar(
        tmp_path / "0.tar",
        [
            *(
                ("a/x.y/1.JPG", b"A"),
                ("a/x.y/1.txt", "caffè\n".encode()),
                ("a/x.y/1.json", b"{}"),
                ("a/x.y/1.cls", b" 12\n"),
            ),
            *(("2.jpeg", b"B"), ("2.json", b'{"caption": "from json"}'), ("2.seg.png", b"not the image")),
            *(("3.webp", b"C"), ("3.txt", b"bad \xff\xfe bytes")),
            *(("4.png", b"D"), ("4.json", b'{"caption": "lone \\ud800"}')),
            *(("5.png", b"E"), ("5.json", b"[" * 100_000)),
            *(("6.txt", b"no picture"), ("7.png", b"F"), ("7.cls", b"cat"), (".hidden.png", b"G")),
            *(("8.png", b"H"), ("8.txt", b"one"), ("8.txt", b"two")),
        ],
    )
    good = [(r["key"], r["image"], r["texts"], r["label"]) for r in records(path) if "bad" not in r]
    assert good == [
        ("0.tar/a/x.y/1", b"A", ["caffè\n"], 12),
        ("0.tar/2", b"B", ["from json"], None),
        ("0.tar/5", b"E", [], None),
    ]
    bad = {r["key"]: r["bad"] for r in records(path) if "bad" in r}
    assert bad == {
        "0.tar/3": "caption is not UTF-8",
        "0.tar/4": "caption is not UTF-8",
        "0.tar/6": "no image",
        "0.tar/7": "class is no number",
        "0.tar/8": "duplicate key",
    }


def test_members_that_would_leave_the_archive_are_counted_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(shard_files.MAX_BYTES, "png", 5000)
    members = [
        special("0.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("0.txt", b"text"),
        special("1.png", tarfile.LNKTYPE, "0.txt"),
        special("2.png", tarfile.CHRTYPE),
        ("../3.png", b"P"),
        ("a/../../4.png", b"P"),
        ("/5.png", b"P"),
        ("6.png", b"P" * 5001),
        *samples(1, start=7),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    kinds = [record.get("bad") for record in records(path)]
    assert kinds == ["unsafe member"] * 6 + ["too large", None]
    assert os.listdir(tmp_path) == ["0.tar"]


def test_a_tar_cut_anywhere_gives_the_samples_before_and_one_count(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(5))
    whole, content = records(path), open(path, "rb").read()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith("cls")]
        others = [m.offset_data + m.size for m in tar if not m.name.endswith("cls")]
        end_of_archive = tar.offset - 512
    assert len(whole) == 5 and not any("bad" in record for record in whole)
    for cut in [*range(0, end_of_archive, 97), *ends, *(end - 1 for end in ends), end_of_archive, end_of_archive + 511]:
        (tmp_path / "0.tar").write_bytes(content[:cut])
        *before, last = records(path)
        assert last == {"key": "0.tar", "epoch": 0, "bad": "tar cut short"}, cut
        # A sample is whole when the next header is, or when the file ends right behind it.
        complete = sum(end <= cut <= -(-end // 512) * 512 or cut >= -(-end // 512) * 512 + 512 for end in ends)
        assert before[:complete] == whole[:complete], cut
        assert len(before) <= complete + any(end <= cut <= -(-end // 512) * 512 for end in others), cut


def test_nothing_after_zeros_is_lost_in_silence(tmp_path):
    one, two = (write_tar(tmp_path / f"{i}.tar", samples(3, start=3 * i)) for i in range(2))
    content = open(one, "rb").read()
    (tmp_path / "joined.tar").write_bytes(content + open(two, "rb").read())
    assert [record["label"] for record in records(tmp_path / "joined.tar")] == [0, 1, 2, 3, 4, 5]
    with tarfile.open(one) as tar:
        header = tar.getmember("00002.png").offset
    (tmp_path / "zeroed.tar").write_bytes(content[:header] + bytes(512) + content[header + 512 :])
    assert [record.get("bad") for record in records(tmp_path / "zeroed.tar")] == [None, None, "tar cut short"]


def test_what_is_no_tar_is_counted_too(tmp_path):
    good = write_tar(tmp_path / "good.tar", samples(1))
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(open(good, "rb").read()))
    (tmp_path / "zero.tar").touch()
    (tmp_path / "folder.tar").mkdir()
    write_tar(tmp_path / "empty.tar", [])
    kinds = {
        name: [r.get("bad") for r in records(tmp_path / f"{name}.tar")]
        for name in ("zipped", "zero", "folder", "empty")
    }
    assert kinds == {
        "zipped": ["unreadable shard"],
        "zero": ["tar cut short"],
        "folder": ["unreadable shard"],
        "empty": ["empty shard"],
    }


def test_a_size_below_zero_is_damage(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(2))
    content = bytearray(open(path, "rb").read())
    content[124:136] = b"-0000000001\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    open(path, "wb").write(content)
    assert [record["bad"] for record in records(path)] == ["unreadable shard"]


def test_damaged_bytes_never_raise(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*samples(3), ("n" * 120 + ".png", b"x")], tarfile.GNU_FORMAT)
    content, rng = open(path, "rb").read(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for place in rng.integers(0, 512, 4) + 512 * rng.integers(0, len(content) // 512, 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "0.tar").write_bytes(damaged)
        assert 1 <= len(records(path)) <= 10


def test_reading_goes_on_from_every_offset(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*samples(5), ("x" * 130 + ".png", b"x"), *samples(2, start=5)])
    whole = list(read(path))
    for i, (_, offset) in enumerate(whole[:-1]):
        assert list(read(path, offset)) == whole[i + 1 :]


@pytest.fixture
def shards(tmp_path):
    """Five tars of 3, 200, 64, 0 and 129 samples, the last one cut short."""
    numbers = itertools.count()
    for i, count in enumerate((3, 200, 64, 0, 129)):
        path = write_tar(tmp_path / f"{i}.tar", itertools.chain(*(samples(1, next(numbers)) for _ in range(count))))
    os.truncate(path, os.path.getsize(path) - 15_000)
    return shard_files.WebDataset(f"{tmp_path}/*.tar", DataConfig())


def test_interleaved_shards_go_on_from_every_place(shards):
    schedule, start = sources.Schedule(5, 3), [[i, 0] for i in range(3)]
    whole = list(itertools.islice(sources.interleave(shards, schedule, start), 40))
    for i, (places, _) in enumerate(whole[:-8]):
        places = json.loads(json.dumps(places))
        rest = itertools.islice(sources.interleave(shards, schedule, places), 8)
        assert list(rest) == whole[i + 1 : i + 9]


@pytest.mark.parametrize("processes", [1, 3])
def test_interleaved_epochs_hold_every_record_once(shards, processes):
    truth = sorted(r["key"] for r in sources.in_order(shards, iter(range(5))))
    seen = {0: [], 1: [], 2: []}
    for p in range(processes):
        schedule = sources.Schedule(5, 3, p, processes)
        places = [[i, 0] for i in range(min(2, schedule.per_epoch))]
        for _, chunk in sources.interleave(shards, schedule, places):
            if chunk and min(r["epoch"] for r in chunk) > 3:
                break
            for record in chunk:
                seen.setdefault(record["epoch"], []).append(record["key"])
    assert all(sorted(seen[epoch]) == truth for epoch in (0, 1, 2))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with the TFDS sets toy_pairs (several captions each), toy_nested, toy_classes and toy_numbers."""
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


def test_tfds_epochs_hold_every_record_once_and_go_on_from_every_place(toys):
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
        ("tfds:toy_numbers/train", "needs an image, and caption or captions"),
        ("tfds:emoji/train", "Prepare it: `python -m flip_jax.data.emoji --data_dir="),
    ],
)
def test_tfds_sets_that_cannot_be_read_are_refused_with_a_remedy(toys, source, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source(source, toys, "config.data.train")


def test_shards_that_img2dataset_wrote_are_read_completely():
    folder = SHARED / "data" / "img2dataset" / "webdataset"
    if not folder.is_dir():
        pytest.skip("the shards of img2dataset are not here")
    for stats in sorted(folder.glob("*_stats.json")):
        path = stats.with_name(stats.name.replace("_stats.json", ".tar"))
        with tarfile.open(path) as tar:
            truth = {m.name: tar.extractfile(m).read() for m in tar}
        found = records(path)
        assert len(found) == json.loads(stats.read_text())["successes"]
        for record in found:
            name = record["key"].removeprefix(f"{path.name}/")
            assert (record["image"], record["texts"]) == (truth[f"{name}.jpg"], [truth[f"{name}.txt"].decode()])
