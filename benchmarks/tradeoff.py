"""Run the paper's figure 1 at laptop size: python -m benchmarks.tradeoff --workdir=DIR [--measure]

Trains a FLIP on the embedded emoji at mask 0, 0.5 and 0.75 for several lengths each, all with the same batch, tunes
some of the masked ones without a mask, and draws the zero-shot accuracy on another vendor's drawings against training
time. A result is a line of --results and is not trained again; a stopped run resumes from its checkpoint. All runs of
one seed come before the next seed.

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
from flip_jax.data import emoji, pipeline, vocabulary

# Many patches and a small text tower: as in the paper, the image tower is most of the cost.
RECIPE = (
    "model.image.image_size=48,model.image.patch_size=4,model.text.depth=1,"
    "global_batch_size=128,microbatches=1,optim.name=muon,optim.base_learning_rate=2e-3"
)
MASKS = {"mask 0": 0, "mask 0.5": 0.5, "mask 0.75": 0.75}
# Unmasked tuning (the paper's section 4.2) of a run's weights, for TUNING samples.
TUNED = {"mask 0.75, tuned": "mask 0.75"}
TUNING, TUNING_RATE = 6_400, 5e-4
# Samples of each run, without the tuning.
LENGTHS = {
    "mask 0": (12_800, 38_400),
    "mask 0.5": (25_600, 51_200),
    "mask 0.75": (12_800, 25_600, 51_200),
    "mask 0.75, tuned": (25_600, 51_200),
}
NAMES = {
    "mask 0": "not masked",
    "mask 0.5": "50 % masked",
    "mask 0.75": "75 % masked",
    "mask 0.75, tuned": "75 % masked, then tuned",
}
ROUNDS, TURN = 4, 4096  # rounds of a measurement, samples of a turn
PAPER = 3.7  # L/16 on LAION-400M, 256 TPU v3 cores; figure 1
TICKS = (5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)  # seconds
HEADER = """# Accuracy against time

Written by `python -m benchmarks.tradeoff --workdir=DIR`: the paper's figure 1 with a FLIP of {width} x {depth} layers
on emoji of {pixels} px in {patches} patches, zero-shot on the 1,890 classes of another vendor's drawings, in percent,
mean and standard deviation over seeds. The batch is {batch} for every mask, as are optimizer and learning rate; each
length is its own run with its own schedule. "Tuned" adds {tuning:,} samples without a mask, from the weights of the run
of that length, at a quarter of its rate. Time is the number of steps times the median step time, input pipeline
included, over {rounds} rounds in alternation on {device}: {steps}.
Compiling, evaluating and saving are not counted.

![Accuracy against time](images/tradeoff.png)

| mask | samples | seconds | top-1 | top-5 | seeds |
|---|---|---|---|---|---|
"""
SPEED_UP = """
Speed-up: the time of the longest unmasked run over the time in which a masked one reaches its accuracy, by linear
interpolation between the means; in brackets each seed by itself. Cost: the time of an unmasked step over that of a
masked one. The paper's {paper} is for L/16 on LAION-400M at its baseline's best accuracy.

| mask | at top-1 | at top-5 | cost | paper |
|---|---|---|---|---|
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
            tokenizer = vocabulary.train(vocabulary.caption_sample(config), config.model.text.vocab_size)
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


def settings(run: str, samples: int, seed: int, workdir: pathlib.Path) -> Config:
    """Return the settings of one training run; a tuned one starts from the weights of a masked one of that length."""
    if base := TUNED.get(run):
        start = f"init_from={folder(base, samples, seed, workdir)},optim.base_learning_rate={TUNING_RATE}"
        return emoji_runs.settings(TUNING, f"{RECIPE},model.image.mask_ratio=0,{start}", seed, workdir)
    return emoji_runs.settings(samples, f"{RECIPE},model.image.mask_ratio={MASKS[run]}", seed, workdir)


def folder(run: str, samples: int, seed: int, workdir: pathlib.Path) -> pathlib.Path:
    """Return the workdir of one training run."""
    return workdir / run.replace(" ", "_").replace(",", "") / str(samples) / str(seed)


def cost(run: str, samples: int, of_sample: dict[str, float]) -> float:
    """Return what a run costs, if a sample at each mask costs `of_sample`."""
    if base := TUNED.get(run):
        return samples * of_sample[base] + TUNING * of_sample["mask 0"]
    return samples * of_sample[run]


def missing(scores: list[dict], seeds: int) -> list[tuple[str, int, int]]:
    """Return (run, samples, seed) of all runs without a result: seed by seed, cheap ones first."""
    done = {(line["result"], line["samples"], line["seed"]) for line in scores}
    runs = [(run, samples, seed) for run in LENGTHS for samples in LENGTHS[run] for seed in range(seeds)]
    visible = {run: 1 - mask for run, mask in MASKS.items()}
    return sorted(set(runs) - done, key=lambda run: (run[2], cost(*run[:2], visible), run))


def read(results: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Return all accuracies, and all measurements of step times."""
    lines = pages.read(results)
    scores = [line for line in lines if line["result"] in LENGTHS]
    return scores, [line for line in lines if line["result"] == "step seconds"]


def show(scores: list[dict], measured: list[dict], table: pathlib.Path, chart: pathlib.Path) -> None:
    """Write the table and draw the chart of the results so far, once step times are known."""
    if not (scores and measured):
        return
    seconds = {run: float(np.median([t for line in measured for t in line[run]])) for run in MASKS}
    config = settings("mask 0", LENGTHS["mask 0"][0], 0, pathlib.Path())
    image = config.model.image
    text = HEADER.format(
        width=image.width,
        depth=image.depth,
        pixels=image.image_size,
        patches=(image.image_size // image.patch_size) ** 2,
        batch=config.global_batch_size,
        tuning=TUNING,
        steps=", ".join(f"{1000 * seconds[run]:.0f} ms at {run}" for run in MASKS),
        rounds=sum(len(line["mask 0"]) for line in measured),
        device=measured[-1]["device"],
    )
    of_sample = {run: taken / config.global_batch_size for run, taken in seconds.items()}
    curves = {key: {run: [] for run in LENGTHS} for key in ("top1", "top5")}  # (time, {seed: accuracy})
    for run, samples in sorted({(line["result"], line["samples"]) for line in scores}):
        found = [line for line in scores if (line["result"], line["samples"]) == (run, samples)]
        trained = cost(run, samples, of_sample)
        for key, curve in curves.items():
            curve[run].append((trained, {line["seed"]: line[key] for line in found}))
        top1, top5 = (pages.mean_and_spread([line[key] for line in found]) for key in curves)
        text += f"| {run.removeprefix('mask ')} | {samples:,} | {trained:.0f} | {top1} | {top5} | {len(found)} |\n"
    if curves["top1"]["mask 0"]:
        text += SPEED_UP.format(paper=PAPER)
        for run in list(LENGTHS)[1:]:
            ratios = (speed_ups(curve["mask 0"], curve[run]) for curve in curves.values())
            cheaper = f"{seconds['mask 0'] / seconds[run]:.2f}" if run in MASKS else ""
            text += f"| {run.removeprefix('mask ')} | {' | '.join(ratios)} | {cheaper} | {PAPER} |\n"
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
    """Draw accuracy against time, a panel per metric; arrows show how much sooner the unmasked accuracy is reached."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, (key, by_run) in zip(panels, curves.items(), strict=True):
        for run, curve in by_run.items():
            if not curve:
                continue
            spread = [np.std(list(found.values()), ddof=1) if len(found) > 1 else 0 for _, found in curve]
            times, values = zip(*means(curve), strict=True)
            style = "--" if run in TUNED else "-"
            axes.errorbar(times, values, spread, marker="o", capsize=3, linestyle=style, label=NAMES[run])
        end, accuracy = max(means(by_run["mask 0"]), default=(0, 0))
        needed = {run: time_to(means(curve), accuracy) for run, curve in by_run.items() if run != "mask 0"}
        if reached := [seconds for seconds in needed.values() if seconds]:
            start = min(reached)
            axes.annotate("", (start, accuracy), (end, accuracy), arrowprops={"arrowstyle": "->", "linewidth": 1.5})
            label = f"{end / start:.1f}x faster (paper: {PAPER}x)"
            axes.annotate(label, ((start * end) ** 0.5, accuracy), (0, 6), textcoords="offset points", ha="center")
        axes.set(xscale="log", xlabel="training time", ylabel=f"zero-shot {key.replace('top', 'top-')} (%)")
        low, high = axes.get_xlim()
        ticks = [seconds for seconds in TICKS if low <= seconds <= high * 1.5]
        axes.set_xticks(ticks, [f"{t} s" if t < 60 else f"{t // 60} min" for t in ticks])
        axes.set_xlim(low, high)
        axes.legend(loc="upper left")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure(results: pathlib.Path, workdir: pathlib.Path) -> None:
    """Append a line with the seconds per step."""
    runs = {run: settings(run, LENGTHS[run][0], 0, workdir) for run in MASKS}
    line = {"result": "step seconds", "device": own_step.device()} | step_seconds(runs)
    pages.append(results, [line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for the runs and the data set")
    parser.add_argument("--results", type=pathlib.Path, default="docs/tradeoff.jsonl", help="one line per result")
    parser.add_argument("--table", type=pathlib.Path, default="docs/tradeoff.md", help="the page to write")
    parser.add_argument("--chart", type=pathlib.Path, default="docs/images/tradeoff.png", help="the chart to draw")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--measure", action="store_true", help="only measure the time of a step")
    arguments = parser.parse_args()
    plt.switch_backend("agg")
    workdir, results = arguments.workdir.absolute(), arguments.results
    emoji.prepare(str(workdir / "data"))
    if arguments.measure:
        measure(results, workdir)
    else:
        progress = tqdm(total=len(missing(read(results)[0], arguments.seeds)), desc="runs")
        while todo := missing(read(results)[0], arguments.seeds):
            run, samples, seed = todo[0]
            config = settings(run, samples, seed, workdir)
            path = folder(run, samples, seed, workdir)
            emoji_runs.fit(config, path)
            found = emoji_runs.score(inference.load(path), config)
            pages.append(results, [{"result": run, "samples": samples, "seed": seed} | found])
            show(*read(results), arguments.table, arguments.chart)
            progress.update()
        if not read(results)[1]:
            measure(results, workdir)
    show(*read(results), arguments.table, arguments.chart)


if __name__ == "__main__":
    main()
