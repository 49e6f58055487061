"""Compare masks, stages, optimizers and schedules at equal time: python -m benchmarks.ablations --workdir=DIR

Trains the demo's recipe at patch 8 with one thing changed at a time, each run for as many steps as take --seconds, on
emoji or the photos in --data, tests it zero-shot, and writes docs/ablations.md. A result is a line of --results and is
not trained again; a stopped run resumes from its checkpoint. All runs of one seed come before the next seed.

The seconds per step of each program are measured once, before the first run, on a machine that should be otherwise
idle: in turn, round after round, with the input pipeline; --measure does only that, once more. The median counts.
Compiling, evaluating and saving are excluded. Another machine needs other --results.
"""

import argparse
import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import emoji_runs, own_step, pages, tradeoff
from flip_jax import config_check, inference
from flip_jax.config import Config
from flip_jax.data import emoji, token_counts, vocabulary

BATCH = 128
RECIPE = f"model.image.patch_size=8,model.text.depth=1,global_batch_size={BATCH},microbatches=1"
TUNING = "model.image.mask_ratio=0,optim.base_learning_rate=5e-4"  # a quarter of the rate, as in tradeoff.py
TEXT = "model.text.mask_ratio=0.75,model.text.mask="
COUNTS, FIFTH = "COUNTS", "FIFTH"  # stand for the file that counts all captions, and a fifth of the run's samples
# Settings that do not change the time of a step.
FREE = re.compile(r"(?:^|,)optim\.(?:base_learning_rate|schedule|cooldown_samples)=[^,]*")


class Row(NamedTuple):
    """A run: the recipe with `changes`, or stages of such shares of the time with such changes."""

    group: str
    name: str
    changes: str = ""
    stages: tuple[tuple[float, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[float, str], ...]:
        """The shares of the time, and what the recipe changes for each."""
        return self.stages or ((1.0, self.changes),)


BASE = Row("recipe", "mask 0.75 at random, Muon 2e-3, cosine")
ROWS = (
    BASE,
    Row("mask ratio", "0.5", "model.image.mask_ratio=0.5"),
    Row("mask ratio", "0", "model.image.mask_ratio=0"),
    Row("mask", "grid", "model.image.mask=grid"),
    Row("mask", "cluster", "model.image.mask=cluster"),
    Row("stages of 80 and 20 %", "mask 0.75, then 0", stages=((0.8, ""), (0.2, TUNING))),
    Row(
        "stages of 80 and 20 %",
        "32 px, then 64 px, both without mask",
        stages=((0.8, "model.image.image_size=32,model.image.mask_ratio=0"), (0.2, TUNING)),
    ),
    Row("optimizer", "AdamW 2e-3", "optim.name=adamw"),
    Row("optimizer", "AdamW 4e-3", "optim.name=adamw,optim.base_learning_rate=4e-3"),
    Row("optimizer", "LAMB 1e-2", "optim.name=lamb,optim.base_learning_rate=1e-2"),
    Row("optimizer", "LAMB 3e-2", "optim.name=lamb,optim.base_learning_rate=3e-2"),
    Row("schedule", "constant, cooldown over 20 %", f"optim.schedule=constant,optim.cooldown_samples={FIFTH}"),
    Row("average of the weights", "cosine, EMA 0.98", "optim.ema=0.98"),
    Row("average of the weights", "constant without cooldown, EMA 0.98", "optim.ema=0.98,optim.schedule=constant"),
    Row("4 of 16 tokens", "padding goes first", TEXT + "prioritised"),
    Row("4 of 16 tokens", "rare ones, counted in the batch", TEXT + "frequency"),
    Row("4 of 16 tokens", "rare ones, counted in all captions", f"{TEXT}frequency,model.text.mask_counts={COUNTS}"),
)
HEADER = """# What helps at equal time

Written by `python -m benchmarks.ablations --workdir=DIR`: the demo's recipe with 64 patches of 8 px and one text layer,
batch {batch}, one thing changed at a time. Every run has {seconds:g} s of training steps, so that a cheaper step means
more of them, and a schedule of its own length. Accuracies in percent, mean and standard deviation over seeds; "gain"
is the difference to the recipe's top-1, seed by seed.
"""
TABLE = """
Zero-shot on {what}; step times on {device}:

| what | change | ms per step | steps | top-1 | top-5 | gain | seeds |
|---|---|---|---|---|---|---|---|
"""


class Data(NamedTuple):
    """What is trained on and tested with."""

    name: str
    settings: Mapping[str, str]  # of config.data and config.eval
    task: str


def data_set(folder: str) -> Data:
    """Return the emoji, or the data set in a folder: train-*.tar and val-*.tar with captions and classes."""
    if not folder:
        return Data("emoji", {}, emoji_runs.TASK)
    path = pathlib.Path(folder).absolute()
    settings = {"data.train": f"webdataset:{path}/train-*.tar", "eval.classnames": str(path / "classes.json")}
    return Data(path.name, settings, f"zeroshot/webdataset:{path}/val-*.tar")


def program(changes: str) -> str:
    """Return the part of some changes that decides the time of a step."""
    return FREE.sub("", changes).strip(",")


def steps(row: Row, budget: float, seconds: Mapping[str, float]) -> list[int]:
    """Return as many steps for each part of a run as its share of the budget has time for."""
    return [max(1, int(share * budget / seconds[program(changes)])) for share, changes in row.parts]


def settings(row: Row, counts: Sequence[int], seed: int, data: Data, workdir: pathlib.Path) -> Config:
    """Return the settings of a run with so many steps in each part; a tenth of a part is its warm-up."""
    samples = [BATCH * count for count in counts]
    changes = row.changes.replace(FIFTH, str(samples[0] // 5))
    changes = changes.replace(COUNTS, str(counts_file(data, seed, workdir)))
    config = emoji_runs.settings(samples[0], ",".join(filter(None, (RECIPE, changes))), seed, workdir)
    values = dataclasses.asdict(config)
    values["eval"]["tasks"] = ()  # this program evaluates
    for key, value in data.settings.items():
        group, _, name = key.partition(".")
        values[group][name] = value
    values["stages"] = ";".join(
        ",".join(filter(None, (f"{length}:warmup_samples={length // 10}", part)))
        for length, (_, part) in zip(samples, row.stages, strict=False)
    )
    return config_check.from_config_dict(values)


def counts_file(data: Data, seed: int, workdir: pathlib.Path) -> pathlib.Path:
    """Return the file with the counts of all captions, by the tokenizer that runs with this seed learn."""
    return workdir / f"counts-{data.name}-{seed}.json"


def count_captions(config: Config, path: pathlib.Path) -> None:
    """Write how often each token occurs in all captions."""
    tokenizer = vocabulary.make(config)
    ids = token_counts.of(tokenizer, vocabulary.caption_sample(config, limit=10**7))
    path.write_text(token_counts.to_text(tokenizer, Counter(ids)))


def folder(row: Row, seed: int, data: Data, workdir: pathlib.Path) -> pathlib.Path:
    """Return the workdir of a run."""
    return workdir / data.name / re.sub(r"\W+", "_", f"{row.group} {row.name}") / str(seed)


def results(lines: Sequence[dict], row: Row, data: str, budget: float) -> dict[int, dict]:
    """Return the results of a row by their seeds."""
    wanted = {"result": f"{row.group}: {row.name}", "data": data, "seconds": budget}
    return {line["seed"]: line for line in lines if wanted.items() <= line.items()}


def missing(lines: Sequence[dict], seeds: int, data: str, budget: float) -> list[tuple[Row, int]]:
    """Return the runs without a result, seed by seed."""
    return [(row, seed) for seed in range(seeds) for row in ROWS if seed not in results(lines, row, data, budget)]


def step_seconds(lines: Sequence[dict], data: str) -> dict[str, float]:
    """Return the median seconds per step of each program; empty if they have not been measured."""
    measured = [line["step_seconds"] for line in lines if "step_seconds" in line and line["data"] == data]
    return {name: float(np.median(sum((one[name] for one in measured), []))) for name in (measured or [{}])[0]}


def measure(data: Data, workdir: pathlib.Path) -> dict:
    """Measure the seconds per step of each program, in turn."""
    configs = {}
    for row in ROWS:
        for _, changes in row.parts:
            alone = row._replace(changes=changes, stages=())
            configs.setdefault(program(changes), settings(alone, [1000], 0, data, workdir))
    return {"step_seconds": tradeoff.step_seconds(configs), "data": data.name, "device": own_step.device()}


def show(lines: Sequence[dict], path: pathlib.Path, budget: float) -> None:
    """Write the page with the results so far."""
    text = HEADER.format(batch=BATCH, seconds=budget)
    devices = {line["data"]: line["device"] for line in lines if "device" in line}
    for data, device in devices.items():
        found = {row: results(lines, row, data, budget) for row in ROWS}
        if not any(found.values()):
            continue
        seconds = step_seconds(lines, data)
        emoji_test = "the 1,890 classes of another vendor's drawings"
        text += TABLE.format(what=emoji_test if data == "emoji" else f"the validation images of {data}", device=device)
        for row, by_seed in found.items():
            if not by_seed:
                continue
            shared = by_seed.keys() & found[BASE].keys() if row != BASE else ()
            gains = [by_seed[seed]["top1"] - found[BASE][seed]["top1"] for seed in sorted(shared)]
            cells = (
                row.group,
                row.name,
                " / ".join(f"{1000 * seconds[program(changes)]:.0f}" for _, changes in row.parts),
                " / ".join(map(str, steps(row, budget, seconds))),
                *(pages.mean_and_spread([line[name] for line in by_seed.values()]) for name in ("top1", "top5")),
                pages.mean_and_spread(gains) if gains else "",
                str(len(by_seed)),
            )
            text += f"| {' | '.join(cells)} |\n"
    pages.write(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for the runs and the data set")
    parser.add_argument("--results", type=pathlib.Path, default="docs/ablations.jsonl", help="one line per result")
    parser.add_argument("--table", type=pathlib.Path, default="docs/ablations.md", help="the page to write")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--seconds", type=float, default=75, help="training steps of each run (default: 75)")
    parser.add_argument("--data", default="", help="folder of train-*.tar, val-*.tar and classes.json (default: emoji)")
    parser.add_argument("--measure", action="store_true", help="only measure the seconds per step, once more")
    arguments = parser.parse_args()
    workdir, data, budget = arguments.workdir.absolute(), data_set(arguments.data), arguments.seconds
    emoji.prepare(str(workdir / "data"))
    for seed in range(arguments.seeds):
        if not (path := counts_file(data, seed, workdir)).exists():
            count_captions(settings(BASE, [1000], seed, data, workdir), path)
    lines = pages.read(arguments.results)
    if arguments.measure or not step_seconds(lines, data.name):
        pages.append(arguments.results, [measure(data, workdir)])
        lines = pages.read(arguments.results)
    seconds = step_seconds(lines, data.name)
    todo = [] if arguments.measure else missing(lines, arguments.seeds, data.name, budget)
    for row, seed in tqdm(todo, desc="runs"):
        config, path = settings(row, steps(row, budget, seconds), seed, data, workdir), folder(row, seed, data, workdir)
        emoji_runs.fit(config, path)
        line = {"result": f"{row.group}: {row.name}", "data": data.name, "seconds": budget, "seed": seed}
        line |= {"samples": config.total_samples} | emoji_runs.score(inference.load(path), config, task=data.task)
        pages.append(arguments.results, [line])
        show(pages.read(arguments.results), arguments.table, budget)


if __name__ == "__main__":
    main()
