"""Turns a recipe and the command line into a checked `Config`, or refuses them with the remedy."""

import dataclasses
import fractions
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flip_jax import masking
from flip_jax.config import Config
from flip_jax.runtime import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def from_config_dict(values: "ConfigDict | Mapping[str, Any]") -> Config:
    """Turns a ConfigDict (or a nested mapping) into a checked `Config`.

    Raises:
      UserError: an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    config = _build(Config, values.to_dict() if hasattr(values, "to_dict") else values, "")
    home = os.path.expanduser  # the shell leaves "~" as it is in --config.KEY=~/PATH
    data = dataclasses.replace(config.data, vocab=home(config.data.vocab), tfds_dir=home(config.data.tfds_dir))
    evaluation = dataclasses.replace(config.eval, classnames=home(config.eval.classnames))
    config = dataclasses.replace(config, init_from=home(config.init_from), data=data, eval=evaluation)
    if config.stages:
        from flip_jax import stages  # only runs with stages need it

        return stages.checked(config)
    check(config)
    return config


def integral(text: str) -> str:
    """Turns 1e6 or 12.8e9, which people write for a number of samples, into digits; other texts stay as they are."""
    if re.fullmatch(r"[\d._]+[eE]\+?\d+", text):
        value = fractions.Fraction(text)  # exact, where a float has 16 digits
        if value.denominator == 1:
            return str(value.numerator)
    return text


def unknown(key: str) -> str | None:
    """Returns the error text for an unknown key; None for a known one."""
    return None if key in flatten(Config()) else f"config.{key} is unknown{_did_you_mean().setting(key)}"


def _did_you_mean() -> types.ModuleType:
    from flip_jax import did_you_mean  # only errors need it

    return did_you_mean


def find_recipe(text: str) -> tuple[str, str]:
    """Splits "PATH[:ARG]" or "NAME[:ARG]" into the recipe's path and ARG; a name is one of configs/.

    Raises:
      UserError: there is no such file; the message names the nearest recipe.
    """
    path, _, arg = text.partition(":")
    path = os.path.expanduser(path)
    named = os.path.join("configs", f"{path.removesuffix('.py')}.py")
    if os.path.isfile(path) or os.path.isfile(named):
        return (path if os.path.isfile(path) else named), arg
    raise UserError(f"--config={text}: there is no recipe {path!r}; {_did_you_mean().recipe(path)}")


def run_name(path: str, arg: str) -> str:
    """Names a run by its recipe and variants: flip_l16_runlocal for configs/flip_l16.py:runlocal,seed=1."""
    return "_".join([os.path.basename(path).removesuffix(".py"), *(v for v in arg.split(",") if v and "=" not in v)])


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens to {"model.image.width": 768, ...}, with tuples as lists, as JSON would give them back."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"config.{prefix[:-1]} is a group of settings, got {values!r}")
    hints, built = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(unknown(prefix + key))
        group = dataclasses.is_dataclass(hints[key])
        built[key] = _build(hints[key], value, f"{prefix}{key}.") if group else _cast(hints[key], value, prefix + key)
    return cls(**built)


def _cast(hint: Any, value: Any, key: str) -> Any:
    """Returns the value if it has the type `hint`; integers pass as floats, lists as tuples."""
    if isinstance(hint, types.GenericAlias):  # tuple[float, float] or tuple[str, ...]
        items = typing.get_args(hint)
        if isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                items = (items[0],) * len(value)
            if len(items) == len(value):
                return tuple(_cast(item, v, key) for item, v in zip(items, value, strict=True))
        raise UserError(f"config.{key} must be {hint}, got {value!r}")
    if isinstance(hint, types.UnionType):  # int | str: a number or "auto"
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(value) is int or value == "auto":
            return value
        raise UserError(f"config.{key} must be a whole number or 'auto', got {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"config.{key} must be {hint.__name__}, got {value!r}")
    return value


REMAT = ("none", "dots", "names", "full")  # from the least recompute to the least memory
_CHOICES = {
    "model.image.mask": (*masking.STRATEGIES, "resize"),
    "model.text.mask": tuple(masking.TEXT_STRATEGIES),
    "model.image.pool": ("mean", "patches", "cls", "map"),
    "model.image.positions": ("sincos", "learned"),
    "model.image.pixel_stats": ("imagenet", "openai", "inception"),
    "model.text.pool": ("first", "mean", "last", "final"),
    "model.projection": ("both", "text"),
    "model.activation": ("gelu_tanh", "gelu", "quick_gelu"),
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.loss": ("info_nce", "sigmoid"),
    "model.remat": (*REMAT, "auto"),
    "data.resize": ("antialias", "official"),
    "optim.name": ("adamw", "lamb", "muon"),
    "optim.mu_dtype": ("bfloat16", "float32"),
    "optim.schedule": ("cosine", "constant"),
    "eval.mask": ("intact", "masked", "ensemble"),
}
_ABOVE_ZERO = ("optim.base_learning_rate", "model.norm_eps")
_ZERO_OR_MORE = (
    *("optim.learning_rate", "optim.clip_norm", "optim.image_rate", "optim.text_rate"),
    *("model.decoder.weight", "finetune.mixup", "finetune.cutmix"),
)
_RANGES = {
    **dict.fromkeys(_ABOVE_ZERO, ("be above 0", lambda x: x > 0)),
    **dict.fromkeys(_ZERO_OR_MORE, ("be at least 0", lambda x: x >= 0)),
    "optim.ema": ("be in [0, 1): 0.999 averages over about 1,000 steps, 0 over none", lambda x: 0 <= x < 1),
    "model.init_logit_scale": ("be in [1, 100]: it is 1 / temperature, 14.3 for 0.07", lambda x: 1 <= x <= 100),
    "model.decoder.width": ("divide by 4", lambda x: x % 4 == 0),
    "optim.layer_decay": ("be in (0, 1]", lambda x: 0 < x <= 1),
    "finetune.label_smoothing": ("be in [0, 1)", lambda x: 0 <= x < 1),
}
_AT_LEAST_ZERO = (
    "warmup_samples",
    "optim.cooldown_samples",
    "eval.every_steps",
    "checkpoint.every_steps",
    "data.threads",
    "data.workers",
    "finetune.classes",
    "model.image.mlp_width",
    "model.text.mlp_width",
)

# Sizes that only a damaged or hostile file has; arrays of them would fill the memory.
_AT_MOST = {
    "image_size": 2**13,
    "width": 2**15,
    "mlp_width": 2**17,
    "depth": 2**10,
    "embed_dim": 2**15,
    "vocab_size": 2**24,
    "context_length": 2**16,
    "batch_size": 2**20,
    "threads": 2**10,
    "classes": 2**24,
}
_MAX_PATCHES = 2**16


def check(config: Config) -> None:
    """Raises UserError for settings of a run without stages that cannot be used or contradict each other."""
    flat, image, text, data = flatten(config), config.model.image, config.model.text, config.data
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key} must be one of {', '.join(allowed)}; got {flat[key]!r}")
    for key, value in flat.items():
        most = _AT_MOST.get(key.rpartition(".")[2])
        if most and type(value) is int and value > most:
            raise UserError(f"config.{key} must be at most {most}, got {value}")
        least = 0 if key in _AT_LEAST_ZERO else 1
        if type(value) is int and key != "seed" and value < least:
            raise UserError(f"config.{key} must be at least {least}, got {value}")
    for key, (must, good) in _RANGES.items():
        if not good(flat[key]):
            raise UserError(f"config.{key} must {must}, got {flat[key]}")
    if image.image_size % image.patch_size:
        raise UserError(
            f"config.model.image.image_size {image.image_size} does not divide by patch_size {image.patch_size}; "
            f"the nearest size that does is {round(image.image_size / image.patch_size) * image.patch_size}"
        )
    if (patches := (image.image_size // image.patch_size) ** 2) > _MAX_PATCHES:
        raise UserError(
            f"config.model.image: {patches} patches of {image.patch_size} px are more than {_MAX_PATCHES}; raise "
            "patch_size or lower image_size"
        )
    masking.check(image, text)
    if config.model.attention == "cudnn" and config.model.dtype != "bfloat16":
        raise UserError("config.model.attention 'cudnn' computes in half precision: set config.model.dtype 'bfloat16'")
    if text.causal and (text.mask_padding or text.pool == "first"):
        raise UserError(
            "config.model.text.causal: no token sees the padding behind it, and the first sees only itself; "
            f"set mask_padding False and pool 'last' or 'mean', got {text.mask_padding} and {text.pool!r}"
        )
    if image.positions == "sincos" and image.width % 4:
        raise UserError(f"config.model.image.width must divide by 4 for sin-cos positions, got {image.width}")
    if image.pool == "map" or config.model.projection == "text":
        from flip_jax.models import map_head  # few models need it

        map_head.check(config.model)
    if config.model.decoder.weight and (image.mask_ratio == 0 or image.mask == "resize"):
        raise UserError(
            "config.model.decoder reconstructs removed patches, but none is removed by config.model.image.mask "
            f"{image.mask!r} at mask_ratio {image.mask_ratio}; set decoder.weight to 0 or mask some"
        )
    for name in ("image", "text", "decoder"):
        width, heads = flat[f"model.{name}.width"], flat[f"model.{name}.heads"]
        if width % heads:
            raise UserError(f"config.model.{name}.width {width} does not divide by its heads {heads}")
    if config.total_steps < 1:
        raise UserError(
            f"config.total_samples {config.total_samples} is less than one batch of {config.global_batch_size}; "
            "raise total_samples or lower global_batch_size"
        )
    traced, steps = config.profile, config.total_steps
    if traced and not (len(traced) == 2 and 0 < traced[0] <= traced[1] <= steps):
        raise UserError(
            f"config.profile must be empty or the first and the last step to trace, within 1 to {steps}; got {traced}"
        )
    if config.warmup_samples >= config.total_samples:
        raise UserError(
            f"config.warmup_samples {config.warmup_samples} must be less than total_samples {config.total_samples}"
        )
    cooldown = config.optim.cooldown_samples
    if cooldown and config.optim.schedule != "constant":
        raise UserError(
            f"config.optim.cooldown_samples {cooldown} needs config.optim.schedule 'constant', or set it to 0"
        )
    if config.warmup_samples + cooldown > config.total_samples:
        raise UserError(
            f"config.warmup_samples {config.warmup_samples} and optim.cooldown_samples {cooldown} are more than "
            f"total_samples {config.total_samples}"
        )
    for key, low, high in (("crop_area", 0, 1), ("crop_aspect", 0, float("inf"))):
        lo, hi = getattr(data, key)
        if not low < lo <= hi <= high:
            raise UserError(f"config.data.{key} must be a range within ({low}, {high}], got {(lo, hi)}")
    if not (config.optim.image_rate or config.optim.text_rate or config.finetune.classes):
        raise UserError("config.optim.image_rate and text_rate are both 0: no tower would train; raise one above 0")
    if config.finetune.classes and (image.mask_ratio or config.microbatches not in (1, "auto")):
        raise UserError(
            "config.finetune.classes: fine-tuning sees whole images, a batch at once; set model.image.mask_ratio 0 "
            f"and microbatches 1, got {image.mask_ratio} and {config.microbatches}"
        )
    if config.eval.mask != "intact" and (image.mask != "random" or not image.mask_ratio):
        raise UserError(
            f"config.eval.mask {config.eval.mask!r} masks at random as training does: it needs config.model.image.mask "
            f"'random' and a mask_ratio above 0, got {image.mask!r} and {image.mask_ratio}; or set it to 'intact'"
        )
    if any("*" in name for name in data.captions):
        from flip_jax.data import caption_mix  # only runs that draw from several keys need it

        caption_mix.split(data)
    for template in config.eval.templates:
        if template.count("{}") != 1:
            raise UserError(f"config.eval.templates: each needs one {{}} for the class name, got {template!r}")


def _normalised(argument: str) -> str:
    """Finds the recipe, and writes a value as the settings' own parser takes it: 1e6 as 1000000, a,b as ('a','b')."""
    name, equals, value = argument.partition("=")
    key, known = name.lstrip("-").removeprefix("config."), flatten(Config())
    if name.lstrip("-") == "config" and equals:
        path, arg = find_recipe(value)
        # Recipes import configs.common; `flip` does not run from the folder that holds both.
        if (root := os.path.dirname(os.path.dirname(os.path.abspath(path)))) not in sys.path:
            sys.path.append(root)
        return f"{name}={path}:{arg}" if arg else f"{name}={path}"
    if type(known.get(key)) is int and equals:
        if not re.fullmatch(r"[+-]?[\d_]+|auto", number := integral(value)):
            raise UserError(f"config.{key} must be a whole number, got {value!r}")
        return f"{name}={number}"
    if key == "eval.tasks" and equals and not value:
        return f"{name}=()"
    if key == "data.captions" and "," in value and value[0] not in "([":
        return f"{name}={tuple(key.strip() for key in value.split(','))!r}"
    return argument


def unknown_options(arguments: Sequence[str]) -> str:
    """Returns the error text for options that are neither --config nor --config.KEY; empty if there are none."""
    found = (re.match(r"--?(?!-|config(?:[.=]|$))([\w-]+)", argument) for argument in arguments)
    names = [match[1] for match in found if match]
    return _did_you_mean().options(names) if names else ""


def read_recipe(arguments: Sequence[str]) -> Config:
    """Reads "--config=configs/NAME.py[:ARG]" and any "--config.KEY=VALUE" into a checked `Config`.

    Raises:
      UserError: no or no readable recipe, an unknown setting, one given twice, a value that cannot be used.
    """
    from absl import flags
    from ml_collections import config_flags

    keys = [found[1] for found in (re.match(r"--?(config[\w.]*)(?:=|$)", argument) for argument in arguments) if found]
    if repeated := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        raise UserError(
            f"--{repeated[0]} is given {keys.count(repeated[0])} times. If its value has braces or a glob, the shell "
            f"has expanded it: put it in quotes, --{repeated[0]}='...'"
        )
    if hints := unknown_options(arguments):
        raise UserError(hints)
    for first, second in zip(arguments, arguments[1:], strict=False):
        if first.startswith("--config.") and "=" not in first and second.startswith("--"):
            raise UserError(f"no value follows {first}: write {first}=VALUE")
    if "config" not in keys:
        raise UserError("--config=configs/NAME.py is missing; the recipes are in configs/")
    argv, values = ["recipe", *map(_normalised, arguments)], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
        values.config.lock()  # a recipe that could not be read raises at its first use
    except (flags.Error, KeyError, AttributeError) as error:
        if not (reason := _did_you_mean().reason(error, keys)):
            raise
        raise UserError(reason) from None
    if rest:
        raise UserError(f"unexpected arguments: {' '.join(rest)}; a value with blanks, braces or a glob needs quotes")
    config, given = from_config_dict(values.config), values.config.total_samples
    if config.stages and given != config.total_samples and any("total_samples=" in word for word in arguments):
        raise UserError(
            f"config.total_samples {given} is not the sum of config.stages, {config.total_samples}; leave it out"
        )
    return config
