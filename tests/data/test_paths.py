"""Patterns of shards as in webdataset, however many there are, and files of remote stores."""

import bz2
import functools
import gzip
import http.server
import lzma
import os
import pathlib
import socket
import struct
import threading
import zlib

import fsspec
import pyarrow
import pytest
from helpers import png, records, samples, summary, write_tar
from pyarrow import parquet

from flip_jax import untrusted
from flip_jax.config import DataConfig
from flip_jax.data import paths, sources
from flip_jax.data import shards as shard_files
from flip_jax.runtime import UserError


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
        (f"webdataset:{tmp_path}/", rf"{tmp_path}/' is a folder; .* such as {tmp_path}/\*.tar"),
        (f"{tmp_path}/a-08.tar", r"config.data.train must be \"KIND:REST\" with KIND one of webdataset, tfrecord"),
        ("", "config.data.train must be"),
        ("webdataset:", "config.data.train must be"),
    ):
        with pytest.raises(UserError, match=message):
            sources.open_source(source, DataConfig(), "config.data.train")


def test_fifty_thousand_shards_are_listed_with_one_listing_of_their_folder(tmp_path, monkeypatch):
    for i in (0, 1, 49_999):
        (tmp_path / f"{i:05}.tar").touch()
    listed = []
    listing = paths.os.listdir
    monkeypatch.setattr(paths.os, "listdir", lambda folder: listed.append(folder) or listing(folder))
    with pytest.raises(UserError, match="49997 of 50000 shards are missing, first '.*/00002.tar'"):
        paths.expand(f"{tmp_path}/{{00000..49999}}.tar")
    assert len(listed) == 1


def test_remote_ranges_are_not_looked_up():
    assert paths.expand("http://127.0.0.1:1/{00000..49999}.tar?sig=1")[-1] == "http://127.0.0.1:1/49999.tar?sig=1"


@pytest.mark.parametrize("pattern", ["a-{9..3}.tar", "a-{0..99999999}.tar"])
def test_ranges_without_end_or_sense_are_refused(pattern):
    with pytest.raises(UserError, match="must go up, and hold at most 10,000,000 numbers"):
        paths.expand(pattern)


def test_shards_of_a_remote_store(tmp_path, no_waiting):
    content = open(write_tar(tmp_path / "0.tar", samples(4)), "rb").read()
    with fsspec.open("memory://bucket/0.tar", "wb") as file:
        file.write(content)
    for pattern in ("memory://bucket/{0..0}.tar", "memory://bucket/*.tar"):
        assert [r["texts"] for r in records("webdataset", pattern)] == [[f"picture {i}"] for i in range(4)]
    both = summary(records("webdataset", "memory://bucket/{0..1}.tar"))
    assert len(both) == 5 and both[4] == ("1.tar", None, "unreadable shard")
    with pytest.raises(UserError, match="1 of 1 shards are missing"):
        records("webdataset", "memory://nowhere/*.tar")
    with pytest.raises(UserError, match="cannot be listed"):
        records("webdataset", "nonesuch://bucket/0.tar")


def test_shards_over_http(tmp_path):
    pytest.importorskip("aiohttp")  # what fsspec reads http with
    content = open(write_tar(tmp_path / "0.tar", samples(4)), "rb").read()
    assert content
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = records("webdataset", f"http://127.0.0.1:{server.server_port}/{{0..0}}.tar")
        assert [r["texts"] for r in found] == [[f"picture {i}"] for i in range(4)]
    finally:
        server.shutdown()


ZEROS = bytes(2**23)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, "zstd", "lz4"])
def test_what_unpacks_to_far_more_than_its_size_is_not_read_on(tmp_path, monkeypatch, no_waiting, compress):
    """The members after a good one are zeros, which unpack to a thousand times their size, or are skipped as such."""
    monkeypatch.setattr(paths, "UNPACKED", 2**20)
    monkeypatch.setattr(paths, "RATIO", 64)
    name = write_tar(tmp_path / "0.tar", [*samples(1), ("large.bin", ZEROS), ("1.png", ZEROS), *samples(1, start=2)])
    with open(name, "rb") as file:
        content = file.read()
    packed = pyarrow.compress(content, compress, asbytes=True) if isinstance(compress, str) else compress(content)
    (tmp_path / "1.tar").write_bytes(packed)
    first, *others, last = records("webdataset", tmp_path / "1.tar")
    assert (first["texts"], others) == (["picture 0"], [])
    assert last["bad"] == "unreadable shard" and "unpacks to more than 64 times its size" in last["why"]
    monkeypatch.undo()
    assert [record["key"] for record in records("webdataset", tmp_path / "1.tar")][-1] == "1.tar/00002"


def test_xz_that_needs_gigabytes_is_not_unpacked(tmp_path, no_waiting):
    name = write_tar(tmp_path / "0.tar", samples(1))
    packed = bytearray(lzma.compress(pathlib.Path(name).read_bytes()))
    assert records("webdataset", name)[0]["texts"] == ["picture 0"]
    # The header of the first block has the size of the dictionary, here 4 GB, and ends in a checksum.
    length = 4 * (packed[12] + 1)
    place = packed.index(b"\x21\x01", 12) + 2
    packed[place] = 40
    packed[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(packed[12 : 12 + length - 4]))
    (tmp_path / "1.tar").write_bytes(packed)
    (record,) = records("webdataset", tmp_path / "1.tar")
    assert record["bad"] == "unreadable shard" and "Memory usage limit" in record["why"]


def test_only_remote_tables_name_urls(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/urls/a.png", png(1))
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(2))
    names = [
        "memory://urls/a.png",
        f"file://{secret}",
        f"local://{secret}",
        "simplecache::memory://urls/a.png",
        "x://a",
    ]
    table = "url,caption\n" + "".join(f"{name},a\n" for name in names)
    (tmp_path / "a.csv").write_text(table)
    store.pipe("/urls/a.csv", table.encode())
    columns = pyarrow.table({"file_name": names, "caption": ["a"] * len(names)})
    parquet.write_table(columns, tmp_path / "a.parquet")
    url = "URL in a local table (allowed by data.allow_urls)"
    for kind, path in (("csv", tmp_path / "a.csv"), ("parquet", tmp_path / "a.parquet")):
        assert [record.get("bad") for record in records(kind, path)] == [url] * 5
        allowed = records(kind, path, allow_urls=True)
        assert [record.get("bad") for record in allowed] == [None, url, url, url, "unreadable image"]
    assert [record.get("bad") for record in records("csv", "memory://urls/a.csv")][:4] == [None, url, url, url]


def test_a_url_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        (tmp_path / "a.csv").write_text(f"url,caption\nhttp://127.0.0.1:{silent.getsockname()[1]}/a.png,a\n")
        (record,) = records("csv", tmp_path / "a.csv", allow_urls=True)
    assert record["bad"] == "unreadable image"


def test_a_line_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_LINE", 1000)
    (tmp_path / "a.csv").write_text("path,caption\na.png," + "a" * 900 + "\nb.png," + "b" * 1000 + "\n")
    with pytest.raises(UserError, match=r"a.csv has a line of more than 1,000 characters"):
        records("csv", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("path,caption\na.png," + "a" * 900 + "\nb.png,b\n")
    assert len(records("csv", tmp_path / "a.csv")) == 2
