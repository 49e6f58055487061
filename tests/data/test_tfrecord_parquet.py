"""TFRecord and Parquet: what was written is read, damage is counted, every offset resumes."""

import itertools
import struct

import pyarrow
import pytest
from helpers import FIXTURES, png, records, summary, write_tar
from pyarrow import parquet
from tensorflow_datasets.proto import tf_example_pb2

from flip_jax.config import DataConfig
from flip_jax.data import shards as shard_files
from flip_jax.data import sources


def crc32c(data):
    """CRC-32C, a bit at a time, from its polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def frame(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def example(**features):
    """A serialised tf.train.Example of bytes features."""
    message = tf_example_pb2.Example()
    for name, values in features.items():
        message.features.feature[name].bytes_list.value.extend(values)
    return message.SerializeToString()


def pair(i):
    return {"jpg": [png(i, (3, 3))], "caption": [f"picture {i}".encode()], "key": [b"%04d" % i]}


def read(kind, path, offset=0, **data):
    return list(sources.open_source(f"{kind}:{path}", DataConfig(**data)).read([(0, 0)], offset))


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of every catalogue
    assert struct.pack("<I", shard_files._masked_crc32c(b"123456789")) == masked(b"123456789")


def test_tfrecords_are_read_and_their_damage_counted(tmp_path):
    path, frames = tmp_path / "0.tfrecord", [frame(example(**pair(i))) for i in range(8)]
    frames[2] = frames[2][:-20] + b"\0" + frames[2][-19:]  # a byte of the data
    frames[3] = frame(b"\xff\xff no example")
    frames[4] = frame(example(**{**pair(4), "caption": [b"\xff\xfe"]}))
    frames[5] = frame(example(caption=[b"no picture"]))
    path.write_bytes(b"".join(frames))
    starts = list(itertools.accumulate(map(len, frames), initial=0))
    found = records("tfrecord", path)
    assert summary(found) == [
        ("0.tfrecord/0000", ["picture 0"], None),
        ("0.tfrecord/0001", ["picture 1"], None),
        (f"0.tfrecord/{starts[2]}", None, "bad checksum"),
        (f"0.tfrecord/{starts[3]}", None, "not an Example"),
        ("0.tfrecord/0004", None, "caption is not UTF-8"),
        (f"0.tfrecord/{starts[5]}", None, "no image"),
        ("0.tfrecord/0006", ["picture 6"], None),
        ("0.tfrecord/0007", ["picture 7"], None),
    ]
    assert found[0]["image"] == pair(0)["jpg"][0]
    whole = read("tfrecord", path)
    assert [offset for _, offset in whole] == starts[1:]
    for i, offset in enumerate(starts[1:]):
        assert read("tfrecord", path, offset) == whole[i + 1 :]
    content = path.read_bytes()
    for damaged, kind in (
        (content[: starts[6] + 5], "TFRecord cut short"),
        (content[: starts[7] - 2], "TFRecord cut short"),
        (content[: starts[6]] + b"\1" + content[starts[6] + 1 :], "shard damaged"),
    ):
        path.write_bytes(damaged)
        assert summary(records("tfrecord", path))[6:] == [("0.tfrecord", None, kind)]


def write_parquet(path, rows=150, **columns):
    columns = columns or {
        "caption": [None if i == 3 else f"picture {i}" for i in range(rows)],
        "key": [f"{i:04}" for i in range(rows)],
        "jpg": [None if i == 5 else png(i, (2, 2)) for i in range(rows)],
        "other": list(range(rows)),
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=40)
    return path


def test_parquet_is_read_and_resumes_at_every_row(tmp_path):
    path = write_parquet(tmp_path / "0.parquet")
    whole = read("parquet", path)
    found = [record for record, _ in whole]
    assert len(found) == 150 and [offset for _, offset in whole] == list(range(1, 151))
    for i, record in enumerate(found):
        if i == 5:
            assert record["bad"] == "no image"
        else:
            assert record["key"] == f"0.parquet/{i:04}" and record["image"] == png(i, (2, 2))
            assert record["texts"] == ([] if i == 3 else [f"picture {i}"])
    for offset in (1, 39, 40, 41, 63, 64, 65, 104, 149, 150):
        assert read("parquet", path, offset) == whole[offset:]


def test_columns_are_named_by_the_settings(tmp_path, no_waiting):
    columns = {"Words": ["a", "b"], "image": [{"bytes": b"1", "path": "x"}, {"bytes": b"2", "path": "y"}]}
    path = write_parquet(tmp_path / "0.parquet", **columns)
    assert [r["texts"] for r in records("parquet", path)] == [[], []]
    assert summary(records("parquet", path, image="picture")) == [("0.parquet", None, "missing column")]
    found = records("parquet", path, captions=("none", "WORDS"))
    assert [(r["key"], r["image"], r["texts"]) for r in found] == [
        ("0.parquet/0", b"1", ["a"]),
        ("0.parquet/1", b"2", ["b"]),
    ]
    several = write_parquet(tmp_path / "1.parquet", captions=[["a", " ", "b"], []], png=[b"1", b"2"])
    assert [r["texts"] for r in records("parquet", several)] == [["a", "b"], []]
    tar = write_tar(tmp_path / "0.tar", [("1.jpg", b"A"), ("1.json", b'{"title": ["x", "y"], "caption": "z"}')])
    assert records("webdataset", tar, captions=("title",))[0]["texts"] == ["x", "y"]


def test_a_damaged_parquet_is_one_bad_record(tmp_path, no_waiting):
    path = write_parquet(tmp_path / "0.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    assert summary(records("parquet", path)) == [("0.parquet", None, "unreadable shard")]


def test_of_several_captions_the_first_that_holds_text_is_used(tmp_path):
    json_text = b'{"caption": " ", "captions": [5, ""], "text": ["one", "two"]}'
    path = write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.json", json_text), ("0.txt", b" ")])
    assert [record["texts"] for record in records("webdataset", path)] == [["one", "two"]]


@pytest.mark.parametrize("kind", ["tfrecord", "parquet"])
def test_what_img2dataset_wrote_is_read_completely(downloaded, kind):
    """Only Parquet has rows for the links that gave no image."""
    folder = FIXTURES / "img2dataset"
    found = records(kind, folder / kind / f"{{00000..00001}}.{kind}")
    usable = [record for record in found if "bad" not in record]
    assert summary(usable) == [(f"{key[:5]}.{kind}/{key}", link.texts, None) for key, link in downloaded.items()]
    assert [record["image"] for record in usable] == [
        record["image"] for record in records("webdataset", folder / "webdataset" / "{00000..00001}.tar")
    ]
    failed = [(f"{key[:5]}.parquet/{key}", None, "no image") for key in ("0000003", "0000005", "0000010", "0000105")]
    assert summary(record for record in found if "bad" in record) == (failed if kind == "parquet" else [])
