"""A step's manifest: written last, synced, and telling of every change to the step's files."""

import json
import os
import shutil

import grain
import jax.numpy as jnp
import pytest
from etils import epath

from flip_jax import checkpoint, config, damage, manifest, saved_step
from flip_jax.runtime import UserError
from flip_jax.tools import check
from flip_jax.train_step import TrainState


def fill(step, setting='{"checkpoint.strict": false}'):
    """Writes files as a step has them, without a manifest."""
    for name, content in (("config/metadata", setting), ("state/d/a", "weights" * 9), ("data/0.json", "{}")):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_text(content)
    return epath.Path(step)


@pytest.fixture
def step(tmp_path):
    step = fill(tmp_path / "checkpoints" / "10")
    manifest.write(step)
    return step


def test_every_flipped_bit_and_every_cut_is_noticed(step):
    assert damage.problems(step) == []
    files = [path for path in sorted(os.walk(step)) for path in map(lambda name: os.path.join(path[0], name), path[2])]
    assert len(files) == 4
    for file in files:
        with open(file, "r+b") as stream:
            content = stream.read()
            for bit in range(8 * len(content)):
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << bit % 8
                stream.seek(0)
                stream.write(flipped)
                stream.flush()
                assert damage.problems(step), (file, bit)
            for length in range(len(content)):
                stream.truncate(length)
                stream.seek(0)
                stream.write(content[:length])
                stream.flush()
                assert damage.problems(step), (file, length)
            stream.seek(0)
            stream.write(content)
        assert damage.problems(step) == []
        os.rename(file, f"{file}.moved")
        assert damage.problems(step)
        os.rename(f"{file}.moved", file)


def test_processes_share_the_files(step):
    (step / "state" / "d" / "a").write_text("other")
    found = [damage.problems(step, process, 3) for process in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]
    assert sum(found, []) == damage.problems(step)
    assert found[2][0].startswith("state/d/a has size and crc32c [5, ")


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", '{"a": 3}', '{"\\u0000": [1, 2]}', "\\xff", '{"..": [0, 0]}']
)
def test_a_manifest_that_says_something_else_is_damage(step, content):
    (step / manifest.NAME).write_text(content)
    # An empty list of files cannot come from a whole manifest; Python takes it for one.
    assert bool(damage.problems(step)) == (content != "[]")


def test_a_step_of_an_earlier_version_has_no_manifest(tmp_path):
    assert damage.problems(fill(tmp_path / "old", '{"seed": 0}')) == []
    assert damage.problems(fill(tmp_path / "new")) == ["manifest.json is missing"]
    empty = fill(tmp_path / "empty", "")
    assert damage.problems(empty) == ["manifest.json is missing"]
    (empty / "commit_success.txt").write_text("by Orbax")
    assert damage.problems(empty) == []


def test_everything_is_synced_before_the_manifest_and_the_manifest_before_the_step_counts(tmp_path, monkeypatch):
    """Orbax saves a step; each fsync is recorded with the names that were in the folders at that time."""
    synced, fsync = [], os.fsync

    def record(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((path, sorted(os.listdir(tmp_path / "checkpoints"))))
        fsync(descriptor)

    monkeypatch.setattr(manifest.os, "fsync", record)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    state = TrainState(jnp.int32(0), {"w": jnp.arange(9.0)}, ())
    for number in (3, 6, 9):
        checkpoints.save(number, state, iter(grain.MapDataset.range(9).to_iter_dataset()), None, config.Config())
        checkpoints.wait()
    checkpoints.close()
    assert manifest.complete(epath.Path(tmp_path / "checkpoints")) == [6, 9]
    written, final = str(tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"), tmp_path / "checkpoints" / "9"
    inside = [path.removeprefix(written) for path, names in synced if path.startswith(written) and "9" not in names]
    wanted = ["", *(str(path).removeprefix(str(final)) for path in final.rglob("*"))]
    assert sorted(inside) == sorted(wanted)
    files = [name for name in inside if (final / name[1:]).is_file()]
    assert files[-1] == "/manifest.json"  # after the files that it names; then come the folders
    assert set(inside[len(files) :]) == set(inside) - set(files)
    path, names = synced[-1]
    assert path == str(tmp_path / "checkpoints") and "9" in names
    assert damage.problems(epath.Path(final)) == []
    assert {f"/{name}" for name in json.loads((final / manifest.NAME).read_text())} == set(files) - {"/manifest.json"}


def test_a_step_is_removed_by_its_new_name(step, monkeypatch):
    """Killed within, it leaves what Orbax takes for an unfinished step, and removes at the next start."""

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(step), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            manifest.remove(step)
    assert manifest.complete(step.parent) == [] and (step.parent / "10.orbax-checkpoint-tmp").is_dir()
    checkpoint.Checkpoints(step.parent.parent, 1).close()
    assert list(step.parent.iterdir()) == []


@pytest.fixture
def three(tmp_path):
    """A workdir with the whole steps 5, 10 and 15."""
    for number in (5, 10, 15):
        manifest.write(fill(tmp_path / "checkpoints" / str(number)))
    return tmp_path


def test_the_newest_whole_step_is_taken_and_damaged_ones_are_set_aside(three, capsys):
    (three / "checkpoints" / "15" / "config" / "metadata").write_text("")
    shutil.rmtree(three / "checkpoints" / "10" / "state")
    checkpoints = checkpoint.Checkpoints(three, 3)
    assert checkpoints.latest() == 5
    checkpoints.close()
    first, second = capsys.readouterr().out.splitlines()
    assert "/15 is damaged: config/metadata has size and crc32c [0, 0], not [28, " in first
    assert first.endswith("It was moved to damaged-15; the run resumes from step 10")
    assert "/10 is damaged: state/d/a cannot be read: [Errno 2]" in second
    assert second.endswith("It was moved to damaged-10; the run resumes from step 5")
    assert sorted(os.listdir(three / "checkpoints")) == ["5", "damaged-10", "damaged-15"]
    assert (three / "checkpoints" / "damaged-15" / "state" / "d" / "a").read_text() == "weights" * 9
    # The step is trained again, and damaged again.
    fill(three / "checkpoints" / "15")
    checkpoint.Checkpoints(three, 3).close()
    assert "damaged-15-2; the run resumes from step 5" in capsys.readouterr().out


def test_without_a_step_before_the_run_starts_again(three, capsys):
    for number in (5, 10, 15):
        (three / "checkpoints" / str(number) / manifest.NAME).unlink()
    checkpoints = checkpoint.Checkpoints(three, 3)
    assert checkpoints.latest() is None
    checkpoints.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("resumes from the start, because no step is before it")


def test_a_strict_run_stops_at_a_damaged_step_and_changes_nothing(three):
    (three / "checkpoints" / "15" / manifest.NAME).write_text("")
    with pytest.raises(UserError, match="15 is damaged: manifest.json cannot be read: .*config.checkpoint.strict"):
        checkpoint.Checkpoints(three, 3, strict=True)
    assert sorted(os.listdir(three / "checkpoints")) == ["10", "15", "5"]


def test_a_damaged_step_is_not_read(three):
    assert saved_step.newest(three) == epath.Path(three / "checkpoints" / "15")
    (three / "checkpoints" / "15" / "data" / "0.json").write_text("[]")
    with pytest.raises(UserError, match="15 is damaged: data/0.json has size and crc32c .*flip check WORKDIR"):
        saved_step.newest(three)


def test_the_command_tells_whole_from_damaged_steps(three, capsys):
    class Arguments:
        workdir = str(three)

    shutil.rmtree(three / "checkpoints" / "10")
    fill(three / "checkpoints" / "10", '{"seed": 0}')
    assert check.main(Arguments) == 0
    old = "step 10: cannot be checked, because an earlier version saved it without checksums"
    assert capsys.readouterr().out.splitlines() == ["step 5: whole", old, "step 15: whole"]
    (three / "checkpoints" / "5" / "state" / "d" / "a").unlink()
    assert check.main(Arguments) == 1
    assert capsys.readouterr().out.startswith("step 5: damaged\n  state/d/a cannot be read: [Errno 2]")
    Arguments.workdir = str(three / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint"):
        check.main(Arguments)
