"""Patterns of shards that stay quick however many there are; readers' tests have the grammar."""

import pytest

from flip_jax.data import paths


def test_fifty_thousand_shards_are_listed_with_one_listing_of_their_folder(tmp_path, monkeypatch):
    for i in (0, 1, 49_999):
        (tmp_path / f"{i:05}.tar").touch()
    listed = []
    listing = paths.os.listdir
    monkeypatch.setattr(paths.os, "listdir", lambda folder: listed.append(folder) or listing(folder))
    with pytest.raises(ValueError, match="49997 of 50000 shards are missing, first '.*/00002.tar'"):
        paths.expand(f"{tmp_path}/{{00000..49999}}.tar")
    assert len(listed) == 1


def test_remote_ranges_are_not_looked_up():
    assert paths.expand("http://127.0.0.1:1/{00000..49999}.tar?sig=1")[-1] == "http://127.0.0.1:1/49999.tar?sig=1"


@pytest.mark.parametrize("pattern", ["a-{9..3}.tar", "a-{0..99999999}.tar"])
def test_ranges_without_end_or_sense_are_refused(pattern):
    with pytest.raises(ValueError, match="must go up, and hold at most 10,000,000 numbers"):
        paths.expand(pattern)
