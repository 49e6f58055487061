"""Worker processes: the same batches as with threads, whatever dies, and nothing left behind."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from data.test_pipeline import TOKENIZER, batches, config, same, shards  # noqa: F401  shards is a fixture
from helpers import REPO, environment, png, samples, write_tar

from flip_jax.config import FinetuneConfig
from flip_jax.data import pipeline, workers
from flip_jax.runtime import UserError


def processes(iterator):
    """The process ids of the workers that are alive now."""
    return [one._process.pid for one in iterator._parent._maker._workers if one._process]


def test_batches_are_those_of_threads_and_resume_with_any_number_of_workers(shards):
    settings = config(shards)
    truth, states = [], []
    iterator = batches(settings)
    for _ in range(12):
        truth.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    with_workers = {n: batches(config(shards, workers=n)) for n in (1, 3)}
    for n, iterator in with_workers.items():
        for batch, state in zip(truth, states, strict=True):
            assert same(next(iterator), batch)
            assert iterator.get_state() == state, n
    with_workers[1].set_state(states[4])
    assert all(same(next(with_workers[1]), batch) for batch in truth[5:8])
    iterator.set_state(states[8])
    assert all(same(next(iterator), batch) for batch in truth[9:])
