"""Runs in stages: `config.stages` read and checked, the state at a boundary, and what a resumed run may change."""

import ast
import dataclasses
import re
from typing import Any

import grain
import jax
import numpy as np
import optax
from etils import epath

from flip_jax import config_check, saved_config, train_step, weights
from flip_jax.checkpoint import Checkpoints
from flip_jax.config import Config, Stage
from flip_jax.models import vit
from flip_jax.runtime import UserError, say
from flip_jax.saved_step import read_json
from flip_jax.train_step import Program, TrainState

SETTINGS = (
    "model.image.image_size",
    "model.image.mask",
    "model.image.mask_ratio",
    "model.text.mask",
    "model.text.mask_ratio",
    "global_batch_size",
    "microbatches",
    "optim.base_learning_rate",
    "optim.learning_rate",
    "optim.schedule",
    "optim.cooldown_samples",
    "warmup_samples",
    "data.crop_area",
)
STATE = "optim.state"  # of a stage only: whether the moments of the stage before are "kept" or "fresh" ones are made
MOST = 100  # stages; only a damaged or hostile file has more
_NEXT = re.compile(r",(?= *[\w.]+=)")  # a comma within a value, as in (0.4,1.0), separates nothing


def shortened(text: str, samples: int) -> str:
    """Returns a run's stages with so many samples each, and only their changes of the model and the data."""
    parts = (_NEXT.split(part.partition(":")[2]) for part in text.split(";"))
    kept = (",".join(x for x in part if x.startswith(("model.", "data.", STATE))) for part in parts)
    return ";".join(f"{samples}:{changes}" for changes in kept)


def checked(config: Config) -> Config:
    """Checks a run with stages, and returns it with the sum of their lengths as `total_samples`.

    Raises:
      UserError: stages that cannot be read, change something else than `SETTINGS`, or do not fit the other settings.
    """
    # The base settings have no length of their own: theirs are checked with each stage.
    timeless = dataclasses.replace(config.optim, cooldown_samples=0)
    base = dataclasses.replace(config, warmup_samples=0, optim=timeless, total_samples=config.global_batch_size)
    config_check.check(dataclasses.replace(base, profile=()))
    stages = plan(config)
    config_check.check(dataclasses.replace(base, total_samples=stages[-1].last * config.global_batch_size))
    return dataclasses.replace(config, total_samples=sum(stage.config.total_samples for stage in stages))


def plan(config: Config) -> list[Stage]:
    """Lists the stages of a run, each with its own config; UserError as in `checked`."""
    if not config.stages:
        return [Stage(config, config.total_steps)]
    stages: list[Stage] = []
    parts = config.stages.split(";")
    if len(parts) > MOST:
        raise UserError(f"config.stages: at most {MOST} stages, got {len(parts)}")
    step = samples = 0
    for number, part in enumerate(parts, 1):
        own, fresh = _read(part, config, f"config.stages, stage {number}")
        last = step + own.total_steps
        stages.append(Stage(own, last, step, samples, f"stage {number}/{len(parts)}: ", fresh))
        step, samples = last, samples + own.total_samples
    return stages


def _read(part: str, config: Config, where: str) -> tuple[Config, bool]:
    """Returns the config of a stage, "SAMPLES:KEY=VALUE,KEY=VALUE", and whether its optimizer starts from scratch."""
    length, _, changes = part.partition(":")
    length = _digits(length.strip()).replace("_", "")
    if not re.fullmatch(r"\d{1,18}", length):
        raise UserError(f"{where}: expected SAMPLES:KEY=VALUE,KEY=VALUE, got {part!r}")
    values = dataclasses.asdict(config) | {"stages": "", "profile": (), "total_samples": int(length)}
    given: dict[str, Any] = {}
    for change in filter(None, (change.strip() for change in _NEXT.split(changes))):
        key, equals, text = change.partition("=")
        if not equals or key in given:
            problem = "is given twice" if equals else "has no value"
            raise UserError(f"{where}: {key} {problem}; expected SAMPLES:KEY=VALUE,KEY=VALUE, got {part!r}")
        if key not in (*SETTINGS, STATE):
            cannot = config_check.unknown(key) or f"config.{key} cannot change within a run"
            raise UserError(f"{where}: {cannot}; a stage may change {', '.join((*SETTINGS, STATE))}")
        given[key] = _value(text)
        *groups, leaf = key.split(".")
        node = values
        for group in groups:
            node = node[group]
        if key != STATE:
            node[leaf] = given[key]
    if given.get(STATE, "kept") not in ("kept", "fresh"):
        raise UserError(f"{where}: {STATE} must be kept or fresh; got {given[STATE]!r}")
    try:
        own = config_check.from_config_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if own.total_samples % own.global_batch_size:
        steps = max(1, round(own.total_samples / own.global_batch_size))
        raise UserError(
            f"{where}: its {own.total_samples} samples do not divide by config.global_batch_size "
            f"{own.global_batch_size}; the nearest length that does is {steps * own.global_batch_size}"
        )
    if "optim.base_learning_rate" in given and own.optim.learning_rate:
        raise UserError(
            f"{where}: config.optim.base_learning_rate {own.optim.base_learning_rate} has no effect next to "
            f"config.optim.learning_rate {own.optim.learning_rate}; change that, or set it to 0"
        )
    return own, given.get(STATE) == "fresh"


def _digits(text: str) -> str:
    """Turns 1e6 into digits, but no exponent that would fill the memory."""
    return config_check.integral(text) if re.search(r"[eE]\+?\d{1,2}\Z", text) else text


def _value(text: str) -> Any:
    """Reads a number, or a pair of them in brackets; anything else is a name."""
    try:
        return ast.literal_eval(_digits(text))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def enter(stage: Stage, program: Program, state: TrainState) -> TrainState:
    """Makes the first state of a stage from the last one of the stage before.

    Positions fit the stage's image size: fixed ones are computed, learned ones interpolated. The optimizer keeps its
    state, but the moments of interpolated weights are zero, or starts from scratch; the schedule starts at its warm-up.
    """

    def fit(path, like, value):
        if value.shape == like.shape:
            return value
        tower, name = (key.key for key in path)
        assert name == "pos_embed"  # nothing else has the image's size
        image = stage.config.model.image
        if tower == "image":
            return _place(like, weights.resize_weight(image, name, np.asarray(value)))
        return _place(like, vit.sincos_2d(image.image_size // image.patch_size, like.shape[2]))

    def keep(like, value):
        if _is_schedule(like):
            return jax.tree.map(_zeros, like)
        return value if value.shape == like.shape else _zeros(like)

    def fitted(name):
        return jax.tree_util.tree_map_with_path(fit, getattr(program.state, name), getattr(state, name))

    # An average of the weights is kept, too, and has their shapes.
    fits = {name: fitted(name) for name in state._fields if name not in ("step", "opt_state")}
    if stage.fresh:
        jax.tree.map(lambda x: x.delete(), state.opt_state)  # makes room for the new one
        return state._replace(opt_state=program.init(fits["params"]).opt_state, **fits)
    opt_state = jax.tree.map(keep, program.state.opt_state, state.opt_state, is_leaf=_is_schedule)
    return state._replace(opt_state=opt_state, **fits)


def _is_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


def follow(batches: grain.DatasetIterator, following: grain.DatasetIterator) -> grain.DatasetIterator:
    """Moves the data of a stage to where those of the stage before stopped, which are closed."""
    following.set_state(batches.get_state())
    batches.close()
    return following


def restore(
    stage: Stage, program: Program, step: epath.Path, checkpoints: Checkpoints, batches: grain.DatasetIterator
) -> TrainState:
    """Makes the first state of a stage from a step that the stage before ended with."""
    before = train_step.make_program(saved_config.read(step), jax.sharding.get_mesh())
    return enter(stage, program, checkpoints.restore(before.state, batches))


def _place(like: jax.ShapeDtypeStruct, value: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return _place(like, np.zeros(like.shape, like.dtype))


def written(step: epath.Path) -> Config:
    """Reads the settings of the whole run that wrote a step; the step's own are those of its stage."""
    return saved_config.from_flat(read_json(step, "run")) if (step / "run").exists() else saved_config.read(step)


def place(stages: list[Stage], step: int) -> int:
    """Finds the index of the stage that a step is in."""
    return next((i for i, stage in enumerate(stages) if step <= stage.last), len(stages) - 1)


def resumed(step: epath.Path, config: Config) -> Stage:
    """Finds the stage of `config` in which a run resumes from a step; later ones may have changed, which is said.

    Raises:
      UserError: stages that have begun are other ones than those of the run that wrote the step.
    """
    run = written(step)
    theirs, ours, changed = plan(run), plan(config), []
    number = place(theirs, int(step.name))
    for i, before in enumerate(theirs[: number + 1]):
        if i >= len(ours):
            changed.append(f"  stage {i + 1} is missing now")
            continue
        if i < number:  # `saved_config.check` compares the settings of the stage in progress
            flat = (config_check.flatten(one.config) for one in (before, ours[i]))
            for key, saved, our in saved_config.changes(step, *flat):
                changed.append(f"  stage {i + 1}, config.{key}: checkpoint {saved!r}, now {our!r}")
        if i and before.fresh != ours[i].fresh:
            saved, our = ("fresh" if one.fresh else "kept" for one in (before, ours[i]))
            changed.append(f"  stage {i + 1}, {STATE}: checkpoint {saved!r}, now {our!r}")
    if changed:
        raise UserError(
            f"{step.parent} holds checkpoints of a run with other stages:\n" + "\n".join(changed) + "\n"
            f"Only stages that have not begun can change, and step {step.name} is in stage {number + 1}. Use the same "
            "config.stages up to that one, or another --workdir (and config.init_from for its weights)."
        )
    then, now = (";".join(one.stages.split(";")[number + 1 :]) or "none" for one in (run, config))
    if then != now:
        say(f"config.stages: those after stage {number + 1}, which have not begun, changed from {then} to {now}")
    return ours[number]
