"""Draw a run's loss and accuracy, and the evaluation images that its model ranks first for text queries.

Writes loss.png, zeroshot.png and retrieval.png to RUN/report, and prints the last accuracy; for a fine-tuned classifier
loss.png and classify.png.
"""

import argparse
import contextlib
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from flip_jax import evaluators, lock, metrics_file, saved_step, stages
from flip_jax.config import Config
from flip_jax.evaluators import datasets, zeroshot
from flip_jax.inference import Encoder, load
from flip_jax.runtime import UserError
from flip_jax.tools import drawing, options

EXAMPLE = 'flip report --model=runs/b16 --queries="red heart,dog"'

SHOWN = 8  # images per query


def curve(lines: list[dict[str, float]], names: dict[str, str], ylabel: str, path: pathlib.Path) -> None:
    """Draw the metrics {name: label} over samples seen; one that was never logged is an empty curve."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in names.items():
        points = [(line["samples_seen"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3, label=label)
    axes.set(xlabel="samples seen", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    drawing.save(figure, path)


def retrieval(encoder: Encoder, source: str, queries: Sequence[str], path: pathlib.Path) -> None:
    """Draw a row for each query: the images of `source` with the nearest embeddings, best first."""
    image_batches, embedding_batches = [], []
    for batch in datasets.batches(source, encoder.config):
        image_batches.append(batch["image"][batch["mask"]])
        embedding_batches.append(np.asarray(encoder.encode_image(batch["image"]))[batch["mask"]])
    images, embeddings = np.concatenate(image_batches), np.concatenate(embedding_batches)
    nearest = np.argsort(-encoder.encode_text(queries) @ embeddings.T, axis=1)[:, :SHOWN]
    rows = []
    for query, indices in zip(queries, nearest, strict=True):
        captions = [query] + [""] * (len(indices) - 1)
        rows.append([(caption, images[index]) for caption, index in zip(captions, indices, strict=True)])
    figure = Figure(figsize=(1.2 * SHOWN, 1.5 * len(queries)), layout="constrained")
    drawing.grid(figure, rows, SHOWN, caption_width=20)
    drawing.save(figure, path)


def report(folder: pathlib.Path, queries: Sequence[str]) -> None:
    """Draw the figures of a run, and print its last accuracy.

    Raises:
      UserError: there are no metrics or no complete checkpoint, or the evaluation's data are missing.
    """
    lines = metrics_file.read(epath.Path(folder))
    if not lines:
        raise UserError(f"{folder} holds no run (no metrics.jsonl): give the folder that was --workdir")
    encoder = load(folder)
    out = folder / "report"
    options.make_folder("--model", out)
    kind, loss = ("classify", "cross-entropy") if encoder.config.finetune.classes else ("zeroshot", "InfoNCE")
    curve(lines, {"loss": "training loss"}, loss, out / "loss.png")
    task = next((task for task in evaluators.tasks(encoder.config) if task.startswith(f"{kind}/")), "")
    top1, top5 = f"{task}/top1", f"{task}/top5"
    result = ""
    if scores := [line for line in lines if top1 in line]:
        result = f"{kind} top-1 {scores[-1][top1]:.2f} % top-5 {scores[-1][top5]:.2f} %"
        curve(lines, {top1: "top-1", top5: "top-5"}, f"{kind} accuracy (%)", out / f"{kind}.png")
    if kind == "zeroshot" and task:
        _, dataset = evaluators.find(task, encoder.config)
        names = dataset.classes
        queries = queries or [names[i] for i in np.linspace(0, len(names) - 1, 8).astype(int)]
        retrieval(encoder, dataset.test, queries, out / "retrieval.png")
        result = result and zeroshot.summary(scores[-1][top1], scores[-1][top5], len(names))
    print(f"report: {', '.join(str(path) for path in sorted(out.glob('*.png')))}")
    if result:
        print(result)


def local(workdir: str, recipe: Config) -> None:
    """Draw the report of a `:runlocal` run, and say how long its whole recipe would take on this machine.

    Nothing of both for a run that was told to stop before its end.
    """
    step = saved_step.newest(workdir)
    here, whole = stages.plan(stages.written(step)), stages.plan(recipe)
    if int(step.name) < here[-1].last:
        return
    report(pathlib.Path(workdir), [])
    lines = metrics_file.read(epath.Path(workdir))
    rates = [
        statistics.median(
            line["images_per_second"] for line in lines if len(here) == 1 or stages.place(here, line["step"]) == i
        )
        for i in range(len(here))
    ]
    if len(rates) != len(whole):
        rates = [statistics.median(rates)] * len(whole)
    days = sum(stage.config.total_samples / rate for stage, rate in zip(whole, rates, strict=True)) / 86_400
    length = (
        f"{days / 365:,.1f} years" if days > 365 else f"{days:,.1f} days" if days > 1 else f"{24 * days:,.1f} hours"
    )
    here = ", then ".join(f"{rate:,.1f}" for rate in rates)
    print(f"{here} images/s here: the whole recipe, {recipe.total_samples:,} samples, would take {length}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip report`."""
    options.add_model(parser, help="folder of the run")
    parser.add_argument(
        "--queries", default="", metavar="TEXT,...", help="texts to rank images for (default: eight class names)"
    )


def main(arguments: argparse.Namespace) -> None:
    """Run `flip report`."""
    folder, queries = pathlib.Path(arguments.model), [text for text in arguments.queries.split(",") if text]
    with lock.hold(folder / "report.lock", f"{folder}/report") if folder.is_dir() else contextlib.nullcontext():
        report(folder, queries)
