"""The one error that users see, and the one wrapper that prints it."""

import argparse
import errno
import signal
import subprocess
import sys

import pytest
from helpers import REPO, arguments, environment

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


def interrupt(command, stream, line_has):
    """Sends Ctrl-C once a line of the program's output has a text; returns the exit code and what it said after it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if stream == "stderr" else subprocess.STDOUT}
    program = subprocess.Popen(command, cwd=REPO, env=environment(), text=True, **pipes)
    for line in getattr(program, stream):
        if line_has in line:
            program.send_signal(signal.SIGINT)
            break
    rest = getattr(program, stream).read()
    return program.wait(timeout=120), rest


@pytest.mark.parametrize(
    "program", [["main.py", "--config=configs/flip_b16.py"], ["-m", "flip_jax", "report", "--model=none"]]
)
def test_interrupted_imports_are_one_line(program):
    code = 1
    for module in ("jax._src.config", "jax._src.core", "jax._src.numpy.lax_numpy"):
        # Python loses a signal that arrives in a callback of its garbage collector; the program then ends in an error.
        if code == 1:
            # Python lists each module on stderr when it has been imported.
            code, said = interrupt([sys.executable, "-X", "importtime", *program], "stderr", module)
    ours = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert code == 130 and ours == ["interrupted"]


def test_an_interrupted_run_ends_with_one_line(shards, tmp_path):
    command = arguments(shards, tmp_path / "run", **{"total_samples": 32_000, "log.every_steps": 1})
    code, said = interrupt(command, "stdout", "step 3/")
    assert code == 130 and said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said and "Fatal" not in said


def test_results_are_exit_codes():
    assert [runtime.run(lambda code=code: code) for code in (None, 0, 3)] == [0, 0, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: --config=configs/NAME.py is missing. The recipes:"),
        (["--workdir=a"], "error: --config=configs/NAME.py is missing"),
        (["--workdir=a", "--config=configs/flip_b16.py", "--config.seeed=1"], "did you mean config.seed?"),
        (["--workdir={file}/a", "--config=configs/flip_b16.py:runlocal"], "--workdir"),
    ],
)
def test_the_trainer_refuses_without_a_trace(arguments, message, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    arguments = [argument.replace("{file}", str(file)) for argument in arguments]
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
