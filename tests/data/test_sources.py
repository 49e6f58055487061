"""The order of items over epochs and processes, and interleaving that resumes from every place."""

import itertools
import json
import os

import pytest
from helpers import samples, write_tar

from flip_jax.config import DataConfig
from flip_jax.data import shards as shard_files
from flip_jax.data import sources
from flip_jax.runtime import UserError


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
    with pytest.raises(
        UserError, match="2 shards for 3 processes.*`flip prepare SOURCE OUT --shards=N`.*, or use fewer processes"
    ):
        sources.Schedule(2, 0, 0, 3)


@pytest.fixture
def shards(tmp_path):
    """Five tars of 3, 200, 64, 0 and 129 samples, the last one cut short."""
    numbers = itertools.count()
    for i, count in enumerate((3, 200, 64, 0, 129)):
        path = write_tar(tmp_path / f"{i}.tar", itertools.chain(*(samples(1, next(numbers)) for _ in range(count))))
    os.truncate(path, os.path.getsize(path) - 15_000)
    return shard_files.WebDataset(f"{tmp_path}/*.tar", DataConfig())


def test_interleaved_shards_resume_at_every_place(shards):
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
