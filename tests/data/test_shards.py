"""Tars against Python's own tarfile; damage is counted, failing reads are retried, mistakes of ours surface."""

import io
import os
import tarfile
import zipfile

import fsspec
import numpy as np
import pytest
from helpers import FIXTURES, png, samples, write_tar

from flip_jax.config import DataConfig
from flip_jax.data import shards as shard_files
from flip_jax.data import sources
from flip_jax.runtime import UserError


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path, offset=0):
    return list(shard_files.WebDataset(str(path), DataConfig()).read([(0, 0)], offset))


def records(path, offset=0):
    return [record for record, _ in read(path, offset)]


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
        assert (last["key"], last["epoch"], last["bad"]) == ("0.tar", 0, "tar cut short"), cut
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
    assert [record.get("bad") for record in records(tmp_path / "zeroed.tar")] == [None, None, "shard damaged"]


def test_a_file_that_is_not_a_tar_is_counted(tmp_path, no_waiting):
    good = write_tar(tmp_path / "good.tar", samples(1))
    with zipfile.ZipFile(tmp_path / "zipped.tar", "w") as archive:
        archive.write(good)
    (tmp_path / "zero.tar").touch()
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(
        UserError, match="folder.tar' is a folder; a pattern names files, such as .*/folder.tar/[*].tar"
    ):
        records(tmp_path / "folder.tar")
    write_tar(tmp_path / "empty.tar", [])
    kinds = {name: [r.get("bad") for r in records(tmp_path / f"{name}.tar")] for name in ("zipped", "zero", "empty")}
    assert kinds == {
        "zipped": ["unreadable shard"],
        "zero": ["tar cut short"],
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


def test_reading_resumes_at_every_offset(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*samples(5), ("x" * 130 + ".png", b"x"), *samples(2, start=5)])
    whole = list(read(path))
    for i, (_, offset) in enumerate(whole[:-1]):
        assert list(read(path, offset)) == whole[i + 1 :]


@pytest.mark.parametrize("shard, count", [("00000", 9), ("00001", 11)])
def test_tars_that_img2dataset_wrote_are_read_completely(downloaded, shard, count):
    path = FIXTURES / "img2dataset" / "webdataset" / f"{shard}.tar"
    with tarfile.open(path) as tar:
        images = {m.name.removesuffix(".jpg"): tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
    found = records(path)
    assert len(found) == count
    for record, key in zip(found, (key for key in downloaded if key.startswith(shard)), strict=True):
        assert record == {
            "key": f"{shard}.tar/{key}",
            "epoch": 0,
            "image": images[key],
            "texts": downloaded[key].texts,
            "caption": 0 if downloaded[key].texts else -1,
            "label": None,
        }


def test_clip_benchmarks_layout_names_classes_and_prompts(tmp_path):
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", [("s1.jpg", b"A"), ("s1.cls", b"1")])
    source = sources.open_source(f"webdataset:{tmp_path}/test/*.tar", DataConfig())
    assert source.class_names is None and source.templates is None
    (tmp_path / "classnames.txt").write_text("tench\nred fox\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\na bad photo of {c}.\n")
    source = sources.open_source(f"webdataset:{tmp_path}/test/*.tar", DataConfig())
    assert source.class_names == ["tench", "red fox"]
    assert source.templates == ["a photo of {}.", "a bad photo of {}."]
    assert next(sources.in_order(source, iter([0])))["label"] == 1


def test_a_shard_that_vanishes_is_tried_again_then_counted_and_read_when_it_is_back(tmp_path, no_waiting):
    path = write_tar(tmp_path / "0.tar", samples(3))
    source = sources.open_source(f"webdataset:{path}", DataConfig())
    content = open(path, "rb").read()
    (tmp_path / "0.tar").unlink()
    assert [r["bad"] for r, _ in source.read([(0, 0)])] == ["unreadable shard"]
    (tmp_path / "0.tar").write_bytes(content)
    assert [r["texts"] for r, _ in source.read([(0, 1)])] == [["picture 0"], ["picture 1"], ["picture 2"]]


def test_a_read_that_fails_once_resumes_where_it_stopped(tmp_path, no_waiting, monkeypatch):
    path, opened = write_tar(tmp_path / "0.tar", samples(5)), []

    class Flaky(io.FileIO):
        def read(self, size=-1):
            if self.tell() > 5000 and len(opened) == 1:
                raise OSError("connection lost")
            return super().read(size)

    monkeypatch.setattr(shard_files.paths, "open_file", lambda path: opened.append(path) or Flaky(path))
    whole = read(path)
    assert len(opened) == 2 and [r["texts"] for r, _ in whole] == [[f"picture {i}"] for i in range(5)]


class StoreError(Exception):
    """An error of a store's client that is not an OSError."""


def test_a_store_that_fails_is_retried_where_it_stopped(tmp_path, no_waiting, monkeypatch):
    content, failures = open(write_tar(tmp_path / "0.tar", samples(5)), "rb").read(), []

    class Flaky(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 5000 and not failures:
                failures.append(self.tell())
                raise StoreError("connection lost")
            return super().read(min(size, 1000))

    def open_flaky(filesystem, path, mode, **_):
        return Flaky(content)

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", open_flaky)
    found = [record for record, _ in shard_files.WebDataset("memory://bucket/0.tar", DataConfig()).read([(0, 0)])]
    assert failures and [record["texts"] for record in found] == [[f"picture {i}"] for i in range(5)]


def test_a_store_that_keeps_failing_is_one_bad_record(no_waiting, monkeypatch):
    attempts = []

    def open_broken(filesystem, path, mode, **_):
        attempts.append(path)
        raise StoreError("forbidden")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", open_broken)
    source = shard_files.WebDataset("memory://bucket/0.tar", DataConfig())
    for epoch, expected in ((0, 1 + len(shard_files.RETRY_AFTER)), (1, 1)):
        attempts.clear()
        assert [record["bad"] for record, _ in source.read([(0, epoch)])] == ["unreadable shard"]
        assert len(attempts) == expected
