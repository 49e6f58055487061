"""Patterns of shards as in webdataset, however many there are, and files of remote stores."""

import functools
import http.server
import os
import threading

import fsspec
import pytest
from helpers import records, samples, summary, write_tar

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
