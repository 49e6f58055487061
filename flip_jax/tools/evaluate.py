"""Evaluate a model on one or more tasks and print a table of the metrics.

A task is EVALUATOR/NAME, EVALUATOR/NAME=SOURCE or EVALUATOR/SOURCE, as in config.eval.tasks. A task whose data are
missing is reported with the command that prepares them, and the other tasks run; the exit code is then 1.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from flip_jax import config_check, evaluators, inference, runtime, saved_config, saved_step, sharding
from flip_jax.config import Config
from flip_jax.evaluators import datasets, known
from flip_jax.runtime import UserError
from flip_jax.tools import options

EXAMPLE = "flip evaluate --model=runs/b16 --tasks=zeroshot/imagenet,retrieval/coco --json=b16.json"
SHOWN = 10  # classes named in a line
Results = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}, the headline first


def change_settings(config: Config, changes: Mapping[str, object], shards: int) -> Config:
    """Return the run's settings with the changes of the command line and a batch that divides by the devices."""
    flat = config_check.flatten(config) | {key: value for key, value in changes.items() if value}
    flat["eval.batch_size"] = -(-flat["eval.batch_size"] // shards) * shards
    return saved_config.from_flat(flat)


class Outcome(NamedTuple):
    """What the tasks gave, by task: metrics, what became of the images, and the errors of tasks that did not run."""

    results: dict[str, dict[str, float]]
    images: dict[str, dict[str, Any]]
    errors: dict[str, str]


def evaluate(encoder: inference.Encoder, config: Config) -> Outcome:
    """Run all tasks. One that fails never ends the others; an error that is no user's mistake keeps its trace.

    Raises:
      known.Unknown: no evaluator or data set has this name.
    """
    results, images, errors = outcome = Outcome({}, {}, {})
    for task in evaluators.tasks(config):
        try:
            evaluators.find(task, config)
        except known.Unknown:
            raise
        except UserError as error:
            errors[task] = str(error)
            _say(f"skipped: {error}", sys.stderr)
    for task in evaluators.tasks(config):
        if task in errors:
            continue
        start = time.perf_counter()
        try:
            results[task], images[task] = evaluators.evaluate_and_count(encoder, task, config)
        except Exception as error:
            if jax.process_count() > 1:  # the other processes are waiting for this one in a step
                raise
            if not isinstance(error, UserError):
                traceback.print_exc()
            errors[task] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _say(f"failed: {task}: {errors[task]}", sys.stderr)
        else:
            _say(f"{datasets.shortened(task)}: {time.perf_counter() - start:,.0f} s", sys.stderr)
    return outcome


def table(results: Results, images: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a table for each evaluator: a row per task, headlines marked by a star, and their mean.

    The last column is the number of images used; lines below have those that were skipped and classes without any.
    """
    blocks, means = [], evaluators.means(results)
    for name in dict.fromkeys(task.partition("/")[0] for task in results):
        tasks = {task.partition("/")[2]: metrics for task, metrics in results.items() if task.startswith(f"{name}/")}
        columns = sorted({metric for metrics in tasks.values() for metric in metrics}, key=_natural)
        rows = [[name, *columns, "images"]]
        short = {task: datasets.shortened(task) for task in tasks}
        short = short if len(set(short.values())) == len(short) else dict(zip(tasks, tasks, strict=True))
        for task, metrics in tasks.items():
            headline = next(iter(metrics))
            cells = (f"{metrics[c]:.2f}{'*' if c == headline else ' '}" if c in metrics else "" for c in columns)
            rows.append([short[task], *cells, f"{images[f'{name}/{task}']['images']:,}"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 2)]
        lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
        notes = [f"{task}: {note}" for task in tasks for note in _notes(images[f"{name}/{task}"])]
        blocks.append("\n".join([*map(str.rstrip, lines), f"mean of *: {means[f'{name}/mean']:.2f}", *notes]))
    return "\n\n".join(blocks)


def _notes(images):
    """Yield a line for skipped images and one for classes without images."""
    if skipped := images["skipped"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
        yield f"{sum(skipped.values()):,} images skipped ({kinds})"
    if empty := images["classes_without_images"]:
        more = f" ... ({len(empty)})" if len(empty) > SHOWN else ""
        yield f"classes without images: {', '.join(empty[:SHOWN])}{more}"


def _natural(name):
    """Return a sort key that orders the numbers in names by size."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def draw(results: Results, path: pathlib.Path) -> None:
    """Draw the headlines as bars, with each evaluator's mean in the legend."""
    figure = Figure(figsize=(7, 1.5 + 0.3 * len(results)), layout="constrained")
    axes = figure.subplots()
    for name, mean in evaluators.means(results).items():
        prefix = name.removesuffix("mean")
        headlines = {task: next(iter(metrics.values())) for task, metrics in results.items() if task.startswith(prefix)}
        bars = axes.barh(list(map(datasets.shortened, headlines)), list(headlines.values()), label=f"{name} {mean:.1f}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set(xlim=(0, 105), xlabel="headline metric (%)")
    axes.tick_params("y", labelsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def _say(line, file=None):
    if jax.process_index() == 0:
        print(runtime.plain(line), file=file, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    # --model is not required, because --list needs none.
    parser.add_argument("--model", metavar="DIR", help=options.MODEL)
    parser.add_argument("--tasks", default="", help="EVALUATOR/DATASET,EVALUATOR/DATASET (default: the run's own)")
    parser.add_argument("--list", action="store_true", help="only print the data sets that tasks may name")
    parser.add_argument("--chart", metavar="FILE", help="draw the headlines to this PNG file")
    parser.add_argument(
        "--template", action="append", default=[], help="as config.eval.templates; repeat it for several"
    )
    parser.add_argument("--mask", default="", help="as config.eval.mask")
    options.add_evaluation(parser)
    runtime.add_distributed_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the tasks, print and write the metrics, and return 1 if a task could not run."""
    if arguments.list:
        print(known.listing())
        return 0
    logging.getLogger().setLevel(logging.WARNING)
    if not arguments.model:
        raise UserError(f"--model is missing: {options.MODEL}")
    for path in filter(None, (arguments.json, arguments.chart)):
        if not pathlib.Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: its folder does not exist")
    runtime.enable_compile_cache()
    runtime.start_distributed(arguments)
    changes = {
        "eval.tasks": arguments.tasks and [arguments.tasks],
        "eval.batch_size": arguments.batch_size,
        "eval.classnames": arguments.classnames,
        "eval.templates": arguments.template,
        "eval.mask": arguments.mask,
        "data.tfds_dir": arguments.tfds_dir,
    }
    encoder = inference.load(arguments.model, jax.devices())
    config = change_settings(encoder.config, changes, sharding.batch_shards(encoder.mesh))
    if not evaluators.tasks(config):
        raise UserError("--tasks is empty, and the run has no tasks of its own: give EVALUATOR/DATASET")
    with jax.set_mesh(encoder.mesh):
        outcome = evaluate(encoder, config)
    if jax.process_index() == 0:
        _report(arguments, config, *outcome)
    return 1 if outcome.errors else 0


def _report(arguments, config, results, images, errors):
    if results:
        print(f"\n{table(results, images)}\n")
    hub = arguments.model.startswith("hf://")
    report = {
        "model": arguments.model if hub else str(saved_step.newest(arguments.model)),  # not its place in a cache
        "results": results,
        "means": evaluators.means(results),
        "images": images,
        "errors": errors,
        "eval": dataclasses.asdict(config.eval) | {"tasks": evaluators.tasks(config)},
    }
    if arguments.json:
        options.write_text("--json", pathlib.Path(arguments.json), json.dumps(report, indent=1) + "\n")
    if arguments.chart and results:
        try:
            draw(results, pathlib.Path(arguments.chart))
        except (OSError, ValueError) as reason:  # a folder that cannot be written, an extension matplotlib cannot draw
            raise UserError(f"--chart {arguments.chart!r} cannot be written ({reason}): use another path") from None
    for task, error in errors.items():
        print(f"error: {error if error.startswith(task) else f'{task}: {error}'}", file=sys.stderr)
