"""Evaluators: one file each, imported by name when a task asks for it.

A task is EVALUATOR/DATASET. An evaluator's file has `run(encoder, dataset, config)`, which yields (metric, value) with
the headline first, and `NEEDS`, its requirements from `needs`. It gets a `datasets.Dataset`, and the settings of the
evaluation, which may differ from those that the model was trained with.
"""

import dataclasses
import difflib
import importlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flip_jax import runtime
from flip_jax.config import Config
from flip_jax.runtime import UserError

if TYPE_CHECKING:
    from flip_jax.evaluators.datasets import Dataset
    from flip_jax.inference import Encoder

EVALUATORS = {
    "zeroshot": "flip_jax.evaluators.zeroshot",
    "retrieval": "flip_jax.evaluators.retrieval",
    "linear_probe": "flip_jax.evaluators.linear_probe",
    "few_shot": "flip_jax.evaluators.few_shot",
    "classify": "flip_jax.evaluators.classify",
}

_numbers = itertools.count()  # each sum over all processes has a name of its own


def tasks(config: Config) -> list[str]:
    """Returns config.eval.tasks, with entries "EVALUATOR/DATASET,EVALUATOR/DATASET" split into tasks."""
    found = []
    for entry in config.eval.tasks:
        begun, *parts = entry.split(",")
        for part in parts:  # the pattern of a source may have commas of its own, so a task starts at an evaluator
            name, slash, _ = part.strip().partition("/")
            if slash and difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0.75):  # mistyped ones, too
                found.append(begun)
                begun = part.strip()
            else:
                begun += f",{part}"
        found.append(begun)
    return found


def find(task: str, config: Config) -> tuple[Any, "Dataset"]:
    """Returns the module of the evaluator and the data set of a task.

    Raises:
      known.Unknown: no evaluator or data set has this name.
      UserError: the data are missing, or the evaluator, the data set and the model do not fit together.
    """
    from flip_jax.evaluators import datasets, known  # not needed by training without tasks

    name, _, text = task.partition("/")
    if name not in EVALUATORS or not text:
        nearest = difflib.get_close_matches(name, EVALUATORS, n=len(EVALUATORS), cutoff=0)
        raise known.Unknown(f"{task!r} must be EVALUATOR/DATASET with EVALUATOR one of {', '.join(nearest)}")
    evaluator = importlib.import_module(EVALUATORS[name])
    try:
        dataset = datasets.find(text, config)
        for need in evaluator.NEEDS:
            need(dataset, config)
    except UserError as error:
        raise type(error)(f"{task}: {error}") from error
    return evaluator, dataset


def problems(config: Config) -> list[str]:
    """Returns the reason for each task that cannot run."""
    reasons = []
    for task in tasks(config):
        try:
            _, dataset = find(task, config)
            if task.startswith("classify/"):
                from flip_jax.data import classes
                from flip_jax.evaluators import datasets

                names = classes.trained(config)
                datasets.match(datasets.with_classifier_names(dataset, names, config), config)
        except UserError as error:
            reasons.append(str(error))
    return reasons


def evaluate(encoder: "Encoder", task: str, config: Config) -> dict[str, float]:
    """Returns {metric: value} of one task, the headline first."""
    return evaluate_and_count(encoder, task, config)[0]


def evaluate_and_count(encoder: "Encoder", task: str, config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns {metric: value} of one task, and on the first process what became of its images.

    This is {"images": int, "skipped": {reason: int}, "classes_without_images": list[str]}, over all processes.
    """
    evaluator, dataset = find(task, config)
    dataset = dataclasses.replace(dataset, seen=type(dataset.seen)())  # `find` gives all calls the same data set
    results = dict(evaluator.run(encoder, dataset, config))
    seen = dataset.seen
    counts = runtime.sum_counts(f"images/{next(_numbers)}", {"images": seen.used, **seen.skipped})
    images = counts.pop("images", 0)
    return results, {"images": images, "skipped": counts, "classes_without_images": list(seen.empty)}


def means(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Turns {task: {metric: value}} into {"EVALUATOR/mean": the mean of its tasks' headlines}."""
    headlines: dict[str, list[float]] = {}
    for task, metrics in results.items():
        headlines.setdefault(task.partition("/")[0], []).append(next(iter(metrics.values())))
    return {f"{name}/mean": float(np.mean(values)) for name, values in headlines.items()}


def run(encoder: "Encoder", config: Config) -> Iterator[tuple[str, float]]:
    """Yields ("TASK/METRIC", value) for all of config.eval.tasks, then the mean of each evaluator."""
    results = {task: evaluate(encoder, task, config) for task in tasks(config)}
    for task, metrics in results.items():
        yield from ((f"{task}/{metric}", value) for metric, value in metrics.items())
    yield from means(results).items()
