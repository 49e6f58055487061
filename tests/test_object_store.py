"""A workdir in an object store, with fsspec's file system in memory in its place."""

import asyncio
import io
import types

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFile
from helpers import Bucket
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flip_jax import checkpoint, damage, manifest, metrics, metrics_file, saved_step, trackers
from flip_jax.config import Config


@pytest.fixture
def bucket(monkeypatch):
    """The folder gs://bucket/run, in memory."""
    memory = Bucket()
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: memory)
    yield epath.Path("gs://bucket/run")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def sent(monkeypatch):
    """A list of the numbers of bytes in each write to the object store."""
    sizes = []

    def write(self, data):
        sizes.append(len(data))
        return io.BytesIO.write(self, data)

    monkeypatch.setattr(MemoryFile, "write", write)
    return sizes


def test_metrics_are_added_without_appending_and_those_of_lost_steps_dropped(bucket):
    for start, steps in ((0, (4, 8)), (4, (8, 12))):
        writer = metrics.Writer(bucket, start, Config())
        for step in steps:
            writer.write(step, {"loss": float(start)})
        writer.close()
    assert not (bucket / "metrics.jsonl").exists()
    wanted = [{"step": 4, "loss": 0.0}, {"step": 8, "loss": 4.0}, {"step": 12, "loss": 4.0}]
    assert metrics_file.read(bucket) == wanted


def test_the_bytes_sent_for_metrics_grow_linearly(bucket, sent, monkeypatch):
    monkeypatch.setattr(trackers, "open_trackers", lambda *_: [])
    writer, halves = metrics.Writer(bucket, 0, Config()), []
    for half in range(2):
        for step in range(1000 * half, 1000 * half + 1000):
            writer.write(step, {f"metric_{i}": float(i) for i in range(30)})
        halves.append(sum(sent) - sum(halves))
    lines = metrics_file.read(bucket)
    assert [line["step"] for line in lines] == list(range(2000))
    sizes = [path.stat().length for path in bucket.glob("metrics-*.jsonl")]
    line_bytes = sum(sizes) / 2000
    assert len(sizes) > 10 and max(sizes) < trackers.OBJECT_BYTES + 2 * line_bytes
    # Each line sends at most one object; the halves differ by what an unfinished object at either end has cost.
    assert max(sent) == max(sizes) and len(sent) == 2000
    one_object = max(sizes) ** 2 / line_bytes
    assert abs(halves[0] - halves[1]) < one_object
    assert sum(halves) < len(sizes) * one_object


def test_tensorboard_reads_the_events_of_an_object_store(bucket, sent, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    writer = metrics.Writer(bucket, 0, Config())
    (board,) = writer.trackers
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
        writer.draw(step, {}, {"masks": images})
    writer.close()
    objects = list(bucket.glob("events*"))
    for path in objects:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [event.step for event in events.Images("masks")] == [1, 2, 3]


def test_a_step_that_is_there_but_not_complete_is_no_checkpoint(bucket):
    with pytest.raises(ValueError, match="gs://bucket/run holds no checkpoint"):
        saved_step.newest(bucket)
    for step in (5, 10):
        (bucket / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (bucket / "checkpoints" / "5" / "commit_success.txt").write_text("")
    assert saved_step.newest(bucket) == bucket / "checkpoints" / "5"


def test_a_step_ends_with_its_manifest_and_a_damaged_one_is_set_aside(bucket, sent, capsys):
    folder = bucket / "checkpoints"
    for step in (5, 10):
        (folder / str(step) / "state").mkdir(parents=True)
        (folder / str(step) / "state" / "array").write_text("weights")
        finishing = checkpoint._finishing(folder, 2).from_final(folder / str(step))
        assert finishing.get() == folder / str(step)  # object stores cannot rename
        assert manifest.complete(folder) == [5][: step - 5]
        finishing._checkpoint_metadata_store = types.SimpleNamespace(
            wait_until_finished=lambda: None, update=lambda **_: None
        )
        asyncio.run(finishing.finalize())
        assert sorted(path.name for path in (folder / str(step)).iterdir()) == [
            "commit_success.txt",
            "manifest.json",
            "state",
        ]
    assert manifest.complete(folder) == [5, 10] and damage.problems(folder / "10") == []
    (folder / "10" / "state" / "array").write_text("weighty")
    with pytest.raises(ValueError, match="gs://bucket/run/checkpoints/10 is damaged: state/array has size"):
        saved_step.newest(bucket)
    damage.set_aside(folder, strict=False)
    assert "moved to damaged-10; the run resumes from step 5" in capsys.readouterr().out
    assert saved_step.newest(bucket) == folder / "5"
    assert (folder / "damaged-10" / "state" / "array").read_text() == "weighty"
