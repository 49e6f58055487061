"""Run a job unit by unit in worker processes of this machine, or on a Ray cluster.

A unit is a shard, or as many records of a source without shards. Each worker has one unit at a time, writes its own
files and answers with counts, so this process holds no records. A unit whose worker died is given to another; one that
ends every worker is named and skipped. Nothing depends on the number of workers or on the order of units, so a job that
names its files by their unit writes the same bytes with any.
"""

import argparse
import collections
import os
import pathlib
import pickle
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from tqdm import tqdm

from flip_jax import runtime
from flip_jax.runtime import UserError
from flip_jax.tools import options
from flip_jax.tools.source_units import ROWS
from flip_jax.tools.unit_workers import Actor, Died, Process, Watch, connect

RETRIES = 3  # deaths at a unit before it reached a record, and of workers that had not begun
DEATHS = 10  # at one unit altogether


class Job:
    """What is done with each unit. It is pickled for the workers, so it holds settings and no open files."""

    uses_model = False  # which is on a GPU where there is one

    def open(self) -> None:
        """Prepare a worker; called once in each."""

    def do(self, unit: Any, payload: Any, watch: Watch) -> dict[str, Any]:
        """Do a unit, and return plain data, the same whenever it is repeated; "read" counts its records."""
        raise NotImplementedError

    def payload(self, unit: Any) -> Any:
        """Return what a worker needs to know about a unit; called in the process that starts the workers."""

    def name(self, unit: Any) -> str:
        """Say which unit it is."""
        return f"unit {unit}"


class Size(NamedTuple):
    """How many workers there are, 0 for none or for as many as the Ray cluster at `ray` has room for; their threads."""

    workers: int = 0
    ray: str = ""
    threads: int = 1


HERE = Size()  # without workers


class _Death(NamedTuple):
    """Instead of an answer: what ended a worker, and the number of the record it was at, None if that is unknown."""

    cause: str
    mark: int | None


class _Deaths:
    """The deaths of workers at one unit."""

    def __init__(self):
        self.bad: set[int] = set()  # the records at which two workers died
        self._marks: list[int | None] = []

    @property
    def count(self) -> int:
        """The number of deaths."""
        return len(self._marks)

    @property
    def hopeless(self) -> bool:
        """Whether to give up the unit."""
        return self.count >= DEATHS or self._marks.count(None) >= RETRIES

    def add(self, mark: int | None) -> None:
        """Count a death, at a record if that is known."""
        if mark is not None and mark in self._marks:
            self.bad.add(mark)
        self._marks.append(mark)


class _Progress:
    """A bar of records. Units may hold any number of them, so the total is extrapolated from those that are done."""

    def __init__(self, bar: tqdm, units: int):
        self._bar, self._units, self._finished = bar, units, 0

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(runtime.plain(line), file=sys.stderr)

    def finish(self, read: int) -> None:
        """Count a unit and its records."""
        self._finished += 1
        self._bar.update(read)
        self._bar.total = round(self._bar.n / self._finished * self._units)


class Crew:
    """Workers that do units of one job; as a context manager it ends them. Without workers, units are done here.

    Workers also end with this process, however it ends.
    """

    def __init__(self, job: Job, size: Size, marks: pathlib.Path | None = None):
        """`marks` is a folder that all nodes of a cluster share, where workers note which record is in work."""
        self._job, self._kind, self._folder = job, Process, marks
        self._count, ray, self._threads = size
        self._marks: dict[int, str] = {}  # the file of each worker
        self._in_memory: list[int] = []  # descriptors of those that vanish with this process
        self._workers: dict[int, Any] = {}
        self._busy: dict[Future, tuple[int, Any]] = {}  # the number of the worker, and its unit
        self._free: collections.deque[int] = collections.deque()
        self._unborn = 0
        self._opened = False
        if ray:
            self._kind = Actor
            self._count, self._threads = connect(ray, self._count, job)
        if self._count:
            self._pickled = pickle.dumps(job)
            if ray:
                import ray as ray_lib

                self._pickled = ray_lib.put(self._pickled)

    def __enter__(self) -> "Crew":
        self._pool = ThreadPoolExecutor(max(1, self._count), "flip_jax-worker")
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers.values():
            worker.close()
        self._pool.shutdown(cancel_futures=True)
        for number in self._in_memory:
            os.close(number)

    def run(
        self,
        todo: Iterable[Any],
        done: Callable[[Any, dict[str, Any]], object],
        says: str = "",
        counted: str = " records",
        quiet: bool = False,
    ) -> dict[Any, str]:
        """Do units, and call `done` with each and its answer. Returns those that ended all workers, with the cause.

        Raises:
          UserError, OSError: a worker did, or the workers cannot begin. Other errors of a worker become RuntimeError.
        """
        todo, skipped = collections.deque(todo), {}
        deaths: dict[Any, _Deaths] = {}
        with tqdm(desc=says or None, unit=counted, mininterval=1, disable=quiet) as bar:
            progress = _Progress(bar, len(todo))
            for unit, answer in self._here(todo) if not self._count else self._by_workers(todo, deaths):
                if not isinstance(answer, _Death):
                    progress.finish(answer.get("read", 1))
                    done(unit, answer)
                    continue
                found = deaths.setdefault(unit, _Deaths())
                found.add(answer.mark)
                if found.hopeless:
                    skipped[unit] = answer.cause
                    progress.say(f"{self._job.name(unit)}: skipped: {found.count} workers died, {answer.cause}")
                    progress.finish(0)
                else:
                    progress.say(f"{self._job.name(unit)}: a worker died ({answer.cause}); another one tries")
                    todo.appendleft(unit)
        return skipped

    def _here(self, todo):
        """Do units in this process; yield each with its answer."""
        if not self._opened:
            self._job.open()
            self._opened = True
        for unit in todo:
            yield unit, self._job.do(unit, self._job.payload(unit), Watch(threads=self._threads))

    def _by_workers(self, todo, deaths):
        """Let workers do units; yield each with its answer, or with its worker's `_Death`; it may be added again."""
        while todo or any(unit is not None for _, unit in self._busy.values()):
            for number in range(min(self._count, len(todo))):
                if number not in self._workers:
                    self._hire(number)
            while todo and self._free:
                unit = todo.popleft()
                before = deaths.get(unit)
                skip = sorted(before.bad) if before else []
                # With one thread it is known at which record a worker dies.
                careful = before is not None
                self._give(self._free.popleft(), unit, "do", unit, self._job.payload(unit), skip, careful)
            for future in wait(self._busy, return_when=FIRST_COMPLETED).done:
                number, unit = self._busy.pop(future)
                try:
                    answer = self._checked(future)
                except Died as cause:
                    del self._workers[number]
                    if unit is None:
                        self._stillborn(cause)
                    else:
                        yield unit, _Death(str(cause), self._mark(number))
                    continue
                self._free.append(number)
                self._unborn = 0
                if unit is not None:
                    yield unit, answer

    def _hire(self, number):
        self._workers[number] = self._kind(self._job, number, alone=self._count == 1)
        if number not in self._marks:
            if self._kind is Process:
                self._in_memory.append(os.memfd_create("mark"))
                self._marks[number] = f"/proc/{os.getpid()}/fd/{self._in_memory[-1]}"
            else:
                self._marks[number] = os.fspath(self._folder / f"worker-{number}") if self._folder else ""
        self._give(number, None, "open", self._pickled, self._marks[number], self._threads)

    def _give(self, number, unit, *request):
        self._busy[self._pool.submit(self._workers[number].ask, *request)] = number, unit

    def _mark(self, number):
        """Return the number of the record at which a worker died, None if it is unknown."""
        try:
            return int(pathlib.Path(self._marks[number]).read_text())
        except (OSError, ValueError):
            return None

    def _stillborn(self, cause):
        self._unborn += 1
        if self._unborn >= RETRIES:
            raise UserError(
                f"--workers: {RETRIES} workers ended before they could begin, the last one of {cause}; its messages "
                "are above. Where memory runs out use fewer workers"
            )

    def _checked(self, future):
        """Return a worker's answer, or raise its error."""
        kind, *answer = future.result()
        if kind == "user":
            raise UserError(*answer)
        if kind == "system" and answer[0] in runtime.STORAGE:
            raise OSError(*answer[:3])
        if kind in ("system", "bug"):
            raise RuntimeError(f"in a worker:\n{answer[-1]}")
        return answer[0]


def add_arguments(parser: argparse.ArgumentParser, default: str = "one per core") -> None:
    """Add --workers and --ray."""
    parser.add_argument("--workers", type=options.positive, metavar="N", help=f"processes (default: {default})")
    parser.add_argument(
        "--ray", default="", metavar="auto|ADDRESS", help="workers on this Ray cluster (default: one per core of it)"
    )


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def size(arguments: argparse.Namespace, units: int) -> Size:
    """Return as many workers as asked for; or one per core, at most one per unit, with threads where cores are left.

    Raises:
      UserError: there are fewer units than were asked for.
    """
    if arguments.workers and arguments.workers > units:
        raise UserError(
            f"--workers={arguments.workers}: the source has {units} units of work, shards or {ROWS:,} records of a "
            f"source without shards, and a worker does one at a time: use at most --workers={units}"
        )
    if arguments.workers or arguments.ray:
        return Size(arguments.workers or 0, arguments.ray)
    workers = min(cores(), units)
    return Size(workers, threads=cores() // workers)
