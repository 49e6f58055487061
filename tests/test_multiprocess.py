"""Real processes, joined by jax.distributed over gloo: as one, stopped, and killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from helpers import LOSS, REPO, arguments, environment, final_params, leaves, metrics
from terminal import on_a_terminal
from xla_options import COMPILE_FAST

from flip_jax import damage

LOST = 180  # seconds: no process waits longer for one that was killed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """The processes command(address, index) of one run, with `devices` CPU devices each; their output is in files."""

    def __init__(self, folder, count, devices, command, **env):
        address = f"127.0.0.1:{free_port()}"
        self._logs = [folder / f"process_{i}.log" for i in range(count)]
        # Without the cache of compiled programs, which the first process alone would find filled: it would run ahead.
        env = environment(devices=devices) | {"JAX_ENABLE_COMPILATION_CACHE": "false"} | env
        env["XLA_FLAGS"] += f" {COMPILE_FAST}"
        how = {"cwd": REPO, "env": env, "stderr": subprocess.STDOUT}
        self.processes = []
        for i, path in enumerate(self._logs):
            with path.open("w") as log:
                self.processes.append(subprocess.Popen(command(address, i), stdout=log, **how))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def outputs(self):
        return [path.read_text() for path in self._logs]

    def until(self, happened, seconds=900):
        """Waits for happened(); no process may end before."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self._tails()
            time.sleep(0.002)  # a save takes less than a tenth of a second

    def codes(self, seconds=900):
        """The exit codes, all within so many seconds."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"a process does not end: {self._tails()}")

    def ends_well(self):
        assert set(self.codes()) == {0}, self._tails()
        return self.outputs()

    def _tails(self):
        return "\n\n".join(text[-3000:] for text in self.outputs())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_of_eight_devices_in_all_train_as_one_device_does(alone, tmp_path, count):
    out = tmp_path / "out.npz"

    def worker(address, i):
        return [sys.executable, "tests/multiprocess_worker.py", address, str(count), str(i), str(out)]

    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    with Group(tmp_path, count, 8 // count, worker, PYTHONPATH=path) as group:
        group.ends_well()
    with np.load(out) as result:
        np.testing.assert_allclose(result["losses"], alone[0], rtol=LOSS)
        for name, expected in flatten_dict(alone[1].params, sep="/").items():
            if not name.endswith("key/bias"):  # rounding noise that Adam magnifies
                assert np.linalg.norm(result[name] - expected) <= LOSS * np.linalg.norm(expected), name


@pytest.fixture
def start(shards, tmp_path):
    """A function: starts `count` processes of a run of 24 steps in a workdir."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):  # each process needs a shard
        shutil.copy(shards / f"{i % 2:05}.tar", data / f"{i:05}.tar")

    def start(workdir, count, devices, **changes):
        workdir.mkdir(exist_ok=True)
        changes |= {"data.train": f"webdataset:{data}/*.tar", "mesh.fsdp": 2, "log.every_steps": 1}
        command = arguments(shards, workdir, **changes)

        def one(address, i):
            return [*command, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]

        return Group(workdir, count, devices, one)

    return start


def evaluation(shards):
    task = f"zeroshot/webdataset:{shards}/*.tar"
    every = {"eval.every_steps": 12, "eval.batch_size": 40}
    return {"eval.tasks": task, "eval.classnames": shards / "classes.txt", **every}


@pytest.mark.slow
def test_a_run_of_two_processes_stops_on_sigterm_resumes_and_ends(start, shards, tmp_path):
    run = tmp_path / "run"
    with start(run, 2, 4, **evaluation(shards)) as group:
        group.until(lambda: "\nstep 4/" in group.outputs()[0])
        for process in group.processes:
            process.send_signal(signal.SIGTERM)
        assert "SIGTERM: saved step" in group.ends_well()[0]
    with start(run, 2, 4, **evaluation(shards)) as group:
        first, second = group.ends_well()
    assert "resumed at step" in first and "resumed at step" in second
    assert "2 process(es)" in first and "step 24/24" in first and "step 24/24" not in second
    assert [line["step"] for line in metrics(run) if "zeroshot/mean" in line][-1] == 24
    for leaf in leaves(final_params(run)):
        assert np.isfinite(leaf).all()
    data = sorted(path.name for path in (run / "checkpoints" / "24" / "data").glob("*.json"))
    assert data == ["process_0-of-2.json", "process_1-of-2.json"]


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_of_two_processes_saves_and_ends_both(shards, tmp_path):
    command = arguments(shards, tmp_path / "run", **{"mesh.fsdp": 2, "log.every_steps": 1, "total_samples": 32_000})
    env = environment() | {"PROCESSES": "2", "PORT": str(free_port()), "PYTHON": sys.executable}
    env["XLA_FLAGS"] += f" {COMPILE_FAST}"
    code, said = on_a_terminal(["launch/local.sh", "run", *command[2:]], lambda said: "[0] step 3/" in said, env)
    assert code == 130 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    step = re.fullmatch(r"\[0\] interrupted: saved step (\d+) of 1000 in .*; run the same command to resume", last)[1]
    assert damage.problems(epath.Path(tmp_path / "run" / "checkpoints" / step)) == []
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, in_a_step, in_a_save, stages", [(2, 0, 1, "384:;384:model.image.mask_ratio=0"), (4, 2, 0, "")]
)
def test_one_is_killed_the_others_end_and_the_run_goes_on(start, shards, tmp_path, count, in_a_step, in_a_save, stages):
    """SIGKILL to one process while all train, then to another while they save; the last run ends with the same bits."""
    undisturbed, run, settings = tmp_path / "undisturbed", tmp_path / "run", evaluation(shards) | {"stages": stages}
    with start(undisturbed, count, 1, **settings) as group:
        group.ends_well()

    def saving():
        return any("tmp" in path.name for path in (run / "checkpoints").glob("[12]*"))  # from step 10 on

    for victim, moment in ((in_a_step, lambda: "\nstep 7/" in group.outputs()[0]), (in_a_save, saving)):
        with start(run, count, 1, **settings) as group:
            group.until(moment)
            group.processes[victim].kill()
            codes, outputs = group.codes(LOST), group.outputs()
        assert codes[victim] == -signal.SIGKILL and 0 not in codes
        said = "leader task was preempted" if victim == 0 else f"(stopped sending heartbeats):\n{victim}\n"
        assert all(said in outputs[i] for i in range(count) if i != victim)
    with start(run, count, 1, **settings) as group:
        outputs = group.ends_well()
    assert all("resumed at step" in output for output in outputs)
    for one, other in zip(leaves(final_params(undisturbed)), leaves(final_params(run)), strict=True):
        np.testing.assert_array_equal(one, other)
    seen = ("step", "loss", "samples_seen", "data/read", "data/used", "zeroshot/mean")
    whole, resumed = ([{name: line.get(name) for name in seen} for line in metrics(w)] for w in (undisturbed, run))
    assert whole == resumed
    assert [line["data/used"] for line in whole if line["step"] == 24][0] == 768  # of all processes
