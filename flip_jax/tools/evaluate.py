"""Evaluates a model: python -m flip_jax.evaluate --workdir=DIR --tasks=zeroshot/imagenet,retrieval/coco

A task is EVALUATOR/NAME, EVALUATOR/NAME=SOURCE or EVALUATOR/SOURCE, as in config.eval.tasks. Tasks whose data are not
there are said with what prepares them, and the others are done; the exit code is then 1.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping

import jax
import matplotlib.pyplot as plt
from absl import app, flags

from flip_jax import checkpoint, config_check, evaluators, inference, runtime, sharding
from flip_jax.config import Config

Results = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}, the headline first


def settings(config: Config, changes: Mapping[str, object], shards: int) -> Config:
    """The run's settings, with those that the command line gives, and batches that divide by the devices."""
    flat = config_check.flatten(config) | {key: value for key, value in changes.items() if value}
    flat["eval.batch_size"] = -(-flat["eval.batch_size"] // shards) * shards
    return config_check.from_flat(flat)


def evaluate(encoder: inference.Encoder, config: Config) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The metrics of each task, and the errors of those that could not be done.

    Raises:
      datasets.Unknown: an evaluator or a data set.
    """
    results, errors = {}, {}
    for task in evaluators.tasks(config):
        try:
            evaluators.find(task, config)
        except evaluators.datasets.Unknown:
            raise
        except ValueError as error:
            errors[task] = str(error)
            _say(f"left out: {error}", sys.stderr)
    for task in evaluators.tasks(config):
        if task in errors:
            continue
        start = time.perf_counter()
        try:
            results[task] = evaluators.evaluate(encoder, task, config)
        except ValueError as error:
            if jax.process_count() > 1:  # the others are waiting for this process in a step
                raise
            errors[task] = str(error)
            _say(f"failed: {task}: {error}", sys.stderr)
        else:
            _say(f"{task}: {time.perf_counter() - start:,.0f} s", sys.stderr)
    return results, errors


def table(results: Results) -> str:
    """A table for each evaluator: a line for each task and one for the mean, the headlines with a star."""
    blocks, means = [], evaluators.means(results)
    for name in dict.fromkeys(task.partition("/")[0] for task in results):
        tasks = {task.partition("/")[2]: metrics for task, metrics in results.items() if task.startswith(f"{name}/")}
        columns = sorted({metric for metrics in tasks.values() for metric in metrics}, key=_natural)
        rows = [[name, *columns]]
        for task, metrics in tasks.items():
            headline = next(iter(metrics))
            cells = (f"{metrics[c]:.2f}{'*' if c == headline else ' '}" if c in metrics else "" for c in columns)
            rows.append([task, *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
        lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
        blocks.append("\n".join([*map(str.rstrip, lines), f"mean of *: {means[f'{name}/mean']:.2f}"]))
    return "\n\n".join(blocks)


def _natural(name):
    """A key to sort names by, numbers in them by their size."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def draw(results: Results, path: pathlib.Path) -> None:
    """The headlines as bars, with each evaluator's mean."""
    plt.switch_backend("agg")
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.3 * len(results)), layout="constrained")
    for name, mean in evaluators.means(results).items():
        evaluator = name.removesuffix("mean")
        of_it = {task: next(iter(metrics.values())) for task, metrics in results.items() if task.startswith(evaluator)}
        bars = axes.barh(list(of_it), list(of_it.values()), label=f"{name} {mean:.1f}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set(xlim=(0, 105), xlabel="headline metric (%)")
    axes.tick_params("y", labelsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _say(line, file=None):
    if jax.process_index() == 0:
        print(line, file=file, flush=True)


def main(_) -> None:
    if _LIST.value:
        print(evaluators.datasets.listing())
        return
    logging.getLogger().setLevel(logging.WARNING)
    runtime.enable_compile_cache()
    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    changes = {
        "eval.tasks": _TASKS.value and [_TASKS.value],
        "eval.batch_size": _BATCH_SIZE.value,
        "eval.classnames": _CLASSNAMES.value,
        "eval.templates": _TEMPLATES.value,
        "eval.mask": _MASK.value,
        "data.tfds_dir": _TFDS_DIR.value,
    }
    try:
        if not _WORKDIR.value:
            raise ValueError("--workdir must name the folder of a run, or of one of its steps")
        for path in filter(None, (_JSON.value, _CHART.value)):
            if not pathlib.Path(path).absolute().parent.is_dir():
                raise ValueError(f"{path} cannot be written: there is no such folder")
        encoder = inference.load(_WORKDIR.value, jax.devices())
        config = settings(encoder.config, changes, sharding.batch_shards(encoder.mesh))
        if not evaluators.tasks(config):
            raise ValueError("--tasks is empty, and the run has none of its own: give EVALUATOR/DATASET")
        with jax.set_mesh(encoder.mesh):
            results, errors = evaluate(encoder, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1) if jax.process_count() > 1 else sys.exit(1)
    if jax.process_index() == 0:
        if results:
            print(f"\n{table(results)}\n")
        report = {
            "model": str(checkpoint.newest(_WORKDIR.value)),
            "results": results,
            "means": evaluators.means(results),
            "errors": errors,
            "eval": dataclasses.asdict(config.eval) | {"tasks": evaluators.tasks(config)},
        }
        if _JSON.value:
            pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if _CHART.value and results:
            draw(results, pathlib.Path(_CHART.value))
        for error in errors.values():
            print(f"error: {error}", file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, or of one of its steps")
    _LIST = flags.DEFINE_bool("list", False, "Only print the data sets that tasks may name")
    _TASKS = flags.DEFINE_string("tasks", "", "EVALUATOR/DATASET,EVALUATOR/DATASET (default: the run's own)")
    _JSON = flags.DEFINE_string("json", None, "File for all metrics")
    _CHART = flags.DEFINE_string("chart", None, "File for a picture (PNG) of the headlines")
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "As config.eval.batch_size", lower_bound=1)
    _CLASSNAMES = flags.DEFINE_string("classnames", "", "As config.eval.classnames")
    _TEMPLATES = flags.DEFINE_multi_string("template", [], "As config.eval.templates, one each time")
    _MASK = flags.DEFINE_string("mask", "", "As config.eval.mask")
    _TFDS_DIR = flags.DEFINE_string("tfds_dir", "", "As config.data.tfds_dir")
    _DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several; the cluster is detected")
    _COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where no cluster is detected")
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0, with --coordinator")
    app.run(main)
