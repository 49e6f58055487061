"""Pictures of a run: python -m flip_jax.report --workdir=DIR [--queries="red heart,dog"]

Writes loss.png, zeroshot.png and retrieval.png to DIR/report; of a fine-tuned classifier loss.png and classify.png.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from flip_jax import evaluators
from flip_jax.data import pipeline
from flip_jax.evaluators import zeroshot
from flip_jax.inference import Encoder, load

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
_QUERIES = flags.DEFINE_list("queries", None, "Texts to look pictures up by (default: eight of the class names)")
SHOWN = 8  # pictures for each query


def curve(lines: list[dict[str, float]], names: dict[str, str], ylabel: str, path: pathlib.Path) -> None:
    """Draws the metrics {name: label} over samples seen, as far as there are any."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in names.items():
        points = [(line["samples_seen"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3, label=label)
    axes.set(xlabel="samples seen", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def retrieval(encoder: Encoder, source: str, queries: Sequence[str], path: pathlib.Path) -> None:
    """A row for each query: the pictures of `source` whose embeddings are nearest, the best first."""
    images, embeddings = [], []
    for batch in pipeline.eval_dataset(source, encoder.config):
        images.append(batch["image"][batch["mask"]])
        embeddings.append(np.asarray(encoder.encode_image(batch["image"]))[batch["mask"]])
    images, embeddings = np.concatenate(images), np.concatenate(embeddings)
    nearest = np.argsort(-encoder.encode_text(queries) @ embeddings.T, axis=1)[:, :SHOWN]
    figure, grid = plt.subplots(len(queries), SHOWN, figsize=(SHOWN, 1.2 * len(queries)), squeeze=False)
    for query, ids, row in zip(queries, nearest, grid, strict=True):
        row[0].set_title(query, loc="left", fontsize=10)
        for axes in row:
            axes.axis("off")
        for index, axes in zip(ids, row, strict=False):
            axes.imshow(images[index])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(workdir: pathlib.Path, queries: Sequence[str] | None) -> None:
    """Draws the pictures of a run, and prints its last accuracy.

    Raises:
      ValueError: there is no complete checkpoint, or the data of the evaluation are not there.
      OSError: there are no metrics.
    """
    folder = workdir / "report"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    encoder = load(workdir)
    folder.mkdir(exist_ok=True)
    kind, loss = ("classify", "cross-entropy") if encoder.config.finetune.classes else ("zeroshot", "InfoNCE")
    curve(lines, {"loss": "training loss"}, loss, folder / "loss.png")
    task = next((task for task in evaluators.tasks(encoder.config) if task.startswith(f"{kind}/")), "")
    top1, top5 = f"{task}/top1", f"{task}/top5"
    result = ""
    if scores := [line for line in lines if top1 in line]:
        result = f"{kind} top-1 {scores[-1][top1]:.2f} % top-5 {scores[-1][top5]:.2f} %"
        curve(lines, {top1: "top-1", top5: "top-5"}, f"{kind} accuracy (%)", folder / f"{kind}.png")
    if kind == "zeroshot" and task:
        _, dataset = evaluators.find(task, encoder.config)
        names = dataset.classes
        queries = queries or [names[i] for i in np.linspace(0, len(names) - 1, 8).astype(int)]
        retrieval(encoder, dataset.test, queries, folder / "retrieval.png")
        result = result and zeroshot.summary(scores[-1][top1], scores[-1][top5], len(names))
    print(f"report: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    if result:
        print(result)


def main(_) -> None:
    plt.switch_backend("agg")
    try:
        report(pathlib.Path(_WORKDIR.value), _QUERIES.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
