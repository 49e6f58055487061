"""Measure programs in turn, each in its own process, so that a slow minute of the machine affects all of them.

Uses only the standard library, because the processes may belong to other environments.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PRODUCT = 2048  # rows and columns of the matrix product whose rate stands in for a CPU's peak
# Keep freed memory in the process: XLA allocates the buffers of every step, and page faults of new ones would take a
# tenth of the step. torch has its own cache and gains nothing.
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}
LEAST = 1.0  # seconds of a turn; shorter programs are repeated


def keep_memory() -> None:
    """Give the processes that are started from now on `HEAP`, where the environment does not differ."""
    os.environ.update(HEAP | os.environ)


class Worker:
    """A process that calls `serve`, seen from the measuring side."""

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.about = self._receive()  # what it reports once everything is compiled
        except BaseException:  # such as the end of the time: nobody else would end it, and it holds the device
            self.close()
            raise

    def seconds(self, name: str) -> float:
        """Measure one call of `name`."""
        return self.turn(name)[0]

    def turn(self, name: str) -> tuple[float, float]:
        """Return the seconds of one call of `name`, and how many cores its process kept busy."""
        print(name, file=self._process.stdin, flush=True)
        return tuple(self._receive())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _receive(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args)} ended with {self._process.wait()}")
        return json.loads(line)


def serve(about: dict[str, Any], programs: dict[str, Callable[[int], None]]) -> None:
    """Print `about` and the names of `programs`; then, for each input line with a name, a turn's seconds and cores.

    Seconds are those of one call, cores those that were busy. A program runs as often as its argument says, and returns
    when everything is done. A program whose first call raises RuntimeError, usually for lack of memory, is skipped.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' output out of the answers
    repeats = {}
    for name, program in programs.items():
        try:
            program(1)  # compiles, if that is still to be done
            start = time.perf_counter()
            program(1)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        repeats[name] = max(1, round(LEAST / (time.perf_counter() - start)))
    print(json.dumps(about | {"programs": list(repeats)}), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        start, busy = time.perf_counter(), time.process_time()
        programs[name](repeats[name])
        seconds = time.perf_counter() - start
        print(json.dumps([seconds / repeats[name], (time.process_time() - busy) / seconds]), file=answers, flush=True)
