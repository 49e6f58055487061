"""Interpolate the weights of two models of one architecture (WiSE-FT, arXiv 2109.01903) and evaluate each mixture.

A and B are folders of runs or of their steps, such as a model and the same model after fine-tuning. Alpha is the share
of B: 0 is A, 1 is B. With --out, the mixture of a single alpha is written as the folder of a step, for flip_jax.load,
every --model and config.init_from.
"""

import argparse
import fractions
import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
from matplotlib.figure import Figure

from flip_jax import config_check, evaluators, inference, lock, runtime, saved_step, sharding, weights
from flip_jax.config import Config
from flip_jax.evaluators import datasets
from flip_jax.inference import Encoder
from flip_jax.runtime import UserError
from flip_jax.tools import card, drawing, evaluate, options

EXAMPLE = "flip merge runs/b16 runs/tuned --alpha=0:1:0.1 --tasks=zeroshot/imagenet,retrieval/coco --chart=merged.png"
IGNORED = set(weights.OWN) - {"model.image.image_size"}  # settings that may differ: they change no weight
MOST = 1000  # alphas; more are a step with too many zeros
Results = Mapping[float, evaluate.Results]  # {alpha: {task: {metric: value}}}


def alphas(text: str) -> list[float]:
    """Parse "0:1:0.1", both ends included, or numbers separated by commas; each within 0 and 1."""
    try:
        if ":" in text:
            first, last, step = map(fractions.Fraction, text.split(":"))
            values = [first + i * step for i in range(min(int((last - first) / step), MOST) + 1)]
        else:
            values = [fractions.Fraction(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        values = []
    if not values or len(values) > MOST or min(values) < 0 or max(values) > 1:
        raise argparse.ArgumentTypeError(
            f"must be FIRST:LAST:STEP or numbers, within 0 and 1 and at most {MOST}, got {text!r}"
        )
    return [float(value) for value in values]


def check_alike(names: Sequence[str], encoders: Sequence[Encoder]) -> None:
    """Raise UserError, with all differences, where two models' weights do not mean the same."""
    (a, b), (first, second) = names, encoders
    ours, theirs = (
        {
            key: value
            for key, value in config_check.flatten(encoder.config).items()
            if key.startswith(("model.", "finetune.classes")) and key not in IGNORED
        }
        for encoder in encoders
    )
    differing = [f"  config.{key}: {x!r} and {y!r}" for key, x, y in saved_step.differences(ours, theirs)]
    vocabularies = [encoder.tokenizer and encoder.tokenizer.to_json() for encoder in encoders]
    if vocabularies[0] != vocabularies[1]:
        differing.append("  their tokenizers")
    if first.class_names != second.class_names:
        differing.append("  the classes that they were trained on")
    if differing:
        raise UserError(
            f"{a} and {b} cannot be merged, because they differ in\n" + "\n".join(differing) + "\n"
            "Give two models of one architecture, such as a model and what was fine-tuned from it"
        )


@jax.jit
def mixture(a, b, alpha):
    """Return (1 - alpha) a + alpha b of two trees of weights; exactly a at 0 and b at 1."""
    return jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, a, b)


def evaluate_mixtures(encoders: Sequence[Encoder], shares: Sequence[float], config: Config) -> Results:
    """Run the tasks of a config on each mixture.

    Raises:
      UserError: a task that cannot run.
    """
    results, (a, b) = {}, encoders
    with jax.set_mesh(a.mesh):
        for alpha in shares:
            print(f"alpha {alpha:g}", file=sys.stderr, flush=True)
            outcome = evaluate.evaluate(a.with_params(mixture(a.params, b.params, alpha)), config)
            if outcome.errors:
                raise UserError("\n".join(f"{task}: {error}" for task, error in outcome.errors.items()))
            results[alpha] = outcome.results
    return results


def table(results: Results) -> str:
    """Format a row per alpha: the headline of each task, and their mean."""
    tasks = list(next(iter(results.values())))
    rows = [["alpha", *map(datasets.shortened, tasks), "mean"]]
    for alpha, found in results.items():
        headlines = [next(iter(found[task].values())) for task in tasks]
        rows.append([f"{alpha:g}", *(f"{x:.2f}" for x in (*headlines, sum(headlines) / len(headlines)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def draw(results: Results, path: pathlib.Path) -> None:
    """Draw the headline of each task over alpha."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for task in next(iter(results.values())):
        values = [next(iter(found[task].values())) for found in results.values()]
        axes.plot(list(results), values, marker="o", markersize=3, label=datasets.shortened(task))
    axes.set(xlabel="alpha, the share of B", ylabel="headline metric (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.save(figure, path)


def write(out: str, encoders: Sequence[Encoder], names: Sequence[str], alpha: float) -> None:
    """Write one mixture as the folder of a step, with a model card."""
    a, b = encoders
    with lock.hold(f"{out.rstrip('/')}.lock", f"--out {out!r}"):
        try:
            weights.write(out, mixture(a.params, b.params, alpha), a.tokenizer, a.config, a.class_names)
        except OSError as error:
            raise UserError(
                f"--out {out!r} cannot be written ({error.strerror or error}): use another folder"
            ) from None
        origin = f"{1 - alpha:g} of the weights of {names[0]} and {alpha:g} of those of {names[1]}"
        card.write(out, card.describe(a.config, a.tokenizer, origin))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("a", metavar="A", help=options.MODEL)
    parser.add_argument("b", metavar="B", help="the same of the other model")
    parser.add_argument(
        "--alpha", type=alphas, default="0:1:0.1", help="FIRST:LAST:STEP or numbers separated by commas (%(default)s)"
    )
    parser.add_argument("--tasks", default="", help="as in flip evaluate (default: A's own, or none with --out)")
    parser.add_argument("--out", metavar="DIR", help="write the mixture of a single --alpha")
    parser.add_argument("--chart", metavar="FILE", help="draw the headlines over alpha to this PNG file")
    options.add_evaluation(parser)


def main(arguments: argparse.Namespace) -> None:
    """Evaluate the mixtures, print a table, and write what is asked for."""
    logging.getLogger().setLevel(logging.WARNING)
    if arguments.out and len(arguments.alpha) > 1:
        raise UserError(f"--out takes one --alpha, got {len(arguments.alpha)}: choose one, --alpha=0.5")
    for path in filter(None, (arguments.json, arguments.chart)):
        if not pathlib.Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: its folder does not exist")
    runtime.enable_compile_cache()
    names = (arguments.a, arguments.b)
    encoders = [inference.load(name, jax.devices()) for name in names]
    check_alike(names, encoders)
    changes = {
        "eval.tasks": arguments.tasks and [arguments.tasks],
        "eval.batch_size": arguments.batch_size,
        "eval.classnames": arguments.classnames,
        "data.tfds_dir": arguments.tfds_dir,
    }
    config = evaluate.change_settings(encoders[0].config, changes, sharding.batch_shards(encoders[0].mesh))
    if arguments.tasks or not arguments.out:
        if not evaluators.tasks(config):
            raise UserError("--tasks is empty, and A has no tasks of its own: give EVALUATOR/DATASET")
        _report(arguments, evaluate_mixtures(encoders, arguments.alpha, config))
    if arguments.out:
        write(arguments.out, encoders, names, arguments.alpha[0])
        print(f"{arguments.a} and {arguments.b} at {arguments.alpha[0]:g} -> {arguments.out}")


def _report(arguments, results):
    print(f"\n{table(results)}\n")
    if arguments.json:
        report = {"a": arguments.a, "b": arguments.b, "results": {f"{alpha:g}": x for alpha, x in results.items()}}
        options.write_text("--json", pathlib.Path(arguments.json), json.dumps(report, indent=1) + "\n")
    if arguments.chart:
        try:
            draw(results, pathlib.Path(arguments.chart))
        except (OSError, ValueError) as reason:  # a folder that cannot be written, an extension matplotlib cannot draw
            raise UserError(f"--chart {arguments.chart!r} cannot be written ({reason}): use another path") from None
