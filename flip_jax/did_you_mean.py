"""What a mistyped recipe, setting or option may mean, and the words of other programs; imported only by errors."""

import difflib
import glob
import os
from collections.abc import Sequence

from absl import flags

from flip_jax import config_check
from flip_jax.config import Config
from flip_jax.config_check import flatten
from flip_jax.runtime import UserError

# Word -> the setting, "" where there is none, and how the value translates.
SETTINGS: dict[str, tuple[str, str]] = {
    "batch_size": ("global_batch_size", "the batch of all devices together"),
    "accum_freq": ("microbatches", "parts of the batch; the loss still compares the full batch"),
    "lr": ("optim.learning_rate", "the peak; or optim.base_learning_rate, which is per 256 samples"),
    "learning_rate": ("optim.learning_rate", "the peak; or optim.base_learning_rate, which is per 256 samples"),
    "wd": ("optim.weight_decay", ""),
    "beta1": ("optim.b1", ""),
    "beta2": ("optim.b2", ""),
    "grad_clip_norm": ("optim.clip_norm", ""),
    "lock_image": ("optim.image_rate", "0 freezes the image tower"),
    "lock_text": ("optim.text_rate", "0 freezes the text tower"),
    "epochs": ("total_samples", "epochs x samples in the data"),
    "steps": ("total_samples", "steps x global_batch_size"),
    "train_num_samples": ("total_samples", "epochs x samples in the data"),
    "warmup": ("warmup_samples", "in samples: steps x global_batch_size"),
    "warmup_steps": ("warmup_samples", "in samples: steps x global_batch_size"),
    "workers": ("data.workers", "processes that read and decode, 0 for threads"),
    "precision": ("model.dtype", "bfloat16 or float32"),
    "grad_checkpointing": ("model.remat", "none, dots, names, full or auto"),
    "save_frequency": ("checkpoint.every_steps", "in steps"),
    "val_frequency": ("eval.every_steps", "in steps"),
    "zeroshot_frequency": ("eval.every_steps", "in steps"),
    "log_every_n_steps": ("log.every_steps", ""),
    "train_data": ("data.train", "KIND:PATTERN, such as 'webdataset:/data/{00000..00127}.tar'"),
    "dataset_type": ("data.train", "KIND:PATTERN, such as 'webdataset:/data/{00000..00127}.tar'"),
    "imagenet_val": ("eval.tasks", "zeroshot/imagenet=folder:DIR"),
    "imagenet_v2": ("eval.tasks", "zeroshot/imagenet_v2=folder:DIR"),
    "csv_img_key": ("data.image", "the column of images"),
    "csv_caption_key": ("data.captions", "the columns of captions, the first found is read"),
    "force_patch_dropout": ("model.image.mask_ratio", "the share of patches that is removed"),
    "pretrained": ("init_from", "a run, or what flip convert has written"),
    "report_to": ("log.wandb", "a project; TensorBoard needs no setting"),
    "resume": ("", "run the same command again: a run resumes from its newest checkpoint"),
    "logs": ("", "the folder of the run is --workdir=DIR"),
    "name": ("", "the folder of the run is --workdir=DIR"),
    "model": ("", "the recipe says the model: --config=configs/flip_b16.py, clip_b16.py, flip_l16.py ..."),
}


def word(name: str) -> str | None:
    """Returns what to give in place of a word of another program, None for a word that is not known."""
    found = SETTINGS.get(name.lower().replace("-", "_"))
    if not found:
        return None
    key, translation = found
    if not key:
        return translation
    return f"did you mean --config.{key}" + (f" ({translation})?" if translation else "?")


def setting(key: str) -> str:
    """Returns the end of the error about an unknown setting; empty if none is like it."""
    if hint := word(key):
        return f"; {hint}"
    known = flatten(Config())
    alike = [name for name in known if name.endswith(f".{key.rpartition('.')[2]}")]
    near = alike or difflib.get_close_matches(key, [*known, *(name.rpartition(".")[0] for name in known)], n=1)
    hint = " or ".join(f"config.{name}" for name in near)
    return f"; did you mean {hint}?" if hint else ""


def option(name: str) -> str:
    """Returns what an unknown option of main.py may mean."""
    if hint := word(name):
        return hint
    settings = {key.rpartition(".")[2]: f"--config.{key}" for key in flatten(Config())}
    options = {option: f"--{option}" for option in ("workdir", "distributed", "coordinator")}
    near = difflib.get_close_matches(name.replace("-", "_"), [*options, *settings], n=1)
    return f"did you mean {(settings | options)[near[0]]}?" if near else "settings are given as --config.KEY=VALUE"


def options(names: Sequence[str]) -> str:
    """Returns the error text for unknown options."""
    lines = [f"--{name} is unknown; {option(name)}" for name in names]
    return "\n".join(lines if len(lines) == 1 else [*lines, "All flags of open_clip: docs/open_clip.md"])


def reason(error: Exception, keys: Sequence[str]) -> str | None:
    """Returns what is wrong with a command line whose settings `keys` ml_collections refused; None if it is a bug."""
    if not isinstance(error, flags.Error):
        found = (config_check.unknown(key.removeprefix("config.")) for key in keys if "." in key)
        return next(filter(None, found), None)
    if "Error whilst parsing config file" not in str(error):
        return str(error)
    # ml_collections raises it again with the text of the trace; a refusal is one message.
    cause: BaseException | None = error
    while cause and not (type(cause) is UserError and "Traceback" not in str(cause)):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause else None


def recipes() -> dict[str, str]:
    """Returns the path of each recipe in configs/, and the first line of its docstring."""
    paths = (path for path in sorted(glob.glob("configs/*.py")) if os.path.basename(path)[0] != "_")
    lines = {}
    for path in paths:
        if os.path.basename(path) not in ("common.py", "variants.py"):  # what recipes share
            with open(path, encoding="utf-8") as file:
                lines[path] = file.readline().strip('"\n')
    return lines


def recipe(path: str) -> str:
    """Returns the recipe that a path may mean, or all of them."""
    names = [os.path.basename(path).removesuffix(".py") for path in recipes()]
    near = difflib.get_close_matches(os.path.basename(path).removesuffix(".py"), names, n=1)
    return f"did you mean configs/{near[0]}.py?" if near else f"the recipes are {', '.join(names)} in configs/"
