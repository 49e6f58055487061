"""The learning rate of a constant schedule, against NumPy, and what a resumed run may change of its length."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from helpers import CONFIG, arguments, final_params, leaves, run_command

from flip_jax import config_check, optim, saved_config
from flip_jax.config import OptimConfig
from flip_jax.runtime import UserError


def constant(total=160, cooldown=48, warmup=32):
    settings = OptimConfig(base_learning_rate=0.016, schedule="constant", cooldown_samples=cooldown)
    return dataclasses.replace(CONFIG, optim=settings, total_samples=total, warmup_samples=warmup)


@pytest.mark.parametrize("warmup, cooldown", [(32, 48), (0, 48), (32, 0), (0, 0), (40, 50)])
def test_the_constant_schedule(warmup, cooldown):
    rate = optim.learning_rate(constant(cooldown=cooldown, warmup=warmup))
    points = [(0, 0.0 if warmup else 1.0), (warmup, 1.0), (160 - cooldown, 1.0), (160, 0.0 if cooldown else 1.0)]
    expected = 0.001 * np.interp(np.arange(11) * 16, *zip(*points, strict=True))
    # Quotients and products of f32 numbers below 10: a few roundings of 6e-8 each.
    np.testing.assert_allclose([float(rate(step)) for step in range(11)], expected, rtol=5e-7, atol=1e-10)


def test_until_the_cooldown_the_rate_has_the_same_bits_at_every_length():
    short, long = optim.learning_rate(constant()), optim.learning_rate(constant(1600, 0))
    assert [float(short(step)) for step in range(8)] == [float(long(step)) for step in range(8)]
    assert float(short(8)) < float(long(8))


def test_settings_that_contradict_are_refused():
    def check(config):
        saved_config.from_flat(config_check.flatten(config))

    check(constant(160, 128))
    with pytest.raises(UserError, match="cooldown_samples 129 are more than total_samples 160"):
        check(constant(160, 129))
    cosine = dataclasses.replace(constant(), optim=dataclasses.replace(constant().optim, schedule="cosine"))
    with pytest.raises(UserError, match="cooldown_samples 48 needs config.optim.schedule 'constant'"):
        check(cosine)


@pytest.mark.parametrize(
    "step, old, new, allowed",
    [
        (7, constant(), constant(320, 48), True),  # the old cooldown begins after step 7
        (8, constant(), constant(320, 48), False),
        (10, constant(160, 0), constant(320, 48), True),
        (7, constant(320, 0), constant(160, 48), True),
        (8, constant(320, 0), constant(160, 48), False),
        (1, CONFIG, dataclasses.replace(CONFIG, total_samples=320), False),
        (1, CONFIG, constant(), False),
    ],
)
def test_the_length_may_change_until_a_cooldown_begins(monkeypatch, step, old, new, allowed):
    monkeypatch.setattr(saved_config, "read_json", lambda *_: config_check.flatten(old))
    folder = epath.Path("run/checkpoints") / str(step)
    if allowed:
        saved_config.check(folder, new)
    else:
        with pytest.raises(UserError, match=rf"(?s)checkpoint .*, now .*this run is at step {step}, schedule"):
            saved_config.check(folder, new)


@pytest.mark.slow
def test_an_extended_run_ends_with_the_bits_of_a_run_that_was_long_from_the_start(shards, tmp_path):
    settings = {"optim.schedule": "constant", "warmup_samples": 64}
    long = {"total_samples": 384, "optim.cooldown_samples": 128, **settings}
    run_command(arguments(shards, tmp_path / "whole", **long))
    run_command(arguments(shards, tmp_path / "parts", **{**settings, "total_samples": 192}))
    run_command(arguments(shards, tmp_path / "parts", **long))
    for one, other in zip(*(leaves(final_params(tmp_path / name, 12)) for name in ("whole", "parts")), strict=True):
        np.testing.assert_array_equal(one, other)
    again = run_command(arguments(shards, tmp_path / "parts", **{**long, "total_samples": 768}), check=False)
    assert again.returncode == 1 and "this run is at step 12, schedule constant" in again.stderr


def test_muon_takes_each_matrix_of_a_stack_by_itself_and_leaves_the_rest_to_adamw():
    muon = dataclasses.replace(CONFIG, optim=OptimConfig(name="muon", learning_rate=0.01), warmup_samples=0)
    adamw = dataclasses.replace(muon, optim=dataclasses.replace(muon.optim, name="adamw"))
    gradient = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    grads = {"kernel": np.stack([gradient, 100 * gradient]), "bias": np.float32([1, -2])}
    params = {name: np.ones_like(value) for name, value in grads.items()}
    updates = {}
    for name, config in (("muon", muon), ("adamw", adamw)):
        optimizer = optim.make_optimizer(config)
        updates[name], _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["muon"]["bias"], updates["adamw"]["bias"])
    step = updates["muon"]["kernel"] + 0.01 * muon.optim.weight_decay  # without the decay of weights of 1
    # All singular values become about 1, so the root mean square of 4 x 8 numbers 8**-0.5. Muon's five iterations leave
    # them between 0.68 and 1.13.
    values = np.linalg.svd(step / (0.01 * 8**0.5), compute_uv=False)
    assert values.shape == (2, 4) and (values > 0.65).all() and (values < 1.2).all()
    np.testing.assert_allclose(step[1], step[0], rtol=1e-3, atol=1e-6)
