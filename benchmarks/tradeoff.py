"""Run the paper's figure 1 at laptop size: python -m benchmarks.tradeoff --workdir=DIR [--measure]

Trains a FLIP on the embedded emoji at mask 0, 0.5 and 0.75 for several lengths each, and draws the zero-shot accuracy
on another vendor's drawings against training time. A result is a line of --results and is not trained again; a stopped
run resumes from its checkpoint. Equal runs of --ablations (docs/ablations.jsonl) are reused.

The time of a run is its number of steps times the seconds per step. --measure takes these on a machine that should be
otherwise idle: the three settings in turn, round after round, with the input pipeline. The median over all rounds of
all calls counts; if there are none, the training ends with one. Compiling, evaluating and saving are excluded.
"""

import argparse
import pathlib
import time
from collections.abc import Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from benchmarks import emoji_runs, own_step, pages
from flip_jax import inference, memory, sharding, train_step
from flip_jax.config import Config
from flip_jax.data import emoji, pipeline
from flip_jax.data.tokenizer import Tokenizer

# Masked runs are longer: a sample costs them less. An accelerator trains a larger model, and for longer.
LENGTHS = {"mask 0": (1, 2, 4, 8), "mask 0.5": (4, 8, 16), "mask 0.75": (4, 8, 16)}
LARGE = (
    ",model.image.width=384,model.image.depth=12,model.image.heads=6,model.text.width=256,model.text.depth=4"
    ",model.text.heads=4,model.embed_dim=256,model.dtype=bfloat16,model.unroll=false,optim.base_learning_rate=5e-4"
)
SIZES = {"small": ("", 6_400), "large": (LARGE, 51_200)}  # (changed settings, samples of the shortest run)
ROUNDS, TURN = 4, 4096  # rounds of a measurement, samples of a turn
PAPER = 3.7  # L/16 on LAION-400M, 256 TPU v3 cores; figure 1
HEADER = """# Accuracy against time

Written by `python -m benchmarks.tradeoff --workdir=DIR`: the paper's figure 1 with a FLIP of {width} x {depth} layers
on 64 px emoji, zero-shot on the 1,890 classes of another vendor's drawings, in percent, mean and standard deviation
over seeds. Batches of 128, 256 and 512 at mask 0, 0.5 and 0.75, as in the paper's table 1a; each length is its own run
with its own schedule. Time is the number of steps times the median step time, input pipeline included, over {rounds}
rounds in alternation on {device}: {steps}.
Compiling, evaluating and saving are not counted.

![Accuracy against time](images/tradeoff.png)

| mask | samples | seconds | top-1 | top-5 | seeds |
|---|---|---|---|---|---|
"""
SPEED_UP = """
Speed-up: the time of the longest unmasked run over the time in which a masked one reaches its accuracy, by linear
interpolation between the means; in brackets each seed by itself. The paper's {paper} is for L/16 on LAION-400M at its
baseline's best accuracy.

| mask | at top-1 | at top-5 | paper |
|---|---|---|---|
"""


def time_to(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Return when the linearly interpolated (time, accuracy) points first reach `accuracy`; None: never.

    If the first point is already beyond it, its time is returned, although a shorter run might do.
    """
    points = sorted(points)
    if points and points[0][1] >= accuracy:
        return points[0][0]
    for (start, low), (end, high) in zip(points, points[1:], strict=False):
        if high >= accuracy:
            return start + (end - start) * (accuracy - low) / (high - low)
    return None


def speed_up(baseline: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]]) -> float | None:
    """Divide the time of the baseline's last point by the time `points` need for its accuracy; None: not reached."""
    end, accuracy = max(baseline)
    needed = time_to(points, accuracy)
    return needed and end / needed


def step_seconds(settings: dict[str, Config]) -> dict[str, list[float]]:
    """Measure the seconds per training step of each run, once per round; the runs take turns."""
    mesh, loops, seconds = sharding.make_mesh(next(iter(settings.values())).mesh), {}, {run: [] for run in settings}
    with jax.set_mesh(mesh):
        for run, config in tqdm(settings.items(), desc="compiling"):
            tokenizer = Tokenizer.train(pipeline.caption_sample(config), config.model.text.vocab_size)
            batches = iter(pipeline.train_dataset(config, tokenizer, process_index=0, process_count=1))
            program = train_step.make_program(config, mesh)
            program = program._replace(step=memory.lower(program, config, mesh).compile())
            loops[run] = config.global_batch_size, batches, program, program.init()
        for turn in tqdm(range(ROUNDS + 1), desc="rounds"):
            for run, (size, batches, program, state) in loops.items():
                for step in range(TURN // size):
                    if step == pipeline.PREFETCH + 1:  # batches prefetched during other turns are used up
                        start = time.perf_counter()
                    batch = next(batches)
                    arrays = sharding.to_devices(mesh, *(batch[name] for name in program.inputs))
                    state = jax.block_until_ready(program.step(state, *arrays))[0]
                loops[run] = size, batches, program, state
                if turn:  # the first warms up
                    seconds[run].append((time.perf_counter() - start) / (TURN // size - pipeline.PREFETCH - 1))
    return seconds


def settings(size: str, run: str, samples: int, seed: int, workdir: pathlib.Path) -> Config:
    """Return the settings of one training run."""
    return emoji_runs.settings(samples, emoji_runs.MASKS[run] + SIZES[size][0], seed, workdir)


def missing(scores: list[dict], size: str, seeds: int) -> list[tuple[str, int, int]]:
    """Return (run, samples, seed) of all runs without a result: cheap ones first, those of ablations.py last."""

    def order(run: tuple[str, int, int]) -> tuple[bool, float, tuple[str, int, int]]:
        return run[1] == emoji_runs.SAMPLES, run[1] * (1 - float(run[0].removeprefix("mask "))), run

    runs = {
        (run, length * SIZES[size][1], seed)
        for run, lengths in LENGTHS.items()
        for length in lengths
        for seed in range(seeds)
    }
    return sorted(runs - {(line["result"], line["samples"], line["seed"]) for line in scores}, key=order)


def read(results: pathlib.Path, ablations: pathlib.Path, size: str) -> tuple[list[dict], list[dict]]:
    """Return all accuracies, and all measurements of step times."""
    lines = [line for line in pages.read(results) if line["size"] == size]
    scores = [line for line in lines if line["result"] in emoji_runs.MASKS]
    if size == "small":
        shared = pages.read(ablations)
        scores += [line | {"samples": emoji_runs.SAMPLES} for line in shared if line["result"] in emoji_runs.MASKS]
    return scores, [line for line in lines if line["result"] == "step seconds"]


def show(scores: list[dict], measured: list[dict], size: str, table: pathlib.Path, chart: pathlib.Path) -> None:
    """Write the table and draw the chart of the results so far, once step times are known."""
    if not (scores and measured):
        return
    seconds = {run: float(np.median([t for line in measured for t in line[run]])) for run in emoji_runs.MASKS}
    runs = {run: settings(size, run, SIZES[size][1], 0, pathlib.Path()) for run in emoji_runs.MASKS}
    image = runs["mask 0"].model.image
    text = HEADER.format(
        width=image.width,
        depth=image.depth,
        steps=", ".join(f"{1000 * seconds[run]:.0f} ms at {run}" for run in runs),
        rounds=sum(len(line["mask 0"]) for line in measured),
        device=measured[-1]["device"],
    )
    curves = {key: {run: [] for run in runs} for key in ("top1", "top5")}  # (time, {seed: accuracy})
    for run, samples in sorted({(line["result"], line["samples"]) for line in scores}):
        found = [line for line in scores if (line["result"], line["samples"]) == (run, samples)]
        trained = samples // runs[run].global_batch_size * seconds[run]
        for key, curve in curves.items():
            curve[run].append((trained, {line["seed"]: line[key] for line in found}))
        top1, top5 = (pages.mean_and_spread([line[key] for line in found]) for key in curves)
        text += f"| {run.removeprefix('mask ')} | {samples:,} | {trained:.0f} | {top1} | {top5} | {len(found)} |\n"
    if curves["top1"]["mask 0"]:
        text += SPEED_UP.format(paper=PAPER)
        for run in list(runs)[1:]:
            ratios = (speed_ups(curve["mask 0"], curve[run]) for curve in curves.values())
            text += f"| {run.removeprefix('mask ')} | {' | '.join(ratios)} | {PAPER} |\n"
    pages.write(table, text)
    draw(curves, chart)


Curve = list[tuple[float, dict[int, float]]]  # the time of a length, and the accuracy that each seed reached


def means(curve: Curve) -> list[tuple[float, float]]:
    """Return (time, mean accuracy) of each length."""
    return [(seconds, float(np.mean(list(by_seed.values())))) for seconds, by_seed in curve]


def speed_ups(baseline: Curve, masked: Curve) -> str:
    """Format the speed-up of the means, and in brackets of each seed of the longest baseline."""

    def shown(ratio: float | None) -> str:
        return "not reached" if ratio is None else f"{ratio:.2f}"

    def of_seed(curve: Curve, seed: int) -> list[tuple[float, float]]:
        return [(seconds, by_seed[seed]) for seconds, by_seed in curve if seed in by_seed]

    seeds = sorted(max(baseline, key=lambda point: point[0])[1])
    each = [shown(speed_up(of_seed(baseline, seed), of_seed(masked, seed))) for seed in seeds]
    return f"{shown(speed_up(means(baseline), means(masked)))} ({', '.join(each)})"


def draw(curves: dict[str, dict[str, Curve]], path: pathlib.Path) -> None:
    """Draw accuracy against time, a panel per metric; the dashed line is the longest unmasked run's accuracy."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (key, by_run) in zip(panels, curves.items(), strict=True):
        for run, curve in by_run.items():
            if curve:
                times, values = zip(*((seconds, list(found.values())) for seconds, found in curve), strict=True)
                spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
                label = run
                if run != "mask 0" and (ratio := speed_up(means(by_run["mask 0"]), means(curve))):
                    label += f": {ratio:.2f}x faster"
                axes.errorbar(times, [np.mean(v) for v in values], spread, marker="o", capsize=3, label=label)
        axes.axhline(max(means(by_run["mask 0"]))[1], color="grey", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", xlabel="seconds of training", ylabel=f"zero-shot {key.replace('top', 'top-')} (%)")
        axes.grid(alpha=0.3, which="both")
        axes.legend(title=f"the paper: {PAPER}x")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure(results: pathlib.Path, size: str, workdir: pathlib.Path) -> None:
    """Append a line with the seconds per step."""
    runs = {run: settings(size, run, SIZES[size][1], 0, workdir) for run in emoji_runs.MASKS}
    line = {"result": "step seconds", "size": size, "device": own_step.device()} | step_seconds(runs)
    pages.append(results, [line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for the runs and the data set")
    parser.add_argument("--results", type=pathlib.Path, default="docs/tradeoff.jsonl", help="one line per result")
    parser.add_argument("--ablations", type=pathlib.Path, default="docs/ablations.jsonl", help="those of ablations.py")
    parser.add_argument("--table", type=pathlib.Path, default="docs/tradeoff.md", help="the page to write")
    parser.add_argument("--chart", type=pathlib.Path, default="docs/images/tradeoff.png", help="the chart to draw")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--measure", action="store_true", help="only measure the time of a step")
    arguments = parser.parse_args()
    plt.switch_backend("agg")
    workdir, results = arguments.workdir.absolute(), arguments.results
    size = "small" if jax.default_backend() == "cpu" else "large"
    files = results, arguments.ablations
    emoji.prepare(str(workdir / "data"))
    if arguments.measure:
        measure(results, size, workdir)
    else:
        progress = tqdm(total=len(missing(read(*files, size)[0], size, arguments.seeds)), desc="runs")
        while todo := missing(read(*files, size)[0], size, arguments.seeds):
            run, samples, seed = todo[0]
            config = settings(size, run, samples, seed, workdir)
            path = workdir / size / run.replace(" ", "_") / str(samples) / str(seed)
            emoji_runs.fit(config, path)
            found = emoji_runs.score(inference.load(path), config)
            line = {"result": run, "size": size, "samples": samples, "seed": seed} | found
            pages.append(results, [line])
            show(*read(*files, size), size, arguments.table, arguments.chart)
            progress.update()
        if not read(*files, size)[1]:
            measure(results, size, workdir)
    show(*read(*files, size), size, arguments.table, arguments.chart)


if __name__ == "__main__":
    main()
