"""The config in a step's folder: read for its model, and compared with that of a run that resumes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from flip_jax import config_check
from flip_jax.config import Config, Stage
from flip_jax.runtime import UserError
from flip_jax.saved_step import differences, read_json

# Settings that may differ between the run that wrote a checkpoint and the one that resumes it.
RESUMABLE_CHANGES = (
    "mesh.",
    "microbatches",
    "model.remat",
    "model.attention",
    "eval.",
    "checkpoint.",
    "log.",
    "data.tfds_dir",
    "data.threads",
    "data.workers",
    "data.max_bad_fraction",
    "init_from",
    "profile",
)
LENGTHS = ("total_samples", "optim.cooldown_samples")
# What a checkpoint of an earlier version calls a setting, and its name today.
RENAMED = {"model.temperature": "model.init_logit_scale"}
OLD_CAPTIONS = ["caption", "captions", "title", "text", "captions/text", "txt"]  # the default of earlier versions


def read(step: epath.Path) -> Config:
    """Reads the config of a step's folder."""
    return from_flat(read_json(step, "config"))


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Undoes `config_check.flatten`; `flat` may be from an earlier version."""
    nested: dict[str, Any] = {}
    for key, value in current_names(flat).items():
        *groups, leaf = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return config_check.from_config_dict(nested)


def current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the settings of an older checkpoint to their names of today."""
    current = {RENAMED.get(key, key): value for key, value in flat.items()}
    if flat.get("data.captions") == OLD_CAPTIONS:
        current["data.captions"] = list(Config().data.captions)
    if (decay := current.pop("finetune.layer_decay", None)) and current.get("finetune.classes"):
        current["optim.layer_decay"] = decay  # it was for classifiers alone, with a default of 0.75
    if "model.temperature" in flat:  # values outside of today's range meant its bounds, to which the loss clips
        current["model.init_logit_scale"] = min(max(flat["model.temperature"], 1.0), 100.0)
    return current


def check(step: epath.Path, config: Config) -> None:
    """Refuses to resume a run from a step that was written with other settings.

    A setting that did not exist yet counts as its default, which is what was done before there was a choice. The
    length may change while the learning rate has not depended on it yet.

    Raises:
      UserError: the settings that differ, both values.
    """
    stage = Stage(config, config.total_steps)
    if config.stages or (step / "run").exists():
        from flip_jax import stages  # only runs with stages need it

        stage = stages.resumed(step, config)
    config = stage.config
    written = config_check.flatten(Config()) | current_names(read_json(step, "config"))
    samples, remedy = stage.samples_seen(int(step.name)) - stage.samples, ""
    changed = [
        f"  config.{key}: checkpoint {saved!r}, now {ours!r}"
        for key, saved, ours in changes(step, written, config_check.flatten(config))
        if not (key in LENGTHS and samples <= _fixed_samples(written, config))
    ]
    if any(key in line for key in LENGTHS for line in changed):
        remedy = (
            "\nThe length of a run can change only with config.optim.schedule constant, before the old and the new "
            f"cooldown begin; this run is at step {step.name}, schedule {written['optim.schedule']}."
        )
    if changed:
        raise UserError(
            f"{step.parent} holds checkpoints of a run with other settings:\n" + "\n".join(changed) + "\n"
            "Use the same settings to resume it, or another --workdir (and config.init_from for its weights)." + remedy
        )


def longer(config: Config) -> str:
    """Says how a run that is done can be trained longer."""
    if config.stages:
        return "add a stage to config.stages"
    if config.optim.schedule == "constant" and not config.optim.cooldown_samples:
        return "raise config.total_samples"
    return "use another --workdir and config.init_from"


def changes(step: epath.Path, written: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, saved, ours) of every setting that differs and that a resumed run cannot change."""
    for key, saved, our in differences(written, ours):
        if not key.startswith(RESUMABLE_CHANGES) and not (key == "data.train" and _knows_data(step)):
            yield key, saved, our


def _knows_data(step: epath.Path) -> bool:
    """Tells whether the step says which files it was trained on; then restoring the data position compares those."""
    states = (step / "data").iterdir()
    return any("sources" in json.loads(path.read_text()) for path in states if path.name.endswith(".json"))


def _fixed_samples(written: Mapping[str, Any], config: Config) -> int:
    """Counts the samples during which neither run's learning rate depends on its length (cosine: -1, always)."""
    if written["optim.schedule"] != "constant" or config.optim.schedule != "constant":
        return -1
    old = written["total_samples"] - written["optim.cooldown_samples"]
    return min(old, config.total_samples - config.optim.cooldown_samples)
