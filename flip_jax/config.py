"""Settings of a run: frozen, typed, checked once at start.

The dataclasses below are the only list of settings: `configs/common.py` turns their defaults into a ConfigDict,
recipes change a few values, the command line changes others (`--config.global_batch_size=4096`), and `from_config_dict`
turns the result back into a `Config`, refusing unknown keys, wrong types and contradictions.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from flip_jax import masking

if typing.TYPE_CHECKING:  # a training step needs dataclasses alone
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """Vision transformer. Sizes in pixels; `mask_ratio` is the share of patches removed in training (0: CLIP).

    `mask` is a strategy of flip_jax/masking.py; "resize" shrinks the picture to as many patches instead.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mask: str = "random"
    mask_ratio: float = 0.5
    pool: str = "mean"  # over all tokens, cls included (official); "patches": without it; or "cls"
    patch_bias: bool = True
    positions: str = "sincos"  # fixed (official), or "learned", with one for cls
    pre_norm: bool = False  # a norm before the first block (CLIP)
    pixel_stats: str = "imagenet"  # mean and deviation that pixels are normalised with: an entry of vit.PIXEL_STATS

    @property
    def visible_patches(self) -> int:
        """How many patches a training step encodes."""
        return masking.keep_count((self.image_size // self.patch_size) ** 2, self.mask_ratio)


@dataclasses.dataclass(frozen=True)
class TextTower:
    """Text transformer over `context_length` word pieces, of which training drops `mask_ratio`."""

    vocab_size: int = 30_523  # BERT's 30,522 and one out-of-vocabulary row that never occurs (official)
    context_length: int = 32
    width: int = 512
    depth: int = 12
    heads: int = 8
    pool: str = "first"  # the first word piece (official), "mean" over the real tokens, or "last", the last of them
    mask_padding: bool = False  # the official tower attends to padding
    causal: bool = False  # tokens attend to earlier ones only (CLIP)
    mask: str = "prioritised"
    mask_ratio: float = 0.0

    @property
    def visible_tokens(self) -> int:
        """How many tokens a training step encodes."""
        return masking.keep_count(self.context_length, self.mask_ratio)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """MAE's decoder, which draws the removed patches, and the weight of its loss (0: none). Paper, table 1f."""

    weight: float = 0.0
    width: int = 512
    depth: int = 8
    heads: int = 16


@dataclasses.dataclass(frozen=True)
class Model:
    """Two towers, their projections to `embed_dim`, compute type and what the backward pass recomputes."""

    image: ImageTower = ImageTower()
    text: TextTower = TextTower()
    decoder: Decoder = Decoder()
    embed_dim: int = 512
    temperature: float = 1 / 0.07  # initial exp(logit_scale), clipped at 100 in the loss
    activation: str = "gelu_tanh"  # the official approximation; "gelu"; or "quick_gelu", OpenAI's
    norm_eps: float = 1e-6
    loss: str = "info_nce"  # or "sigmoid" (SigLIP), with a learned bias
    dtype: str = "bfloat16"
    remat: str = "none"  # or "dots", "names", "full": less and less is kept; "auto": the first that fits
    attention: str = "xla"  # or "cudnn": cuDNN's, on NVIDIA GPUs and where no token is padding or to come
    unroll: bool = False  # layers written out instead of a loop: longer to compile, faster on CPUs


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW. The peak learning rate is `base_learning_rate * global_batch_size / 256`."""

    base_learning_rate: float = 4e-6
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.2
    mu_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Training of the image tower as a classifier of `classes` classes (0: contrastive training). See finetune.py."""

    classes: int = 0
    layer_decay: float = 0.75  # the rate of a layer as a share of that of the next one
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the pairs come from and how a record becomes a sample.

    `train` is one source or several, "WEIGHT*SOURCE;WEIGHT*SOURCE"; weights are shares of records. A source is
    KIND:PATTERN, with brace ranges and globs, of kind webdataset, tfrecord, parquet or csv, or "tfds:NAME/SPLIT";
    `tfds_dir` is where TFDS keeps its data (default: TFDS's own). `vocab` is a vocabulary file, of WordPiece or CLIP's
    byte pairs; empty: a WordPiece is trained on the captions.
    """

    train: str = ""
    tfds_dir: str = ""
    vocab: str = ""
    captions: tuple[str, ...] = ("caption", "captions", "title", "text", "captions/text", "txt")  # the first there is
    shuffle_window: int = 10_000  # records of a window, held encoded
    interleave: int = 8  # shards read at once
    threads: int = 0  # decoding threads; 0: one per core
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    resize: str = "antialias"  # or "official": FLIP's own bicubics, which do not antialias
    max_image_pixels: int = 100_000_000
    max_bad_fraction: float = 0.1


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes `fsdp` and `tensor`; `data` takes the devices that are left."""

    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation every `every_steps` and at the end (0: never) by `tasks`, each EVALUATOR/DATASET.

    EVALUATOR is an entry of `evaluators.EVALUATORS`. DATASET is NAME, one of `evaluators.datasets.KNOWN`; NAME=SOURCE,
    where its pictures lie elsewhere; or SOURCE, a source as in `Data.train`. Where something is fitted on a training
    split, ";train=SOURCE" follows. `classnames` names a file of class names (one a line, or a JSON list) for tasks that
    are a SOURCE, `templates` are prompts with {} for the name; where they are empty, the set's own are used.

    `mask` is what is encoded of a picture (the paper's table 1d): all of it, "intact"; one random part of the size that
    training sees, "masked"; or the mean over such parts that together cover it, "ensemble".
    """

    every_steps: int = 0
    tasks: tuple[str, ...] = ()
    classnames: str = ""
    templates: tuple[str, ...] = ()
    batch_size: int = 256
    mask: str = "intact"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Save every `every_steps` (0: only at the end and on SIGTERM) and keep the newest `keep`."""

    every_steps: int = 1000
    keep: int = 3


@dataclasses.dataclass(frozen=True)
class Log:
    """Write metrics every `every_steps`; nothing is fetched from the devices in between."""

    every_steps: int = 50
    wandb: str = ""  # a project of Weights & Biases, which then gets all that TensorBoard does


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Durations are in samples, so that a changed batch keeps their meaning."""

    seed: int = 0
    global_batch_size: int = 65_536
    total_samples: int = 12_800_000_000
    warmup_samples: int = 51_200_000
    microbatches: int = 1  # parts of the batch that are encoded one after the other; the loss stays over all of it
    init_from: str = ""  # WORKDIR or checkpoint step whose weights start this run
    profile: tuple[int, ...] = ()  # first and last step of which jax.profiler writes a trace to WORKDIR/profile
    model: Model = Model()
    optim: Optim = Optim()
    finetune: Finetune = Finetune()
    data: Data = Data()
    mesh: Mesh = Mesh()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; the last, partial batch is not trained."""
        return self.total_samples // self.global_batch_size


# Settings that may differ between the run that wrote a checkpoint and the one that resumes it.
RESUMABLE_CHANGES = (
    "mesh.",
    "microbatches",
    "model.remat",
    "eval.",
    "checkpoint.",
    "log.",
    "data.tfds_dir",
    "data.threads",
    "data.max_bad_fraction",
    "init_from",
    "profile",
)


def from_config_dict(values: "ConfigDict | Mapping[str, Any]") -> Config:
    """Turns a ConfigDict (or a nested mapping) into a checked `Config`.

    Raises:
      ValueError: an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    config = _build(Config, values.to_dict() if hasattr(values, "to_dict") else values, "")
    _check(config)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.image.width": 768, ...} for every leaf setting, tuples as lists, as JSON would give them back."""
    flat = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def from_flat(flat: Mapping[str, Any]) -> Config:
    """The `Config` that `flatten` made `flat` of."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return from_config_dict(nested)


def unknown(key: str) -> str | None:
    """What to say of a key that is no setting, with those that end alike or are written alike; None if it is one."""
    known = flatten(Config())
    if key in known:
        return None
    alike = [name for name in known if name.endswith(f".{key.rpartition('.')[2]}")]
    near = alike or difflib.get_close_matches(key, [*known, *(name.rpartition(".")[0] for name in known)], n=1)
    hint = " or ".join(f"config.{name}" for name in near)
    return f"config.{key} is unknown" + (f"; did you mean {hint}?" if hint else "")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"config.{prefix[:-1]} is a group of settings, got {values!r}")
    hints, built = typing.get_type_hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(unknown(prefix + key))
        group = dataclasses.is_dataclass(hints[key])
        built[key] = _build(hints[key], value, f"{prefix}{key}.") if group else _cast(hints[key], value, prefix + key)
    return cls(**built)


def _cast(hint: Any, value: Any, key: str) -> Any:
    """The value if it is of the type `hint`; integers pass as floats, lists as tuples."""
    if isinstance(hint, types.GenericAlias):  # tuple[float, float] or tuple[str, ...]
        items = typing.get_args(hint)
        if isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                items = (items[0],) * len(value)
            if len(items) == len(value):
                return tuple(_cast(item, v, key) for item, v in zip(items, value, strict=True))
        raise ValueError(f"config.{key} must be {hint}, got {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"config.{key} must be {hint.__name__}, got {value!r}")
    return value


REMAT = ("none", "dots", "names", "full")  # from the least recompute to the least memory
_CHOICES = {
    "model.image.mask": (*masking.STRATEGIES, "resize"),
    "model.text.mask": tuple(masking.TEXT_STRATEGIES),
    "model.image.pool": ("mean", "patches", "cls"),
    "model.image.positions": ("sincos", "learned"),
    "model.image.pixel_stats": ("imagenet", "openai", "inception"),
    "model.text.pool": ("first", "mean", "last"),
    "model.activation": ("gelu_tanh", "gelu", "quick_gelu"),
    "model.dtype": ("bfloat16", "float32"),
    "model.attention": ("xla", "cudnn"),
    "model.loss": ("info_nce", "sigmoid"),
    "model.remat": (*REMAT, "auto"),
    "data.resize": ("antialias", "official"),
    "optim.mu_dtype": ("bfloat16", "float32"),
    "eval.mask": ("intact", "masked", "ensemble"),
}
_ABOVE_ZERO = ("optim.base_learning_rate", "model.temperature", "model.norm_eps")
_ZERO_OR_MORE = ("model.decoder.weight", "finetune.mixup", "finetune.cutmix")
_RANGES = {
    **dict.fromkeys(_ABOVE_ZERO, ("be above 0", lambda x: x > 0)),
    **dict.fromkeys(_ZERO_OR_MORE, ("be at least 0", lambda x: x >= 0)),
    "model.decoder.width": ("divide by 4", lambda x: x % 4 == 0),
    "finetune.layer_decay": ("be in (0, 1]", lambda x: 0 < x <= 1),
    "finetune.label_smoothing": ("be in [0, 1)", lambda x: 0 <= x < 1),
}
_AT_LEAST_ZERO = ("warmup_samples", "eval.every_steps", "checkpoint.every_steps", "data.threads", "finetune.classes")


def _check(config: Config) -> None:
    flat, image, text, data = flatten(config), config.model.image, config.model.text, config.data
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise ValueError(f"config.{key} must be one of {', '.join(allowed)}; got {flat[key]!r}")
    for key, value in flat.items():
        least = 0 if key in _AT_LEAST_ZERO else 1
        if type(value) is int and key != "seed" and value < least:
            raise ValueError(f"config.{key} must be at least {least}, got {value}")
    for key, (must, good) in _RANGES.items():
        if not good(flat[key]):
            raise ValueError(f"config.{key} must {must}, got {flat[key]}")
    if image.image_size % image.patch_size:
        raise ValueError(
            f"config.model.image.image_size {image.image_size} does not divide by patch_size {image.patch_size}; "
            f"the nearest size that does is {round(image.image_size / image.patch_size) * image.patch_size}"
        )
    masking.check(image, text)
    if config.model.attention == "cudnn" and config.model.dtype != "bfloat16":
        raise ValueError("config.model.attention 'cudnn' computes in half precision: set config.model.dtype 'bfloat16'")
    if text.causal and (text.mask_padding or text.pool == "first"):
        raise ValueError(
            "config.model.text.causal: no token sees the padding behind it, and the first sees none but itself; set "
            f"mask_padding False and pool 'last' or 'mean', got {text.mask_padding} and {text.pool!r}"
        )
    if image.positions == "sincos" and image.width % 4:
        raise ValueError(f"config.model.image.width must divide by 4 for sin-cos positions, got {image.width}")
    if config.model.decoder.weight and (image.mask_ratio == 0 or image.mask == "resize"):
        raise ValueError(
            "config.model.decoder draws removed patches, but none is removed by config.model.image.mask "
            f"{image.mask!r} at mask_ratio {image.mask_ratio}; set decoder.weight to 0 or mask some"
        )
    for name in ("image", "text", "decoder"):
        width, heads = flat[f"model.{name}.width"], flat[f"model.{name}.heads"]
        if width % heads:
            raise ValueError(f"config.model.{name}.width {width} does not divide by its heads {heads}")
    if config.total_steps < 1:
        raise ValueError(
            f"config.total_samples {config.total_samples} is less than one batch of {config.global_batch_size}; "
            "raise total_samples or lower global_batch_size"
        )
    traced, steps = config.profile, config.total_steps
    if traced and not (len(traced) == 2 and 0 < traced[0] <= traced[1] <= steps):
        raise ValueError(
            f"config.profile must be empty or the first and the last step to trace, within 1 to {steps}; got {traced}"
        )
    if config.warmup_samples >= config.total_samples:
        raise ValueError(
            f"config.warmup_samples {config.warmup_samples} must be less than total_samples {config.total_samples}"
        )
    for key, low, high in (("crop_area", 0, 1), ("crop_aspect", 0, float("inf"))):
        lo, hi = getattr(data, key)
        if not low < lo <= hi <= high:
            raise ValueError(f"config.data.{key} must be a range within ({low}, {high}], got {(lo, hi)}")
    if config.finetune.classes and (image.mask_ratio or config.microbatches > 1):
        raise ValueError(
            "config.finetune.classes: fine-tuning sees whole pictures, a batch at once; set model.image.mask_ratio 0 "
            f"and microbatches 1, got {image.mask_ratio} and {config.microbatches}"
        )
    if config.eval.mask != "intact" and (image.mask != "random" or not image.mask_ratio):
        raise ValueError(
            f"config.eval.mask {config.eval.mask!r} masks at random as training does: it needs config.model.image.mask "
            f"'random' and a mask_ratio above 0, got {image.mask!r} and {image.mask_ratio}; or set it to 'intact'"
        )
    for template in config.eval.templates:
        if template.count("{}") != 1:
            raise ValueError(f"config.eval.templates: each needs one {{}} for the class name, got {template!r}")
