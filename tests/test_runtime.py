"""The one error that users see, and the one wrapper that prints it."""

import argparse
import errno
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from helpers import REPO, arguments, environment, samples, write_tar
from terminal import on_a_terminal

from flip_jax import runtime


def refuse():
    raise runtime.UserError("config.seed must be int, got 'x'; give a number")


def interrupted():
    raise KeyboardInterrupt


def test_a_refusal_is_one_message(capsys):
    assert runtime.run(refuse) == 1
    assert capsys.readouterr().err == "error: config.seed must be int, got 'x'; give a number\n"


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, OSError])
def test_a_bug_keeps_its_trace(capsys, error):
    def bug():
        raise error("of ours")

    assert runtime.run(bug) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in bug" in said and "error: " not in said


@pytest.mark.parametrize(
    ("text", "traced"),
    [
        ("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:51234\nmore", False),
        ("DEADLINE_EXCEEDED: Barrier timed out", False),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes", True),
    ],
)
def test_a_lost_process_is_said_without_a_trace(capsys, monkeypatch, text, traced):
    from flip_jax import several

    def step():
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(runtime, "_is_one_of_several", lambda: True)
    monkeypatch.setattr(several.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(several, "leave", lambda code: None)
    assert runtime.run(step) == 1
    said = capsys.readouterr().err
    assert f"error: process 0 cannot continue: {text.partition(chr(10))[0]}\n" in said
    assert ("Traceback" in said) == traced and "Start all processes again" in said


def test_a_full_disk_is_one_line(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")

    assert runtime.run(full) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 28] No space left on device: 'runs/a/metrics.jsonl'; make room")
    assert said.count("\n") == 1


def test_interruption_is_one_line(capsys):
    assert runtime.run(interrupted) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted\n"


def interrupt(command, stream, line_has, *signals, seconds=0.0):
    """Sends signals, so many seconds apart, once a line has a text; returns the exit code and the output after that."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if stream == "stderr" else subprocess.STDOUT}
    program = subprocess.Popen(command, cwd=REPO, env=environment(), text=True, **pipes)
    for line in getattr(program, stream):
        if line_has in line:
            for number in signals:
                program.send_signal(number)
                time.sleep(seconds)
            break
    rest = getattr(program, stream).read()
    return program.wait(timeout=120), rest


@pytest.mark.parametrize(
    "program", [["main.py", "--config=configs/flip_b16.py"], ["-m", "flip_jax", "report", "--model=none"]]
)
def test_interrupted_imports_are_one_line(program):
    for module in ("jax._src.config", "jax._src.core", "jax._src.numpy.lax_numpy"):
        # Python lists each module on stderr when it has been imported.
        command = [sys.executable, "-X", "importtime", *program]
        code, said = interrupt(command, "stderr", module, signal.SIGINT)
        ours = [line for line in said.splitlines() if not line.startswith("import time:")]
        assert code == 130 and ours == ["interrupted"]


def checkpoints(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_ctrl_c_saves_the_step_and_ends(shards, tmp_path):
    command = arguments(shards, tmp_path / "run", **{"total_samples": 32_000, "log.every_steps": 1})
    code, said = interrupt(command, "stdout", "step 3/", signal.SIGINT)
    assert code == 130 and "Traceback" not in said and "Fatal" not in said
    last = re.fullmatch(r"interrupted: saved step (\d+) of 1000 in .*; run the same command to resume", lines(said)[-1])
    assert last[1] in checkpoints(tmp_path / "run") and not (tmp_path / "run" / "lock").exists()


def test_ctrl_c_in_a_command_is_one_line(tmp_path):
    path, out = write_tar(tmp_path / "0.tar", samples(3000)), tmp_path / "out"
    command = [sys.executable, "-m", "flip_jax", "prepare", f"webdataset:{path}", str(out), "--shards=2"]
    code, said = on_a_terminal(command, lambda _: any((out / "work").glob("new-filter-*")))
    assert code == 130 and said.rstrip().endswith("interrupted") and "Traceback" not in said, said
    assert not (out / "lock").exists()


def lines(said):
    return said.strip().splitlines()


# A step that takes minutes, as the save waits for it; Python calls no handler while native code runs.
LONG = """
import os, signal, sys, time, threading
import jax
from flip_jax import runtime
runtime.at_end.append(lambda: os.write(1, b"lock removed\\n"))
with runtime.Termination() as termination:
    if "started" in sys.argv:
        termination.reached()
    if "signalled" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        while not termination.reached():
            time.sleep(0.01)
    print("ready", flush=True)
    jax.jit(lambda n: jax.lax.while_loop(lambda i: i < n, lambda i: i + 1, 0))(2**31 - 1).block_until_ready()
    while not termination.reached():  # the first signal of a busy machine may come later
        time.sleep(0.01)
    time.sleep(3)  # and so may the second one
    print("done", termination.reached(), termination.interrupted)
"""


@pytest.mark.parametrize(
    "words, signals, code, last",
    [
        ([], [signal.SIGINT], 130, "SIGINT before the first step: nothing new to save; run the same command to resume"),
        ([], [signal.SIGTERM], 0, "SIGTERM before the first step: nothing new to save; run the same command to resume"),
        (["started"], [signal.SIGINT] * 2, 130, "interrupted again: the run ends without saving; run the same"),
        (["started", "signalled"], [signal.SIGINT] * 2, 130, "interrupted again"),
        (["started"], [signal.SIGTERM] * 2, 0, "done True False"),
    ],
)
def test_signals_end_a_run_at_once_before_its_first_step_and_at_the_second_ctrl_c(words, signals, code, last):
    program = LONG.replace("2**31 - 1", "2**28") if last.startswith("done") else LONG
    ended, said = interrupt([sys.executable, "-c", program, *words], "stdout", "ready", *signals, seconds=0.1)
    assert ended == code and "Traceback" not in said
    assert ("lock removed" in said) == (not last.startswith("done"))
    assert any(line.startswith(last) for line in lines(said)), said


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with runtime.Interrupts(), runtime.Termination():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_results_are_exit_codes():
    assert [runtime.run(lambda code=code: code) for code in (None, 0, 3)] == [0, 0, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: --config=configs/NAME.py is missing. The recipes:"),
        (["--workdir=a", "--config=configs/flip_b16.py", "--config.seeed=1"], "did you mean config.seed?"),
    ],
)
def test_the_trainer_refuses_without_a_trace(arguments, message):
    done = subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_processes": 2, "process_id": 0}, "need --coordinator=HOST:PORT"),
        (
            {"coordinator": "host", "num_processes": 2, "process_id": 0},
            "--coordinator needs HOST:PORT.*got 'host', 2 and 0",
        ),
        ({"coordinator": "host:1", "num_processes": 2}, "got 'host:1', 2 and None"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "0 <= I < N; got 'host:1', 2 and 2"),
    ],
)
def test_options_of_several_processes_that_do_not_fit_together_are_refused(options, message):
    none = dict.fromkeys(("coordinator", "num_processes", "process_id"))
    with pytest.raises(runtime.UserError, match=message):
        runtime.start_distributed(argparse.Namespace(distributed=False, **(none | options)))


def test_only_the_warnings_about_good_checkpoints_are_dropped():
    """In a process of its own, because pytest replaces the handlers."""
    program = """
import flip_jax.checkpoint
from absl import logging
logging.warning("Metadata file does not exist: %s", "state/_CHECKPOINT_METADATA")
logging.warning("[process=%s] Skipping merge of OCDBT checkpoints: No", 0)
logging.warning("a real %s", "problem")
logging.error("Metadata file does not exist: %s", "and that is an error")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "absl" in line] == [
        "WARNING:absl:a real problem",
        "ERROR:absl:Metadata file does not exist: and that is an error",
    ]
