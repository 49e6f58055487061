"""Settings: recipes equal the paper, and every mistake is named with its remedy."""

import dataclasses
import sys

import pytest
from helpers import REPO
from ml_collections import ConfigDict

from flip_jax import config as config_lib
from flip_jax import config_check, did_you_mean, optim, saved_config
from flip_jax.config import Config
from flip_jax.runtime import UserError


def test_recipes_have_the_hyper_parameters_of_the_paper(load_recipe):
    for name in ("flip_b16", "flip_l16", "flip_l14", "flip_h14", "clip_b16", "clip_l16", "clip_l14"):
        config = load_recipe(name)
        assert config.global_batch_size == 65_536
        assert config.total_samples == 12_800_000_000
        assert config.warmup_samples == (256_000_000 if "h14" in name else 51_200_000)
        assert optim.peak_learning_rate(config) == pytest.approx(1.024e-3)
        assert config.optim == config_lib.OptimConfig("adamw", 4e-6, 0.9, 0.95, 0.2, "float32")
        assert config.model.image.mask_ratio == (0.5 if "flip" in name else 0)
        assert config.model.image.patch_size == int(name[-2:])
        assert (config.data.crop_area, config.data.crop_aspect) == ((0.5, 1.0), (3 / 4, 4 / 3))
    for name in ("flip_b16", "flip_l16", "flip_l14", "flip_h14"):
        config = load_recipe(name, "unmasked")
        assert config.model.image.mask_ratio == 0
        assert (config.total_samples, config.warmup_samples) == (128_000_000, 25_600_000)
        assert config.optim.base_learning_rate == 4e-8
    for name in ("flip_l16", "flip_h14"):
        config = load_recipe(name, "laion2b")
        assert (config.optim.base_learning_rate, config.total_samples) == (2e-6, 25_600_000_000)


def test_arguments_of_a_recipe(load_recipe):
    config = load_recipe("flip_l16", "model.image.mask_ratio=0.75,seed=7,model.dtype=float32,model.init_logit_scale=10")
    assert (config.model.image.mask_ratio, config.seed, config.model.dtype) == (0.75, 7, "float32")
    both = load_recipe("flip_l16", "unmasked,seed=7,model.image.mask_ratio=0.25")
    assert (both.model.image.mask_ratio, both.seed, both.total_samples) == (0.25, 7, 128_000_000)
    with pytest.raises(
        UserError, match=r"'seed' must be a variant \(unmasked, tuned, laion2b, runlocal\) or key=value"
    ):
        load_recipe("flip_l16", "seed")
    with pytest.raises(UserError, match=r"'unmasked' must be a variant \(runlocal\) or key=value"):
        load_recipe("flip_emoji", "unmasked")
    with pytest.raises(
        UserError, match=r"config.model.image.mask_rate is unknown; did you mean config.model.image.mask"
    ):
        load_recipe("flip_l16", "model.image.mask_rate=0.75")


L16 = "--config=configs/flip_l16.py"


def test_the_command_line_of_a_recipe():
    config = config_check.read_recipe([f"{L16}:unmasked,seed=3", "--config.model.image.mask_ratio=0.25"])
    assert (config.seed, config.model.image.mask_ratio, config.model.image.width) == (3, 0.25, 1024)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config=configs/NAME.py is missing"),
        (
            ["--config=configs/none.py"],
            "there is no recipe 'configs/none.py'; the recipes are cc12m_b16",
        ),
        ([L16, "--config.mask_ratio=0.5"], "config.mask_ratio is unknown; did you mean config.model.image.mask_ratio"),
        ([L16, "--config.data.train=a", "--config.data.train=b"], "--config.data.train is given 2 times.*in quotes"),
        ([L16, L16], "--config is given 2 times"),
        ([L16, "--config.seed=1", "b.tar"], "unexpected arguments: b.tar"),
        ([L16, "--config.seed=one"], "seed"),
        ([L16, "--config.seed=1.5e0"], "seed"),
        (["--config=configs/flip_l61.py"], r"no recipe 'configs/flip_l61.py'; did you mean configs/flip_l16.py\?"),
        ([L16, "--wokdir=a"], r"--wokdir is unknown; did you mean --workdir\?"),
        ([L16, "--batch_size=8"], "--batch_size is unknown; did you mean --config.global_batch_size"),
        ([L16, "--config.seed="], "config.seed must be a whole number, got ''"),
        ([L16, "--config.global_batch_size=abc"], "config.global_batch_size must be a whole number, got 'abc'"),
        ([L16, "--config.data.train", "--config.seed=1"], "no value follows --config.data.train"),
        ([L16, "--config.batch_size=8"], "config.batch_size is unknown; did you mean --config.global_batch_size"),
        ([L16, "--epochs", "3"], r"did you mean --config.total_samples \(epochs x samples in the data\)"),
        ([L16, "--save-frequency=1"], "did you mean --config.checkpoint.every_steps"),
        ([L16, "--resume=latest"], "--resume is unknown; run the same command again"),
        ([L16, "--mask_ratio=0.5"], r"--mask_ratio is unknown; did you mean --config.model.(image|text).mask_ratio\?"),
        ([f"{L16}:unmaskd"], "^--config=...:unmaskd: 'unmaskd' must be a variant"),
        ([f"{L16}:modle.dtype=float32"], "^config.modle.dtype is unknown; did you mean config.model.dtype"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        config_check.read_recipe(arguments)
    assert "Traceback" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_all_flags_of_another_program_are_named_at_once():
    with pytest.raises(UserError) as caught:
        config_check.read_recipe([L16, "--lr=1", "--train-data=a"])
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--lr", "--train-data", "All"]


def test_the_words_of_other_programs_lead_to_settings_that_exist():
    known = config_check.flatten(Config())
    for word, (key, translation) in did_you_mean.SETTINGS.items():
        assert key in known if key else translation, word
        assert word not in known, word
    words = "batch_size batch-size lr epochs workers warmup precision resume save-frequency grad-checkpointing"
    for word in [*words.split(), "train-data", "imagenet-val"]:
        assert did_you_mean.word(word), word


def test_numbers_of_samples_names_and_lists_as_people_write_them(load_recipe):
    for name in ("flip_l16", "flip_l16.py", "configs/flip_l16.py"):
        arguments = [f"--config={name}:warmup_samples=1e6", "--config.total_samples=12.8e9"]
        config = config_check.read_recipe([*arguments, "--config.data.captions=title, text"])
        assert (config.warmup_samples, config.total_samples) == (1_000_000, 12_800_000_000)
        assert (config.model.image.width, config.data.captions) == (1024, ("title", "text"))
    assert config_check.run_name(*config_check.find_recipe("flip_l16:runlocal,seed=1")) == "flip_l16_runlocal"


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    changes = [f"--config.{key}=~/x" for key in ("init_from", "data.vocab", "data.tfds_dir", "eval.classnames")]
    config = config_check.read_recipe([L16, *changes])
    assert {config.init_from, config.data.vocab, config.data.tfds_dir, config.eval.classnames} == {"/home/me/x"}


def test_every_recipe_runs_locally_with_its_own_model(load_recipe):
    for path in did_you_mean.recipes():
        name = path.removeprefix("configs/").removesuffix(".py")
        whole, local = load_recipe(name), load_recipe(name, "runlocal")
        assert local.model == whole.model and local.global_batch_size == 16
        assert local.data.train == f"tfds:emoji/{whole.model.image.image_size}/train"
        assert not local.init_from and not local.eval.wanted and local.warmup_samples < local.total_samples / 2
        assert bool(local.finetune.classes) == bool(whole.finetune.classes)


def test_the_peak_learning_rate_says_how_it_came_about(load_recipe):
    config = load_recipe("flip_b16", "global_batch_size=4096")
    assert optim.describe_peak(config) == "peak learning rate 6.4e-05 = base 4e-06 x batch 4,096 / 256"
    config = load_recipe("flip_b16", "global_batch_size=4096,optim.learning_rate=5e-4")
    assert optim.peak_learning_rate(config) == 5e-4
    assert "peak learning rate 0.0005 = optim.learning_rate, in place of base 4e-06" in optim.describe_peak(config)


def test_a_bug_in_a_recipe_keeps_its_trace(tmp_path):
    recipe = tmp_path / "recipe.py"
    for line, error in (("None.foo", AttributeError), ("int('x')", ValueError), ("open('/none')", OSError)):
        recipe.write_text(f"def get_config(arg=None):\n    {line}\n")
        with pytest.raises(Exception) as caught:
            config_check.read_recipe([f"--config={recipe}"])
        assert not isinstance(caught.value, UserError), error


def test_a_checkpoint_of_an_earlier_version_names_its_settings_as_it_did(load_recipe):
    flat = config_check.flatten(load_recipe("flip_b16"))
    flat["model.temperature"] = flat.pop("model.init_logit_scale")
    assert saved_config.from_flat(flat) == load_recipe("flip_b16")


def test_flat_settings_come_back(load_recipe):
    config = load_recipe("flip_h14")
    assert saved_config.from_flat(config_check.flatten(config)) == config


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.imagee", {}, r"config.model.imagee is unknown; did you mean config.model.image\?"),
        ("totl_samples", 1, r"config.totl_samples is unknown; did you mean config.total_samples\?"),
        ("model", 3, r"config.model is a group of settings, got 3"),
        ("seed", "1", r"config.seed must be int, got '1'"),
        ("seed", True, r"config.seed must be int, got True"),
        ("data.flip", 1, r"config.data.flip must be bool, got 1"),
        ("data.crop_area", (0.5,), r"config.data.crop_area must be tuple\[float, float\]"),
        ("data.crop_area", (0.9, 0.5), r"config.data.crop_area must be a range within"),
        ("model.image.mask_ratio", 1.0, r"config.model.image.mask_ratio must be in \[0, 1\), got 1.0"),
        ("model.image.mask_ratio", -0.1, r"config.model.image.mask_ratio must be in \[0, 1\), got -0.1"),
        ("model.image.mask_ratio", 0.999, r"leaves no patch"),
        ("model.image.image_size", 220, r"image_size 220 does not divide by patch_size 16; .* is 224"),
        ("model.image.heads", 5, r"config.model.image.width 768 does not divide by its heads 5"),
        ("model.image.width", 6, r"config.model.image.width must divide by 4"),
        ("model.dtype", "float16", r"config.model.dtype must be one of bfloat16, float32; got 'float16'"),
        ("model.init_logit_scale", 0.07, r"config.model.init_logit_scale must be in \[1, 100\].*, got 0.07"),
        ("model.init_logit_scale", 101.0, r"config.model.init_logit_scale must be in \[1, 100\]"),
        ("global_batch_size", 0, r"config.global_batch_size must be at least 1, got 0"),
        ("total_samples", 10, r"config.total_samples 10 is less than one batch of 65536"),
        ("warmup_samples", 12_800_000_000, r"config.warmup_samples 12800000000 must be less than total_samples"),
        ("profile", (3,), r"config.profile must be empty or .* within 1 to 195312; got \(3,\)"),
        ("profile", (3, 2), r"config.profile must be empty or the first"),
        ("profile", (0, 2), r"config.profile must be empty or the first"),
        ("profile", (195_312, 195_313), r"config.profile must be empty or the first"),
        ("eval.templates", ("a photo",), r"config.eval.templates: each needs one {}"),
    ],
)
def test_a_mistake_is_named(key, value, message):
    config = dataclasses.asdict(Config())
    *groups, leaf = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[leaf] = value
    with pytest.raises(ValueError, match=message):
        config_check.from_config_dict(ConfigDict(config, type_safe=False) if "crop" not in key else config)


def test_integers_pass_as_floats():
    assert config_check.from_config_dict({"model": {"init_logit_scale": 10}}).model.init_logit_scale == 10.0


def test_a_recipe_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(REPO))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    config = config_check.read_recipe([f"--config={REPO}/configs/flip_b16.py", "--config.eval.tasks="])
    assert (config.model.image.width, config.eval.tasks) == (768, ())
