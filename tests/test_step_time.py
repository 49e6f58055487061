"""The call that times steps: its arithmetic, its order, and that it keeps its rows when it is cut off."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import REPO

from benchmarks import own_step, pages, step_time, turns

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
