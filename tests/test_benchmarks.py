"""The arithmetic of the benchmarks, checked against figures computed by hand."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import REPO

from benchmarks import ablations, cpu_products, input_pipeline, own_step, pages, scale, step_time, tradeoff, turns
from flip_jax import train

BASELINE = [(100.0, 10.0), (200.0, 20.0), (400.0, 30.0)]


@pytest.mark.parametrize(
    ("accuracy", "seconds"), [(10, 100), (15, 150), (20, 200), (27.5, 350), (30, 400), (30.1, None), (3, 100)]
)
def test_time_to_an_accuracy_is_interpolated_linearly(accuracy, seconds):
    assert tradeoff.time_to(BASELINE[::-1], accuracy) == seconds


def test_time_to_an_accuracy_is_its_first_crossing():
    assert tradeoff.time_to([(1.0, 0.0), (2.0, 8.0), (3.0, 4.0), (4.0, 9.0)], 6) == 1.75


def test_speed_up_is_measured_at_the_end_of_the_baseline():
    assert tradeoff.speed_up(BASELINE, [(60.0, 12.0), (120.0, 24.0), (240.0, 36.0)]) == pytest.approx(400 / 180)
    assert tradeoff.speed_up(BASELINE, [(60.0, 12.0), (120.0, 24.0)]) is None
    assert tradeoff.speed_up(BASELINE, []) is None


def test_speed_ups_of_the_means_and_of_each_seed():
    baseline = [(100.0, {0: 1.0, 1: 3.0}), (200.0, {0: 4.0, 1: 8.0})]
    masked = [(40.0, {0: 0.0, 1: 4.0}), (80.0, {0: 8.0, 1: 6.0})]
    # Means: 6 at 200 s; 2 at 40 s and 7 at 80 s, so 6 at 72 s. Seed 0: 4 at 60 s. Seed 1 never reaches 8.
    assert tradeoff.speed_ups(baseline, masked) == "2.78 (3.33, not reached)"


def test_runs_come_seed_by_seed_cheap_ones_first_and_finished_ones_never(monkeypatch):
    monkeypatch.setattr(
        tradeoff, "LENGTHS", {"mask 0": (100, 200), "mask 0.75": (200, 600), "mask 0.75, tuned": (600,)}
    )
    done = [{"result": "mask 0", "samples": 100, "seed": 0}, {"result": "mask 0.75", "samples": 600, "seed": 1}]
    assert tradeoff.missing(done, 2) == [
        ("mask 0.75", 200, 0),
        ("mask 0.75", 600, 0),
        ("mask 0", 200, 0),
        ("mask 0.75, tuned", 600, 0),  # after the run that it tunes
        ("mask 0.75", 200, 1),
        ("mask 0", 100, 1),
        ("mask 0", 200, 1),
        ("mask 0.75, tuned", 600, 1),
    ]


def test_a_tuned_run_costs_its_masked_part_and_the_tuning():
    of_sample = {"mask 0": 8.0, "mask 0.75": 2.0}
    assert tradeoff.cost("mask 0.75", 100, of_sample) == 200
    assert tradeoff.cost("mask 0.75, tuned", 100, of_sample) == 200 + 8 * tradeoff.TUNING


ROWS = {row.name: row for row in ablations.ROWS}
WHOLE, SMALL = "model.image.mask_ratio=0", "model.image.image_size=32,model.image.mask_ratio=0"
SECONDS = {"": 0.25, WHOLE: 1.0, SMALL: 0.5, "optim.ema=0.98": 0.3}


def test_runs_have_as_many_steps_as_the_same_time_allows():
    found = {name: ablations.steps(row, 75, SECONDS) for name, row in ROWS.items() if row.stages}
    assert found == {"mask 0.75, then 0": [240, 15], "32 px, then 64 px, both without mask": [120, 15]}
    assert ablations.steps(ablations.BASE, 75, SECONDS) == [300]
    assert ablations.steps(ROWS["constant, cooldown over 20 %"], 75, SECONDS) == [300]  # a schedule costs nothing
    assert ablations.steps(ROWS["constant without cooldown, EMA 0.98"], 75, SECONDS) == [250]
    assert len(ROWS) == len(ablations.ROWS)


def test_runs_at_equal_time_have_a_schedule_of_their_own_length(tmp_path):
    emoji = ablations.data_set("")
    staged = ablations.settings(ROWS["32 px, then 64 px, both without mask"], [120, 15], 1, emoji, tmp_path)
    parts = [(one.last, one.config.model.image, one.config) for one in train.plan(staged)]
    assert [(last, image.image_size, image.mask_ratio) for last, image, _ in parts] == [(120, 32, 0), (135, 64, 0)]
    assert [one.warmup_samples for *_, one in parts] == [1536, 192]
    assert [one.optim.base_learning_rate for *_, one in parts] == [2e-3, 5e-4] and staged.seed == 1
    cooled = ablations.settings(ROWS["constant, cooldown over 20 %"], [300], 0, emoji, tmp_path)
    assert (cooled.total_samples, cooled.optim.cooldown_samples, cooled.stages) == (38_400, 7_680, "")
    counted = ablations.settings(ROWS["rare ones, counted in all captions"], [300], 2, emoji, tmp_path)
    assert counted.model.text.mask_counts == str(tmp_path / "counts-emoji-2.json")
    photos = ablations.settings(ablations.BASE, [300], 0, ablations.data_set(str(tmp_path)), tmp_path)
    assert photos.data.train == f"webdataset:{tmp_path}/train-*.tar"
    assert photos.eval.classnames == f"{tmp_path}/classes.json" and not photos.eval.tasks
    for row in ablations.ROWS:  # all can be trained
        ablations.settings(row, [100] * len(row.parts), 0, emoji, tmp_path)


def test_the_gain_at_equal_time_is_seed_by_seed(tmp_path):
    def line(row, seed, top1):
        key = {"result": f"{row.group}: {row.name}", "data": "emoji", "seconds": 75, "seed": seed}
        return key | {"top1": top1, "top5": 2 * top1}

    times = {name: [seconds, seconds, 9.0] for name, seconds in SECONDS.items()}
    staged = ROWS["mask 0.75, then 0"]
    lines = [{"step_seconds": times, "data": "emoji", "device": "2 CPU cores"}]
    lines += [line(ablations.BASE, seed, top1) for seed, top1 in enumerate((10.0, 14.0, 12.0))]
    lines += [line(staged, 0, 11.0), line(staged, 2, 15.0)]
    ablations.show(lines, tmp_path / "page.md", 75)
    rows = [text.split(" | ")[2:] for text in (tmp_path / "page.md").read_text().splitlines() if " | " in text]
    assert rows[1:] == [
        ["250", "300", "12.00 ± 2.00", "24.00 ± 4.00", "", "3 |"],
        ["250 / 1000", "240 / 15", "13.00 ± 2.83", "26.00 ± 5.66", "2.00 ± 1.41", "2 |"],
    ]
    left = ablations.missing(lines, 3, "emoji", 75)
    assert len(left) == 3 * len(ROWS) - 5 and (staged, 1) in left and (staged, 0) not in left
    assert [seed for _, seed in left] == sorted(seed for _, seed in left)


def test_pages_keep_what_was_written_by_hand(tmp_path):
    path = tmp_path / "page.md"
    pages.write(path, "# Title\n\nold\n")
    path.write_text(path.read_text() + "\n## By hand\n\nstays\n\n## Also\n\nthis\n")
    pages.write(path, "# Title\n\nnew\n")
    assert path.read_text() == "# Title\n\nnew\n\n## By hand\n\nstays\n\n## Also\n\nthis\n"


def test_mean_and_spread():
    assert pages.mean_and_spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65"
    assert pages.mean_and_spread([1.0]) == "1.00"


ABOUT = {
    "device": "2 CPU cores",
    "dtype": "float32",
    "batch": 32,
    "sample_flops": {"0.0": 4e9, "0.5": 2e9},
    "product_flops": 1e9,
    "peak_flops": None,
}
SIDES = {
    ("flip_jax", ""): step_time.Measured(
        ABOUT, {"0.0": [4.0, 8.0, 4.0], "0.5": [2.0, 6.0, 1.0], "product": [0.01, 0.02, 0.04]}
    ),
    ("open_clip", ""): step_time.Measured(ABOUT, {"0.0": [2.0, 6.0, 4.0], "0.5": [], "product": [0.005, 0.004, 0.1]}),
    ("flip_jax", "unroll=True"): step_time.Measured(ABOUT | {"batch": 64}, {"0.0": [4.0, 6.0]}),
}


def test_step_times_are_medians_of_rounds_and_of_their_ratios():
    whole, half, peer, larger = step_time.summarise("vit_s16", SIDES)
    names = [(row["framework"], row["setting"], row["mask"]) for row in (whole, half, peer, larger)]
    assert names == [("flip_jax", "", 0), ("flip_jax", "", 0.5), ("open_clip", "", 0), ("flip_jax", "unroll=True", 0)]
    assert (whole["seconds"], whole["fastest"], whole["slowest"], whole["images_per_second"]) == (4, 4, 8, 8)
    assert whole["mfu"] == pytest.approx(8 * 4e9 / (1e9 / 0.02), abs=1e-4)
    assert whole["speed_of_open_clip"] == 0.75  # median of 2/4, 6/8, 4/4
    assert (half["time_of_unmasked"], half["flops_of_unmasked"], half["speed_of_open_clip"]) == (0.5, 0.5, None)
    assert peer["speed_of_open_clip"] is None
    assert (whole["product_tflops"], peer["product_tflops"]) == (0.05, 0.2)
    assert larger["speed_of_open_clip"] == 1.5  # twice the batch; median of 2/4 and 6/6


def test_a_device_of_unknown_speed_has_no_mfu(tmp_path):
    (row,) = step_time.summarise("vit_s16", {("flip_jax", ""): step_time.Measured(ABOUT, {"0.0": [2.0]})})
    assert (row["images_per_second"], row["mfu"], row["peak_tflops"]) == (16, None, None)
    step_time.write_table([row], tmp_path / "page.md")
    assert "| 16.0 | 2000 (2000 to 2000) |  | 1.00 |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_processes_share_a_cpu_but_run_in_sequence_on_an_accelerator(monkeypatch, backend):
    calls, sizes = [], []

    class Worker:
        def __init__(self, command):
            side = "own" if command[2].endswith("own_step") else "peer"
            if side == "own":
                sizes.append(command[4])
            self.side, self.masks = " ".join([side, *filter(None, command[5:6])]), command[-1]
            self.about = ABOUT | {"programs": self.masks.split(",")}
            calls.append(f"start {self.side}")

        def seconds(self, name):
            calls.append(f"{self.side} {name}")
            return 1.0

        def close(self):
            calls.append(f"close {self.side}")

    monkeypatch.setattr(turns, "Worker", Worker)
    sides = {"a": {}, "b": {}}
    for case in step_time.plan(["a", "b"], backend):
        step_time.measure(case, 0, "python", 2, sides[case.model])
    own, peer = ([f"{side} {mask}" for mask in ("0.0", "0.5", "0.75")] for side in ("own", "peer"))
    if backend == "cpu":
        assert sizes == ["0", "0"]
        turn = ["start own", "start peer", *2 * (own + peer), "close own", "close peer"]
        assert calls == 2 * turn
    else:
        assert sizes == ["0", "0", *2 * ["0", "32", "32"]]  # only another policy looks for a larger batch
        first = ["start own", *2 * own, "close own", "start peer", *2 * peer[1:2], "close peer"]
        assert calls[:24] == 2 * first
        changed = ["own remat=dots", "own attention=xla", "own unroll=True"]
        assert calls[24:48] == 2 * [x for o in changed for x in (f"start {o}", f"{o} 0.5", f"{o} 0.5", f"close {o}")]
        assert [call for call in calls[48:] if "start" not in call and "close" not in call] == 2 * [
            x for mask in ("0.0", "0.75") for x in 2 * [f"peer {mask}"]
        ]
    assert [sorted(side.times) for side in sides["a"].values()][:2] == 2 * [["0.0", "0.5", "0.75"]]
    assert all(seconds == [1, 1] for side in sides["b"].values() for seconds in side.times.values())


class CutOff:
    """A worker whose call is cut off at its second turn of mask 0.5."""

    number, turns = signal.SIGALRM, 0

    def __init__(self, command):
        flops = {"0.0": 4e9, "0.5": 2e9, "0.75": 1e9}
        self.about = ABOUT | {"peak_flops": 1e12, "sample_flops": flops, "programs": command[-1].split(",")}

    def seconds(self, name):
        self.turns += name == "0.5"
        if self.turns == 2:
            signal.raise_signal(self.number)
        return {"0.0": 4.0, "0.5": 2.0, "0.75": 1.0}[name]

    def close(self):
        pass


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_a_call_that_is_cut_off_keeps_what_it_measured(tmp_path, monkeypatch, number):
    monkeypatch.setattr(step_time, "default_backend", lambda: "gpu")
    monkeypatch.setattr(turns, "Worker", CutOff)
    monkeypatch.setattr(CutOff, "number", number)
    outputs = [f"--results={tmp_path / 'results'}", f"--table={tmp_path / 'table'}", f"--chart={tmp_path / 'a.png'}"]
    monkeypatch.setattr(sys, "argv", ["step_time", "--models=tiny", *outputs])
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGALRM, signal.SIGTERM)]
    try:
        if number == signal.SIGTERM:
            with pytest.raises(KeyboardInterrupt):
                step_time.main()
        else:
            step_time.main()
            assert "| tiny |" in (tmp_path / "table").read_text()
    finally:
        signal.alarm(0)
        for handler in handlers:
            signal.signal(*handler)
    rows = pages.read(tmp_path / "results")
    assert [(row["mask"], row["rounds"], row["seconds"]) for row in rows] == [(0, 2, 4), (0.5, 1, 2), (0.75, 1, 1)]


@pytest.mark.slow
def test_the_call_for_a_gpu_in_small(tmp_path, monkeypatch, capsys):
    """The plan for a GPU with a tiny model on the CPU; open_clip, which fails without torch, costs no other row."""
    monkeypatch.setattr(step_time, "default_backend", lambda: "gpu")
    monkeypatch.setattr(turns, "LEAST", 0)
    outputs = [f"--{name}={tmp_path / name}" for name in ("results", "table", "chart.png")]
    outputs[2] = outputs[2].replace("--chart.png", "--chart")
    peer = "--peer_python=/bin/false"
    monkeypatch.setattr(sys, "argv", ["step_time", "--models=tiny", "--batch=8", "--rounds=1", peer, *outputs])
    step_time.main()
    printed, errors = capsys.readouterr()
    rows = pages.read(tmp_path / "results")
    assert [json.loads(line) for line in printed.splitlines()] == rows
    assert [(row["setting"], row["mask"]) for row in rows] == [
        *[("", mask) for mask in (0.0, 0.5, 0.75)],
        *[(setting, 0.5) for setting in ("remat=dots", "attention=xla", "unroll=True")],
    ]
    assert all(row["images_per_second"] > 0 and row["batch"] == 8 for row in rows)
    assert errors.count("/bin/false -m benchmarks.open_clip_step") == 3


def test_step_time_page_shows_the_last_result_of_each_row(tmp_path):
    first = step_time.summarise("vit_s16", SIDES)
    again = [row | {"images_per_second": 99.0} for row in first[:1]]
    lines = step_time.newest(first + again)
    step_time.write_table(lines, tmp_path / "page.md")
    step_time.draw(lines, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    table = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| 2 CPU")]
    assert table == [
        "| 2 CPU cores | vit_s16 | 32 | flip_jax | 0 | 99.0 | 4000 (4000 to 8000) | 64% | 1.00 | 1.00 | 0.75 |",
        "| 2 CPU cores | vit_s16 | 32 | flip_jax | 0.5 | 16.0 | 2000 (1000 to 6000) | 64% | 0.50 | 0.50 |  |",
        "| 2 CPU cores | vit_s16 | 32 | open_clip | 0 | 8.0 | 4000 (2000 to 6000) | 64% | 1.00 | 1.00 |  |",
        "| 2 CPU cores | vit_s16 | 64 | flip_jax, unroll=True | 0 "
        "| 12.8 | 5000 (4000 to 6000) | 102% | 1.00 | 1.00 | 1.50 |",
    ]


def test_largest_batch_is_extrapolated_from_two():
    # 1 GB and 10 MB per row: 64 and 128 rows take 1.64 and 2.28 GB, 1,024 take 11.24 GB.
    assert own_step.largest((1_640_000_000, 2_280_000_000), 11.24e9) == 1024
    assert own_step.largest((1_640_000_000, 2_280_000_000), 11.23e9) == 512


def test_measured_models_are_those_of_the_recipes(load_recipe):
    for name in ("flip_b16", "flip_l16"):
        recipe = dataclasses.replace(load_recipe(name).model, remat="none")
        assert own_step.MODELS[name] == recipe


def test_the_step_imports_neither_the_input_pipeline_nor_recipes():
    blocked = ("grain", "ml_collections", "clu", "tensorflow_datasets", "tokenizers", "pyarrow", "simplejpeg")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import benchmarks.own_step"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_programs_take_turns_in_separate_processes():
    code = """
from benchmarks import turns
def broken(times): raise RuntimeError("no memory")
turns.LEAST = 0
turns.serve({"device": "here"}, {"good": lambda times: print("noise", times), "broken": broken})
"""
    worker = turns.Worker([sys.executable, "-c", code])
    assert worker.about == {"device": "here", "programs": ["good"]}
    assert 0 <= worker.seconds("good") < 60
    assert 0 <= worker.turn("good")[1] < 64
    worker.close()
    with pytest.raises(RuntimeError, match="ended with 3"):
        turns.Worker([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_program_does_not_outlive_a_call_that_is_cut_off_while_it_starts():
    started = []

    class Interrupted(turns.Worker):
        def _receive(self):
            started.append(self._process)
            raise TimeoutError

    with pytest.raises(TimeoutError):
        Interrupted(["sleep", "600"])
    assert started[0].returncode == -signal.SIGTERM


def test_input_pipeline_that_takes_too_long_keeps_its_lines_and_leaves_no_loader(tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport subprocess\nloader = subprocess.Popen(['sleep', '600'])\n"
        "print(loader.pid, flush=True)\nloader.wait()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(step_time, "INPUT_SECONDS", 3)
    step_time.measure_input("shards", tmp_path / "input.jsonl")
    (line,) = (tmp_path / "input.jsonl").read_text().split()
    assert capsys.readouterr().out == f"{line}\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(line), 0)


def test_results_are_read_as_they_were_appended(tmp_path):
    pages.append(tmp_path / "results.jsonl", [{"a": 1}])
    pages.append(tmp_path / "results.jsonl", [{"b": 2.5}])
    assert pages.read(tmp_path / "results.jsonl") == [{"a": 1}, {"b": 2.5}]
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == {"b": 2.5}
    assert pages.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("mlp1, gradient of input", 2 * 6304 * 384 * 1536),
        ("weighted values", 2 * 32 * 6 * 197 * 197 * 64),
        (cpu_products.ATTENTION, 6 * 2 * 32 * 6 * 197 * 197 * 64),
    ],
)
def test_products_of_a_block_count_two_operations_per_multiplication(name, flops):
    assert cpu_products.flops(name) == flops


def test_products_have_the_sizes_of_the_cpu_model():
    image = own_step.MODELS["vit_s16"].image
    tokens = 1 + (image.image_size // image.patch_size) ** 2
    assert cpu_products.PER_HEAD == (32, image.heads, tokens, image.width // image.heads)


def test_scale_page_is_continued_after_an_interruption(tmp_path):
    path, asked = tmp_path / "docs" / "scale.md", []

    def measure(recipe, topology, settings):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append((recipe, topology, settings["model.remat"], settings["mesh.fsdp"]))
        gib = {"dots": 7, "names": 3, "full": 1}[settings["model.remat"]]
        fits = settings["model.remat"] == "full"
        memory = {"peak": gib * 2**30, "limit": 2**31, "spare": 1 - gib / 2}
        result = {"devices": 8, "mask_ratio": 0.5, "memory": memory, "fits": fits, "compile_seconds": 1.0}
        result["state_bytes"] = 2**30
        bound = {"seconds": {}, "least_seconds": 0.1, "bound_by": "links", "most_mfu": 0.4, "collectives": []}
        return result | (bound if fits else {})

    with pytest.raises(KeyboardInterrupt):
        scale.write_table(path, measure)
    # "dots" needs 5 GiB too much; sharding the state of 1 GiB and its gradients can free only 2.
    tried = (("dots", 1), ("names", 1), ("names", 8), ("full", 1))
    assert asked == [("flip_l16", "v3:16x8", *step) for step in tried]
    assert "| flip_l16 | v3-256 | 8 | 0.5 | remat full | yes | 1.0 | 2.00 | 100 | links | 40% |" in path.read_text()
    path.write_text(path.read_text() + "\n## What follows\n\nstays\n")
    asked = [None] * 5
    scale.write_table(path, measure)
    assert path.read_text().endswith(" |\n\n## What follows\n\nstays\n")
    assert ("flip_l16", "v3:16x8", "dots", 1) not in asked and ("clip_b16", "v5e:16x16", "full", 1) in asked
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| flip_", "| clip_"))]
    assert len(rows) == len(scale.ROWS) == 43


def test_cores_that_a_host_needs_follow_from_the_steps_of_the_scale_page():
    page = """
| recipe | slice | devices | mask | settings | fits | GiB | of | step, ms | bound |
|---|---|---|---|---|---|---|---|---|---|
| flip_b16 | v3-256 | 256 | 0.5 | remat dots | yes | 7.1 | 15.48 | 256 | compute |
| flip_b16 | v5e-256 | 256 | 0.5 | remat dots | no | 7.1 | 15.48 | 1 | compute |
| flip_b16 | v6e-256 | 256 | 0.5 | remat dots | yes | 7.1 | 15.48 | 64 | compute |
| flip_b16 | v6e-512 | 512 | 0.5 | remat dots | yes | 7.1 | 15.48 | 64 | compute |
"""
    # v3: 65,536 images in 0.256 s on 256 devices, of which a host has eight; v6e: in 0.064 s, and a host has four.
    table = input_pipeline.cores_table(page, 900.0, 10_000.0)
    assert (
        table.splitlines()[2]
        == "| `flip_b16`, mask 0.5 | 8,000: 9 |  |  |  | 16,000: 18 (more than one process hands on) |  |"
    )
