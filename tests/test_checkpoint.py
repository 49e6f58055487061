import dataclasses
import types

import jax
import numpy as np
import pytest
from etils import epath

from flip_jax import checkpoint, config_check, saved_config
from flip_jax import config as config_lib
from flip_jax.runtime import UserError
from flip_jax.train_step import TrainState


def test_a_setting_that_is_newer_than_the_checkpoint_was_its_default(monkeypatch):
    config = config_lib.Config(total_samples=25_600)
    written = config_check.flatten(config)
    del written["model.loss"]
    step = epath.Path("run/checkpoints/10")
    monkeypatch.setattr(saved_config, "read_json", lambda step, item: {"config": written}[item])
    monkeypatch.setattr(saved_config, "_knows_data", lambda step: False)
    saved_config.check(step, config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, loss="sigmoid"))
    with pytest.raises(ValueError, match="config.model.loss: checkpoint 'info_nce', now 'sigmoid'"):
        saved_config.check(step, other)
    with pytest.raises(ValueError, match="config.total_samples: checkpoint 25600, now "):
        saved_config.check(step, config_lib.Config())


class Manager:
    """Stands in for Orbax's manager: a save is in progress until a test says that it is not."""

    busy = failed = False

    def wait_until_finished(self):
        if self.failed:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing local file")  # as Orbax does

    def is_saving_in_progress(self):
        return self.busy

    def save(self, step, args):
        self.busy = True


@pytest.fixture
def saving(tmp_path, monkeypatch, capsys):
    """Checkpoints that began to save step 3 twelve seconds ago, and their manager."""
    checkpoints, now = checkpoint.Checkpoints(tmp_path, 1), [100.0]
    manager = checkpoints._manager = Manager()
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    checkpoints.save(3, TrainState(np.int32(0), {}, ()), None, None, config_lib.Config())
    assert capsys.readouterr().out == "saving step 3 ...\n"
    now[0] += 12
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    with open(tmp_path / "checkpoints" / "3" / "state" / "array", "wb") as file:
        file.truncate(4_130_000_000)  # takes no space on the disk
    return checkpoints, manager


def test_a_save_is_announced_once_when_it_is_complete(saving, capsys):
    checkpoints, manager = saving
    checkpoints.say_saved()
    assert capsys.readouterr().out == ""
    manager.busy = False
    checkpoints.say_saved()
    checkpoints.say_saved()
    assert capsys.readouterr().out == "saved step 3 (4.13 GB, 12 s)\n"


def test_a_save_that_failed_is_not_announced_as_complete(saving, capsys):
    checkpoints, manager = saving
    manager.busy, manager.failed = False, True
    with pytest.raises(UserError, match="step 3 could not be saved in .*: RESOURCE_EXHAUSTED. Make room"):
        checkpoints.say_saved()
    assert "saved" not in capsys.readouterr().out


def test_a_process_that_was_lost_during_a_save_is_no_refusal_of_the_storage(saving, monkeypatch):
    checkpoints, manager = saving
    manager.busy = False

    def lost():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service")

    monkeypatch.setattr(manager, "wait_until_finished", lost)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.wait()


def test_a_save_without_room_is_refused_before_it_begins(saving, monkeypatch, capsys):
    checkpoints, manager = saving
    manager.busy = False
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 * 10**9))
    state = TrainState(np.int32(0), {"w": np.empty((10**9,), np.float32)}, ())  # pages that are never touched
    with pytest.raises(UserError, match="it takes up to 4 GB, and 3 GB are free"):
        checkpoints.save(4, state, None, None, config_lib.Config())


def test_an_interrupted_wait_forgets_no_save(saving, monkeypatch, capsys):
    checkpoints, manager = saving

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    assert "saved" not in capsys.readouterr().out
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: setattr(manager, "busy", False))
    checkpoints.wait()
    assert capsys.readouterr().out == "saved step 3 (4.13 GB, 12 s)\n"
