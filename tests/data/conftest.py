"""Fixtures that several files of tests/data share."""

from typing import NamedTuple

import pytest

from flip_jax.data import shards as shard_files


class Link(NamedTuple):
    texts: list[str]
    color: tuple[int, int, int]


@pytest.fixture
def no_waiting(monkeypatch):
    """Retry a failed read twice, a millisecond apart."""
    monkeypatch.setattr(shard_files, "RETRY_AFTER", (0.001, 0.001))


@pytest.fixture
def downloaded():
    """Links by key, in order, whose images are in tests/fixtures/img2dataset (from dev/record_img2dataset.py).

    There are 24 links, 12 per shard: 3, 10 and 17 are dead, 5 is not an image, and 8 has no caption.
    """
    return {
        f"{i // 12:05}{i % 12:02}": Link([] if i == 8 else [f"№ {i}: café"], (10 * i, 255 - 10 * i, 37 * i % 256))
        for i in range(24)
        if i not in (3, 5, 10, 17)
    }
