"""A workdir in an object store, for which fsspec's store in memory stands in."""

import fsspec
import pytest
from etils import epath

from flip_jax import checkpoint, metrics
from flip_jax.config import Config


@pytest.fixture
def bucket(monkeypatch):
    """The folder gs://bucket/run, in memory."""
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: memory)
    yield epath.Path("gs://bucket/run")
    memory.store.clear()


def test_metrics_are_added_without_appending_and_those_of_lost_steps_dropped(bucket):
    for start, steps in ((0, (4, 8)), (4, (8, 12))):
        writer = metrics.Writer(bucket, start, Config())
        for step in steps:
            writer.write(step, {"loss": float(start)})
        writer.close()
    lines = (bucket / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 4, "loss": 0.0}', '{"step": 8, "loss": 4.0}', '{"step": 12, "loss": 4.0}']


def test_a_step_that_is_there_but_not_complete_is_no_checkpoint(bucket):
    with pytest.raises(ValueError, match="gs://bucket/run holds no checkpoint"):
        checkpoint.newest(bucket)
    for step in (5, 10):
        (bucket / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (bucket / "checkpoints" / "5" / "commit_success.txt").write_text("")
    assert checkpoint.newest(bucket) == bucket / "checkpoints" / "5"
