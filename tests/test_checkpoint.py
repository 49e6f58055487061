import dataclasses

import pytest

from flip_jax import checkpoint, config_check
from flip_jax import config as config_lib


def test_a_setting_that_is_newer_than_the_checkpoint_was_its_default(tmp_path, monkeypatch):
    config = config_lib.Config(total_samples=25_600)
    written = config_check.flatten(config)
    del written["model.attention"]
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoint, "_read_json", lambda step, item: {"config": written}[item])
    checkpoints.check_config(config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="cudnn"))
    with pytest.raises(ValueError, match="config.model.attention: checkpoint 'xla', now 'cudnn'"):
        checkpoints.check_config(other)
    with pytest.raises(ValueError, match="config.total_samples: checkpoint 25600, now "):
        checkpoints.check_config(config_lib.Config())
    checkpoints.close()
