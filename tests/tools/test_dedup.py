"""The first usable record of each image is kept, whatever the groups."""

import itertools
import random

import pytest
from helpers import png, write_tar
from prepared import contents, prepare

from flip_jax.tools import dedup


@pytest.mark.parametrize("group", [5, 10**6])
def test_the_first_of_equal_images_is_kept(tmp_path, monkeypatch, group):
    rng = random.Random(1)
    monkeypatch.setattr(dedup, "GROUP", group)
    pictures = [rng.randrange(20) for _ in range(60)]
    for i in range(4):
        some = range(15 * i, 15 * i + 15)
        files = ((f"{j:02}.png", png(pictures[j])) for j in some), ((f"{j:02}.txt", b"t%d" % j) for j in some)
        write_tar(tmp_path / f"{i}.tar", itertools.chain(*zip(*files, strict=True)))
    pictures[0], first = -1, {}
    write_tar(tmp_path / "0.tar", [("00.png", b"broken"), ("00.txt", b"x")])  # the first of its kind cannot be used
    for j in range(15, 60):
        first.setdefault(pictures[j], j)
    done = prepare(f"webdataset:{tmp_path}/{{0..3}}.tar", tmp_path / "out", shards=3, dedup=True)
    texts = [data for shard in contents(tmp_path / "out") for name, data in shard.items() if name.endswith("txt")]
    assert sorted(texts) == sorted(b"t%d" % j for j in first.values())
    assert done.removed.counts == {"duplicate": 45 - len(first)} and done.read == 46
    sizes = [len(shard) // 2 for shard in contents(tmp_path / "out")]
    assert sum(sizes) == len(first) and max(sizes) - min(sizes) <= 1
