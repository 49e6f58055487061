"""Stages: their settings, what is refused, the state at a boundary, and what a resumed run may change."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from etils import epath
from helpers import CONFIG, STAGES, model_with

from flip_jax import config_check, saved_config, sharding, stages, train_step
from flip_jax.config import DataConfig, MeshConfig
from flip_jax.data import pipeline, vocabulary
from flip_jax.models import vit
from flip_jax.runtime import UserError


def staged(text, **changes):
    return config_check.from_config_dict(dataclasses.asdict(dataclasses.replace(CONFIG, stages=text, **changes)))


def test_stages_change_the_base_settings_and_follow_each_other():
    config = staged(STAGES)
    assert config.total_samples == 64 + 48 + 32
    first, second, third = plan = stages.plan(config)
    assert [(one.first, one.last, one.samples, one.name) for one in plan] == [
        (0, 4, 0, "stage 1/3: "),
        (4, 6, 64, "stage 2/3: "),
        (6, 10, 112, "stage 3/3: "),
    ]
    assert [one.config.model.image.image_size for one in plan] == [16, 32, 32]  # not the size of the stage before
    assert [one.config.total_samples for one in plan] == [64, 48, 32]
    assert [one.fresh for one in plan] == [False, False, True]
    assert (first.samples_seen(3), second.samples_seen(5), third.samples_seen(10)) == (48, 88, 144)
    assert second.config.optim.schedule == "constant" and third.config.optim.schedule == "cosine"
    assert third.config.data.crop_area == (0.9, 1.0) and third.config.optim.base_learning_rate == 1e-3
    assert not any(one.config.stages for one in plan)
    assert saved_config.from_flat(config_check.flatten(config)) == config


def test_lengths_as_people_write_them():
    assert staged("1.6e3;48:").total_samples == 1648
    assert staged(" 1_60 : model.image.mask_ratio=0, model.text.mask_ratio=0.5;48").total_samples == 208


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "160:model.image.width=64",
            "stage 1: config.model.image.width cannot change within a run; a stage may change ",
        ),
        ("160;16:seed=1", "stage 2: config.seed cannot change within a run"),
        ("160:stages=1", "stage 1: config.stages cannot change"),
        ("160:total_samples=1", "stage 1: config.total_samples cannot change"),
        ("160:model.image.mask_rate=1", "mask_rate is unknown; did you mean config.model.image.mask"),
        ("161", "stage 1: its 161 samples do not divide by config.global_batch_size 16; .* that does is 160"),
        (
            "160;40:global_batch_size=24",
            "stage 2: its 40 samples do not divide by config.global_batch_size 24; .* is 48",
        ),
        ("160:model.image.image_size=20", "stage 1: .*image_size 20 does not divide by patch_size 8; .* is 16"),
        ("160:model.image.mask_ratio=1", r"stage 1: config.model.image.mask_ratio must be in \[0, 1\), got 1.0"),
        ("160:model.image.mask_ratio=half", "stage 1: config.model.image.mask_ratio must be float, got 'half'"),
        ("160:model.image.mask=spiral", "stage 1: config.model.image.mask must be one of random, .* got 'spiral'"),
        ("160:warmup_samples=160", "stage 1: config.warmup_samples 160 must be less than total_samples 160"),
        ("160:optim.cooldown_samples=16", "stage 1: config.optim.cooldown_samples 16 needs config.optim.schedule"),
        ("160:optim.state=new", "stage 1: optim.state must be kept or fresh; got 'new'"),
        (
            "160:data.crop_area=0.4",
            r"stage 1: config.data.crop_area must be tuple\[float, float\], got 0.4",
        ),
        ("160:model.image.mask", "stage 1: model.image.mask has no value"),
        ("160:warmup_samples=0,warmup_samples=16", "stage 1: warmup_samples is given twice"),
        ("160;", "stage 2: expected SAMPLES:KEY=VALUE,KEY=VALUE, got ''"),
        ("model.image.mask_ratio=0", "stage 1: expected SAMPLES:KEY=VALUE,KEY=VALUE"),
        (";".join(["16"] * 101), "at most 100 stages, got 101"),
        ("1e999999999", "stage 1: expected SAMPLES:KEY=VALUE,KEY=VALUE, got '1e999999999'"),
        ("0", "stage 1: config.total_samples must be at least 1, got 0"),
    ],
)
def test_stages_that_cannot_be_used_are_refused(text, message):
    with pytest.raises(UserError, match=f"config.stages, {message}" if message.startswith("stage") else message):
        staged(text)


def test_what_only_the_whole_run_can_refuse():
    with pytest.raises(UserError, match=r"config.profile must be .* within 1 to 10; got \(3, 11\)"):
        staged(STAGES, profile=(3, 11))
    assert staged(STAGES, profile=(3, 10)).profile == (3, 10)
    rate = dataclasses.replace(CONFIG.optim, learning_rate=1e-3)
    with pytest.raises(
        UserError, match="base_learning_rate 0.1 has no effect next to config.optim.learning_rate 0.001"
    ):
        staged("160:optim.base_learning_rate=0.1", optim=rate)
    staged("160:optim.base_learning_rate=0.1,optim.learning_rate=0", optim=rate)


def test_the_length_of_the_run_is_the_sum():
    recipe, text = "--config=configs/flip_b16.py:global_batch_size=16,warmup_samples=0", "--config.stages=160;32"
    assert config_check.read_recipe([recipe, text]).total_samples == 192
    assert config_check.read_recipe([recipe, text, "--config.total_samples=192"]).total_samples == 192
    with pytest.raises(UserError, match="config.total_samples 160 is not the sum of config.stages, 192; leave it out"):
        config_check.read_recipe([recipe, text, "--config.total_samples=160"])


def test_recipes_have_the_published_stages(load_recipe):
    def table(name, arg=""):
        for one in stages.plan(load_recipe(name, arg)):
            config = one.config
            image, text = config.model.image, config.model.text
            yield (
                image.image_size,
                image.visible_patches,
                text.visible_tokens,
                config.global_batch_size,
                config.optim.base_learning_rate,
                one.fresh,
            )

    assert list(table("flip_l16", "tuned")) == [
        (224, 98, 32, 65_536, 4e-6, False),
        (224, 196, 32, 65_536, 4e-8, True),
    ]
    assert list(table("clipa_l16")) == [(96, 36, 8, 32_768, 8e-6, False), (224, 196, 32, 32_768, 8e-7, True)]
    assert list(table("openvision_b16")) == [
        (160, 100, 80, 32_768, 8e-6, False),
        (224, 196, 80, 16_384, 4e-7, True),
        (384, 576, 80, 8_192, 1e-7, True),
    ]
    published = {  # samples and warm-ups of each stage; a stage has whole steps
        ("flip_l16", "tuned"): [(12.8e9, 51.2e6), (128e6, 25.6e6)],
        ("clipa_l16", ""): [(2_000 * 1_281_167, 52_428_800), (131_072_000, 26_214_400)],
        ("openvision_b16", ""): [(n * 1_281_167, m * 1_281_167) for n, m in ((10_000, 40), (800, 20), (200, 0))],
    }
    for recipe, wanted in published.items():
        plan = stages.plan(load_recipe(*recipe))
        for one, (samples, warmup) in zip(plan, wanted, strict=True):
            assert 0 <= samples - one.config.total_samples < one.config.global_batch_size
            assert one.config.warmup_samples == warmup
    local = load_recipe("openvision_b16", "runlocal")
    assert [(one.last, one.config.model.image.image_size) for one in stages.plan(local)] == [
        (10, 160),
        (20, 224),
        (30, 384),
    ]


def test_the_data_go_on_where_the_stage_before_stopped(shards):
    """Two stages read the same records as one run of single samples does, each at its own size and crop."""
    data = DataConfig(train=f"webdataset:{shards}/{{00000..00001}}.tar", shuffle_window=50, workers=0, threads=1)
    tokenizer = vocabulary.train(["a red square"], 64)

    def dataset(config):
        return iter(pipeline.train_dataset(config, tokenizer, process_index=0, process_count=1))

    alone = dataset(dataclasses.replace(CONFIG, global_batch_size=1, data=data))
    first, second = stages.plan(staged("96:model.image.image_size=16;96:global_batch_size=24", data=data))
    keys, batches = [], dataset(first.config)
    for _ in range(6):
        batch = next(batches)
        keys += batch["keys"]
        assert batch["image"].shape == (16, 16, 16, 3)
    place = batches.get_state()
    batches.close()
    batches = dataset(second.config)
    batches.set_state(place)
    for _ in range(4):
        batch = next(batches)
        keys += batch["keys"]
        assert batch["image"].shape == (24, 32, 32, 3)
    assert batch["counts"]["used"] == 192
    assert keys == [next(alone)["keys"][0] for _ in range(192)]
    batches.close()
    alone.close()


@pytest.mark.parametrize(
    "positions, ema, pool", [("sincos", 0.0, "mean"), ("sincos", 0.0, "map"), ("learned", 0.9, "mean")]
)
def test_the_state_fits_the_next_stage(positions, ema, pool):
    text = "160:model.image.image_size=16;160;160:optim.state=fresh"
    settings = dataclasses.replace(CONFIG.optim, ema=ema)
    plan = stages.plan(staged(text, model=model_with(image_positions=positions, image_pool=pool), optim=settings))
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        small, large, fresh = (train_step.make_program(one.config, mesh, one.first) for one in plan)
        state = small.init()
        # Moments and counts of ten steps, all of which a stage could lose.
        ones = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 10, x.dtype), x.sharding), state.opt_state)
        state = state._replace(step=jax.device_put(np.int32(10), state.step.sharding), opt_state=ones)
        if ema:
            state = state._replace(ema=state.params)
        before = np.asarray(state.params["image"]["pos_embed"])
        kernel = np.asarray(state.params["image_projection"]["kernel"])
        entered = stages.enter(plan[1], large, state)
        for x, like in zip(jax.tree.leaves(entered), jax.tree.leaves(large.state), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
        table = np.asarray(entered.params["image"]["pos_embed"])
        rebuilt = vit.sincos_2d(4, 32)[:, int(pool == "map") :]  # a map head has no cls
        wanted = rebuilt if positions == "sincos" else np.asarray(vit.resize_positions(before, 4))
        np.testing.assert_array_equal(table, wanted)
        np.testing.assert_array_equal(np.asarray(entered.params["image_projection"]["kernel"]), kernel)
        adam, schedule = entered.opt_state[0], entered.opt_state[2]
        assert isinstance(adam, optax.ScaleByAdamState) and isinstance(schedule, optax.ScaleByScheduleState)
        assert (int(entered.step), int(adam.count), int(schedule.count)) == (10, 10, 0)
        assert np.all(np.asarray(adam.mu["image_projection"]["kernel"]) == 10)
        assert not np.any(np.asarray(adam.nu["image"]["pos_embed"]))
        renewed = stages.enter(plan[2], fresh, entered)
        assert int(renewed.step) == 10
        assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(renewed.opt_state))
        for weights in (renewed.params, *((entered.ema, renewed.ema) if ema else ())):
            np.testing.assert_array_equal(np.asarray(weights["image"]["pos_embed"]), wanted)
            np.testing.assert_array_equal(np.asarray(weights["image_projection"]["kernel"]), kernel)


def checkpoint_of(monkeypatch, config, step):
    """A step's folder as a run of `config` leaves it at that step, as far as a resume reads its settings."""
    plan = stages.plan(config)
    stage = plan[stages.place(plan, step)]
    items = {"config": config_check.flatten(stage.config), "run": config_check.flatten(config)}
    monkeypatch.setattr(saved_config, "read_json", lambda _, item: items[item])
    monkeypatch.setattr(stages, "read_json", lambda _, item: items[item])
    monkeypatch.setattr(saved_config, "_knows_data", lambda _: False)
    return epath.Path(f"{step}")


@pytest.mark.parametrize(
    "step, old, new, message",
    [
        (4, "64;48;32", "64;48;32", None),
        (4, "64;48;32", "64;96:model.image.mask_ratio=0", "those after stage 1, .* changed from 48;32 to 96:model"),
        (4, "64;48;32", "64", "changed from 48;32 to none"),
        (3, "64", "64;32", "changed from none to 32"),
        (5, "64;48;32", "64;48;16", "those after stage 2, .* changed from 32 to 16"),
        (5, "64;48;32", "64", "stage 2 is missing now\nOnly stages that have not begun .* step 5 is in stage 2"),
        (5, "64;48", "64;96", "config.total_samples: checkpoint 48, now 96"),
        (5, "64;48", "80;48", "stage 1, config.total_samples: checkpoint 64, now 80"),
        (
            5,
            "64:model.image.mask_ratio=0;48",
            "64;48",
            "stage 1, config.model.image.mask_ratio: checkpoint 0.0, now 0.5",
        ),
        (5, "64;48:model.image.mask_ratio=0", "64;48", "config.model.image.mask_ratio: checkpoint 0.0, now 0.5"),
        (5, "64;48:optim.state=fresh", "64;48", "stage 2, optim.state: checkpoint 'fresh', now 'kept'"),
        (5, "64:microbatches=2;48", "64;48", None),
        # In a stage of constant rate, as in a run: until a cooldown begins.
        (5, "64;48:optim.schedule=constant", "64;96:optim.schedule=constant", None),
        (5, "64;48:optim.schedule=constant", "64;96:optim.schedule=constant;32", "changed from none to 32"),
    ],
)
def test_only_stages_that_have_not_begun_may_change(monkeypatch, tmp_path, capsys, step, old, new, message):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint_of(monkeypatch, staged(old, warmup_samples=0), step)
    (folder / "run").mkdir(parents=True)
    if message is None or "changed from" in message:
        saved_config.check(folder, staged(new, warmup_samples=0))
        assert re.search(message or r"\A\Z", capsys.readouterr().out)
    else:
        with pytest.raises(UserError, match=message):
            saved_config.check(folder, staged(new, warmup_samples=0))
