"""The workers of `units`: processes of this machine, or actors on a Ray cluster."""

import collections
import contextlib
import glob
import itertools
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection, Pipe
from typing import Any

from flip_jax import runtime
from flip_jax.data.records import Record
from flip_jax.data.worker_process import pack, unpack  # a hostile image that took a worker over can answer only data
from flip_jax.runtime import UserError
from flip_jax.tools.source_units import Place

TOO_SLOW = 30  # processor seconds for one record, so that other work on the machine does not count
TIMEOUT = 30  # seconds for a Ray cluster to answer
AHEAD = 4  # records for each thread that are begun before their turn
# Memory stays in the process from image to image: getting its pages again takes a fifth of the time of decoding one.
HEAP = {"MALLOC_TRIM_THRESHOLD_": str(2**27), "MALLOC_MMAP_THRESHOLD_": str(2**26)}
TPU_BOUNDS = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}  # how libtpu calls the chips of a host
ENDS = "ends the worker"  # the kind of bad record at which two workers died


class Watch:
    """Passes on the records of a unit, noting which one is in work, so that one that ends the worker is known."""

    def __init__(self, mark: int | None = None, skip: Iterable[int] = (), threads: int = 1, timed: bool = False):
        self._mark, self._skip, self._threads, self._timed = mark, set(skip), threads, timed

    def __call__(
        self,
        function: Callable[[Record], Any],
        places: Iterable[Place],
        number_of: Callable[[Place], int] | None = None,
    ) -> Iterator[tuple[int, Place, Future]]:
        """Yield number, place and the result of a function of its record, in order.

        The number is counted unless a function gives it. A worker ends when a record takes more than `TOO_SLOW`
        processor seconds. With several threads it is not known which; who tries again uses one.
        """
        numbered = ((number_of(place) if number_of else i, place) for i, place in enumerate(places))
        numbered = ((number, self._checked(number, place)) for number, place in numbered)
        try:
            yield from self._ahead(function, numbered) if self._threads > 1 else self._singly(function, numbered)
        finally:
            self.rest()

    def _checked(self, number, place):
        return place._replace(record={"key": place.record["key"], "bad": ENDS}) if number in self._skip else place

    def _singly(self, function, numbered):
        for number, place in numbered:
            if self._mark is not None:
                os.pwrite(self._mark, b"%20d" % number, 0)
            self._start(TOO_SLOW)
            result = Future()
            try:
                result.set_result(function(place.record))
            except Exception as error:  # which whoever asks for the result gets
                result.set_exception(error)
            self.rest()
            yield number, place, result

    def _ahead(self, function, numbered):
        waiting = collections.deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for number, place in itertools.chain(numbered, [(None, None)] * AHEAD * self._threads):
                if place:
                    waiting.append((number, place, pool.submit(function, place.record)))
                if waiting and (not place or len(waiting) > AHEAD * self._threads):
                    self._start(TOO_SLOW * self._threads)
                    wait([waiting[0][-1]])
                    self.rest()
                    yield waiting.popleft()

    def _start(self, seconds):
        if self._timed:
            # Nothing in Python can interrupt a decoder, but the system's default for this timer's signal does.
            signal.setitimer(signal.ITIMER_PROF, seconds)

    def rest(self) -> None:
        """Stop the clock until the next record; a worker that ends now does not end because of one."""
        if self._mark is not None:
            os.ftruncate(self._mark, 0)
        if self._timed:
            signal.setitimer(signal.ITIMER_PROF, 0)


class Died(Exception):
    """Raised with the cause where a worker ended instead of answering."""


class Server:
    """Answers the requests to one worker; on Ray it is the actor."""

    def __init__(self):
        self._job, self._mark, self._threads = None, None, 1

    def answer(self, kind: str, *request: Any) -> list[Any]:
        """Return ["done", answer], or a kind of error with what describes it."""
        try:
            return ["done", getattr(self, f"_{kind}")(*request)]
        except UserError as error:
            return ["user", str(error)]
        except OSError as error:
            filename = os.fspath(error.filename) if error.filename else None
            return ["system", error.errno, error.strerror, filename, traceback.format_exc()]
        except Exception:
            return ["bug", traceback.format_exc()]

    def _open(self, job, mark, threads):
        self._threads = threads
        self._job = pickle.loads(job)
        if mark:
            with contextlib.suppress(OSError):  # the nodes of a cluster may share no folder
                self._mark = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._job.open()

    def _do(self, unit, payload, skip, careful):
        if self._mark is not None:
            os.ftruncate(self._mark, 0)
        return self._job.do(unit, payload, Watch(self._mark, skip, 1 if careful else self._threads, timed=True))


def main() -> None:
    """Serve the process at the other end of the file descriptor that is the argument, and end with it."""
    end = Connection(int(sys.argv[1]))

    def watch():
        poll = select.poll()
        poll.register(end.fileno(), 0)  # which reports nothing but the end of the other side
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    sys.exit(runtime.run(_serve, end))


def _serve(end):
    server = Server()
    with contextlib.suppress(EOFError, OSError):
        while True:
            end.send_bytes(pack(server.answer(*pickle.loads(end.recv_bytes()))))


class Process:
    """A worker process on this machine."""

    def __init__(self, job, number, alone):
        self._end, theirs = Pipe()
        # Threads of libraries would fight for the cores that other workers use.
        environment = (
            HEAP
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "OPENBLAS_NUM_THREADS": "1",
            }
        )
        if job.uses_model and not alone and (found := gpus()):
            environment |= {
                "CUDA_VISIBLE_DEVICES": found[number % len(found)],
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }
        program = f"from {__name__} import main; main()"
        self._process = subprocess.Popen(  # in a session of its own: Ctrl-C is for this process
            [sys.executable, "-P", "-c", program, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()  # so that our end notices when the process dies

    def ask(self, *request):
        try:
            self._end.send_bytes(pickle.dumps(request))
            return unpack(self._end.recv_bytes())
        except (EOFError, OSError):
            status = self.close()
            cause = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            raise Died(f"{cause}, {TOO_SLOW} s for one record" if status == -signal.SIGPROF else cause) from None

    def close(self):
        self._process.kill()  # changes nothing where it is dead
        return self._process.wait()


class Actor:
    """A worker on a Ray cluster, on any of its nodes."""

    def __init__(self, job, number, alone):
        import ray

        kind, each, _ = _resource(job)
        needs = {"num_gpus": each} if kind == "GPU" else {"resources": {"TPU": each}} if kind == "TPU" else {}
        # A host of a slice computes by itself; libtpu would wait for the others.
        alone = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS.get(each, "1,1,1")}
        variables = {"env_vars": alone if kind == "TPU" else {}}
        # Without retries by Ray: whoever asks again says which records to skip.
        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD", "runtime_env": variables}
        self._ray, self._actor = ray, ray.remote(Server).options(num_cpus=1, **needs, **options).remote()

    def ask(self, *request):
        lost = self._ray.exceptions
        try:
            return self._ray.get(self._actor.answer.remote(*request))
        except (lost.RayActorError, lost.NodeDiedError, lost.ObjectLostError) as error:
            self.close()  # it may live where its node cannot be reached
            raise Died(str(error).strip().partition("\n")[0][:200]) from None

    def close(self):
        self._ray.kill(self._actor)


def gpus() -> list[str]:
    """Return the GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; asking JAX would take them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    return sorted(path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*"))


def _resource(job):
    """Return the kind of resource that each worker of a Ray cluster needs, how many, and for how many workers.

    A model is on a GPU or on all chips of a TPU host, if the cluster has any.
    """
    import ray

    total = ray.cluster_resources()
    if job.uses_model and total.get("GPU", 0) >= 1:
        return "GPU", 1, int(total["GPU"])
    if job.uses_model and total.get("TPU", 0) >= 1:
        each = max(int(node["Resources"].get("TPU", 0)) for node in ray.nodes())
        return "TPU", each, int(total["TPU"] // each)
    return "CPU", 1, int(total.get("CPU", 0))


def connect(address: str, workers: int, job: Any) -> tuple[int, int]:
    """Join a Ray cluster. Returns the number of workers, all that it has room for unless given, and of their threads.

    Raises:
      UserError: Ray is not installed, no cluster is at the address, or it has less than was asked for.
    """
    try:
        import ray
    except ImportError:
        raise UserError('--ray needs Ray: pip install -e ".[ray]", on all nodes; without it, use --workers=N') from None
    if not ray.is_initialized():
        host, _, port = address.rpartition(":")
        try:
            if re.fullmatch(r"[^/]+:\d+", address):  # Ray itself tries for minutes
                socket.create_connection((host, int(port)), TIMEOUT).close()
            ray.init(address=address, logging_level="warning", log_to_driver=False)
        except Exception as error:  # Ray has several kinds for an address where no cluster answers
            raise UserError(
                f"--ray={address}: no Ray cluster answers ({str(error).strip().partition(chr(10))[0]}); start one with "
                "`ray start --head`, and on other machines `ray start --address=HOST:6379`"
            ) from None
    resource, _, room = _resource(job)
    if not room or workers > room:
        raise UserError(
            f"--ray={address}: it has room for {room} workers by {resource}, not {workers}: use --workers={room}"
            if room
            else f"--ray={address}: it has no {resource}, which each worker needs: add nodes that have"
        )
    workers = workers or room
    return workers, max(1, int(ray.cluster_resources()["CPU"]) // workers) if job.uses_model else 1
