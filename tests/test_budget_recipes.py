"""The recipes for small budgets: what was published, the hours that they promise, and that they compile."""

import importlib
import re

import pytest

from flip_jax import config_check, metrics, models, optim, train
from flip_jax.tools import __main__ as flip

RECIPES = ("cc3m_b16", "cc12m_b16", "yfcc15m_b16", "datacomp_small_b32", "datacomp_medium_b16")
MACHINES = {
    "one H100": metrics.PEAK_FLOPS["NVIDIA H100"],
    "eight A100": 8 * metrics.PEAK_FLOPS["NVIDIA A100"],
    "a v5e-8": 8 * metrics.PEAK_FLOPS["TPU v5 lite"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_hours_are_those_of_the_flops_at_40_percent_mfu(name, load_recipe):
    flops = sum(
        (stage.last - stage.first) * stage.config.global_batch_size * models.flops_per_sample(stage.config)
        for stage in train.plan(load_recipe(name))
    )
    about = " ".join(importlib.import_module(f"configs.{name}").__doc__.split())
    assert "To beat" in about and "ource" in about
    places = ", ".join(rf"([\d.]+) on {machine}" for machine in MACHINES)
    found = re.search(rf"Hours at 40 % MFU: {places}\. Not run here\.", about)
    for (machine, peak), written in zip(MACHINES.items(), found.groups(), strict=True):
        decimals = len(written.partition(".")[2])
        assert f"{flops / (0.4 * peak) / 3600:.{decimals}f}" == written, machine


def test_masks_lengths_batches_and_rates_are_the_published_ones(load_recipe):
    def table(name):
        for stage in train.plan(load_recipe(name)):
            config = stage.config
            samples = (stage.last - stage.first) * config.global_batch_size
            rate = optim.peak_learning_rate(config)
            image, text = config.model.image, config.model.text
            yield image.visible_patches, text.visible_tokens, samples, config.global_batch_size, rate, stage.fresh

    cc12m, cc3m = 10_968_539, 2_905_954
    assert list(table("cc12m_b16")) == [
        (98, 8, 30 * cc12m // 3584 * 3584, 3584, 1e-3, False),
        (196, 32, cc12m // 640 * 640, 640, 1e-5, True),
    ]
    assert list(table("cc3m_b16")) == [
        (49, 6, 30 * cc3m // 3584 * 3584, 3584, 1e-3, False),
        (196, 32, cc3m // 640 * 640, 640, 1e-5, True),
    ]
    assert list(table("yfcc15m_b16")) == [(98, 32, 25 * 14_829_396 // 4096 * 4096, 4096, 5e-4, False)]
    assert list(table("datacomp_small_b32")) == [(49, 32, 12_800_000, 4096, 5e-4, False)]
    assert list(table("datacomp_medium_b16")) == [(49, 32, 128_000_000, 4096, 5e-4, False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_compiles_for_eight_devices(name, monkeypatch, capsys):
    """At its own size and batch; `flip aot` itself is tested in tests/tools/test_aot.py."""
    monkeypatch.setenv("XLA_FLAGS", "")
    assert flip.main(["aot", f"--config=configs/{name}.py", "--topology=cpu:8", "--config.model.remat=full"]) == 0
    found = capsys.readouterr().out
    stages = train.plan(config_check.read_recipe([f"--config=configs/{name}.py"]))
    assert found.count("8 cpu (data 8 x fsdp 1 x tensor 1)") == len(stages)
    assert found.count("fits            yes") == len(stages)
