"""Processes that read, decode and tokenize, so that the process that trains only decides what comes next.

`pipeline` shuffles, mixes and counts here as it does with threads, but on records without their bytes, and asks workers
for the rest. All bytes lie in one anonymous file in memory that the processes share and that vanishes with them:

  batches  finished arrays, which this process maps
  marks    for each worker, the record that it decodes at the moment
  tapes    for each process of a worker, the records that it read, which are freed once they are in a batch

Any request can be repeated: where a worker dies it is replaced, and asked again for what it had not answered. It keeps
samples only to save a copy; a new one makes them again from the tape.
"""

import collections
import dataclasses
import itertools
import logging
import mmap
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Pipe
from typing import Any

import numpy as np

from flip_jax.config import Config
from flip_jax.data import indexed, worker_process
from flip_jax.data.records import Pick, Record, is_last
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

TOO_SLOW = 10  # processor seconds for one record, so that other work on the machine does not count
DEATHS = 10  # of a worker, while it is asked the same
AHEAD = 2  # requests to decode that a worker has at once, so that it never waits for the next


class Workers:
    """Makes samples in worker processes, and batches in memory that they share. They start when they are first asked.

    A record that takes a worker more than `TOO_SLOW` seconds is bad, of the kind "too slow"; threads could not be
    interrupted. So is one at which two workers died, "ends the decoder".

    Raises:
      UserError: a worker cannot start, or dies again and again; what it raised itself.
    """

    def __init__(
        self,
        count: int,
        config: Config,
        tokenizer: Tokenizer | None,
        names: list[str],
        opened: list[Any],
        rows: int,
    ):
        self.look_ahead = 2 * AHEAD * count
        described: list[Any] = []
        for name, source in zip(names, opened, strict=True):
            kind, _, rest = name.partition(":")
            # Paths are listed once, and workers hold no tables in memory: they get the rows.
            described.append(None if isinstance(source, indexed.Files) else (kind, getattr(source, "paths", rest)))
        settings = {
            "config": dataclasses.asdict(config),
            "tokenizer": tokenizer.to_json() if tokenizer else None,
            "sources": described,
            "rows": rows,
            "too_slow": TOO_SLOW,
        }
        readers = sum(source.interleave for source in opened)
        self._layout = worker_process.Layout(config, rows)
        self._store = os.memfd_create("flip_jax")
        os.ftruncate(self._store, 2**62)  # pages exist once they are written
        weakref.finalize(self, os.close, self._store)
        tapes = itertools.count(1)
        channels = {"prepare": AHEAD, "put": 1, "read": -(-readers // count)}
        # Shells allow 1,024 open files, which the channels of many workers exceed.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft + 2 * count * sum(channels.values())), hard))
        self._workers = [_Worker(i, self._store, settings, channels, tapes) for i in range(count)]
        self.sources = [_Remote(source, i, self._workers) for i, source in enumerate(opened)]
        self._pool = ThreadPoolExecutor(AHEAD * count, "flip_jax-decode")
        self._put = ThreadPoolExecutor(count, "flip_jax-batch")
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers * AHEAD:
            self._free.put(worker)
        self._numbers = itertools.count()
        self._maps: list[mmap.mmap] = []
        self._unused: collections.deque[int] = collections.deque()  # the maps to which no array refers

    def prepare(self, records: list[Record]) -> Future:
        """Returns the future of each record's sample, or of the kind of a bad one."""
        return self._pool.submit(self._prepare, records)

    def _prepare(self, records):
        worker, deaths = self._free.get(), collections.Counter()
        numbers = list(itertools.islice(self._numbers, len(records)))

        def mark(status, at):
            """Marks the record at which the worker died as bad: at once if it was too slow, else the second time."""
            for i, record in enumerate(records):
                if at and record.get("at", (0,))[0] == at:
                    deaths[i] += 1
                    if status == -signal.SIGPROF or deaths[i] > 1:
                        kind = "too slow" if status == -signal.SIGPROF else "ends the decoder"
                        records[i] = {"key": record["key"], "bad": kind}

        try:
            kinds = worker.ask("prepare", numbers, records, on_death=mark)
        finally:
            self._free.put(worker)
        return [kind or made for kind, *made in zip(kinds, itertools.repeat(worker), numbers, records)]

    def stack(self, made: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch of samples. Their memory is used again once nothing refers to them."""
        if not self._unused:
            self._unused.append(len(self._maps))
            self._maps.append(mmap.mmap(self._store, self._layout.size, offset=len(self._maps) * self._layout.size))
        place, by_worker = self._unused.popleft(), collections.defaultdict(list)
        for row, (worker, number, record) in enumerate(made):
            by_worker[worker].append((row, number, record))

        def put(worker, some):
            rows, numbers, records = zip(*some, strict=True)
            if not worker.ask("put", place, rows, numbers, ()):  # it is a new process
                worker.ask("put", place, rows, numbers, records)

        list(self._put.map(put, by_worker, by_worker.values()))
        array = np.frombuffer(self._maps[place], np.uint8)
        weakref.finalize(array, self._unused.append, place).atexit = False
        return self._layout.arrays(array)

    def close(self) -> None:
        """Ends the workers; who waits for them gets an error."""
        for worker in self._workers:
            worker.close()
        self._pool.shutdown(cancel_futures=True)
        self._put.shutdown(cancel_futures=True)


class _Remote:
    """A source that workers read: records have "at", their place on a tape, instead of their bytes."""

    def __init__(self, source, number, workers):
        self._source, self._number, self._turn = source, number, itertools.cycle(workers)
        self._readers = itertools.count()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        worker, reader = next(self._turn), (self._number, next(self._readers))
        wanted = self._source.rows(picks) if isinstance(self._source, indexed.Files) else picks
        while True:
            chunk = worker.ask("read", reader, wanted, offset)
            yield from chunk
            if is_last(chunk):
                return
            offset = chunk[-1][1]


class _Worker:
    """A worker process and the channels to it; a new one replaces it when it dies."""

    def __init__(self, index, store, settings, channels, tapes):
        self._index, self._store, self._settings, self._tapes = index, store, settings, tapes
        self._lock, self._process, self._ends, self._closed = threading.Lock(), None, [], False
        self._born, self._deaths = 0, {}  # the number of the process, and how earlier ones died
        self._free = {kind: queue.SimpleQueue() for kind in channels}
        self._channels = 0
        for kind, count in channels.items():
            for _ in range(count):
                self._free[kind].put(self._channels)
                self._channels += 1

    def ask(self, kind: str, *request: Any, on_death: Callable[[int, int], None] = lambda status, at: None) -> Any:
        """Returns the answer to a request, which is repeated where the worker dies.

        `on_death` is told the exit status, and where on the tape the record lies that was being decoded, and may change
        what is asked again.
        """
        channel = self._free[kind].get()
        try:
            for _ in range(DEATHS):
                born, end = self._alive(channel)
                try:
                    end.send_bytes(worker_process.pack((kind, *request)))
                    error, answer, lines = worker_process.unpack(end.recv_bytes())
                except (EOFError, OSError):
                    status, at = self._bury(born)
                    on_death(status, at)
                    continue
                for name, level, line in lines:
                    logging.getLogger(name).log(level, "%s", line)
                if error:
                    raise UserError(answer) if error == "UserError" else RuntimeError(f"in a worker:\n{error}")
                return answer
        finally:
            self._free[kind].put(channel)
        raise UserError(
            f"config.data.workers: worker {self._index} died {DEATHS} times at one request, the last time of "
            f"{_cause(status)}; where the machine runs out of memory use fewer workers or a smaller "
            "config.data.shuffle_window, and to see where it dies use workers 0"
        )

    def _alive(self, channel):
        """Returns the number of the process and our end of a channel, after starting it where there is none."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the batches are closed")
            if not self._process:
                pairs = [Pipe() for _ in range(self._channels)]
                self._ends, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
                numbers = [end.fileno() for end in theirs]
                command = [
                    sys.executable,
                    "-P",
                    "-m",
                    worker_process.__name__,
                    *map(str, (self._store, self._index, *numbers)),
                ]
                # Threads of libraries would fight for the cores that other workers use.
                environment = os.environ | {
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                }
                self._process = subprocess.Popen(  # in a session of its own: Ctrl-C is for this process
                    command,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[self._store, *numbers],
                    start_new_session=True,
                )
                for end in theirs:
                    end.close()  # so that ours notices when the worker dies
                try:
                    self._ends[0].send_bytes(worker_process.pack(self._settings | {"tape": next(self._tapes)}))
                    self._ends[0].recv_bytes()
                except (EOFError, OSError):
                    status = self._end()
                    raise UserError(
                        f"config.data.workers: worker {self._index} did not start: {_cause(status)}; its own messages "
                        "are above. Use workers 0 to read in threads"
                    ) from None
            return self._born, self._ends[channel]

    def _bury(self, born):
        """Returns how that process ended and where; ends it if only its channel broke."""
        with self._lock:
            if born == self._born and not self._closed:
                at = int.from_bytes(os.pread(self._store, 8, worker_process.MARKS + 8 * self._index), "little")
                self._deaths[born], self._born = (self._end(), at), born + 1
                cause = _cause(self._deaths[born][0])
                _log.warning("config.data.workers: worker %d died (%s) and is replaced", self._index, cause)
            return self._deaths.get(born, (0, 0))

    def _end(self):
        process, self._process = self._process, None
        process.kill()  # changes nothing where it is dead
        return process.wait()  # our ends are closed once no thread waits at one

    def close(self):
        with self._lock:
            self._closed = True
            if self._process:
                self._end()


def _cause(status):
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
