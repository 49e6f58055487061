"""Train small models on the embedded emoji and test them zero-shot, for ablations.py, table1.py and tradeoff.py."""

import dataclasses
import importlib
import pathlib

from flip_jax import config_check, evaluators, inference, saved_step, train
from flip_jax.config import Config

TASK = "zeroshot/emoji"


def settings(samples: int, changes: str, seed: int, workdir: pathlib.Path) -> Config:
    """Return the settings of a run of `samples` samples, a tenth of them warm-up, with data in WORKDIR/data."""
    recipe = f"total_samples={samples},warmup_samples={samples // 10},eval.every_steps=0,checkpoint.every_steps=0,"
    values = importlib.import_module("configs.flip_emoji").get_config(recipe + changes)
    values.seed, values.data.tfds_dir = seed, str(workdir / "data")
    return config_check.from_config_dict(values)


def fit(config: Config, path: pathlib.Path) -> None:
    """Train or resume to the end; SIGTERM ends the program after a checkpoint."""
    train.train(config, path)
    if saved_step.newest(str(path)).name != str(config.total_steps):
        raise SystemExit("stopped; run the same command to resume")


def score(encoder: inference.Encoder, config: Config, mask: str = "intact", task: str = TASK) -> dict[str, float]:
    """Return zero-shot top1 and top5 in percent, with images seen as `mask` says."""
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, mask=mask))
    found = evaluators.evaluate(encoder, task, config)
    return {"top1": found["top1"], "top5": found["top5"]}
