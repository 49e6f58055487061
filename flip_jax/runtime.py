"""The process: the error that users see, its compilation cache, and the other processes of the run."""

import argparse
import errno
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Self

COMPILED = pathlib.Path.home() / ".cache" / "flip_jax" / "compiled"
# What a file system answers when it does not take a file.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
at_end: list[Callable[[], None]] = []  # what a program does before it ends on a signal


class UserError(ValueError):
    """Something that the user can put right: the message says what was given, what is allowed and the remedy."""

    exit_code = 1

    def __str__(self) -> str:
        return plain(super().__str__())


def plain(text: str) -> str:
    """Escapes what a terminal would obey: messages quote files, keys and captions that strangers wrote."""
    from flip_jax import untrusted

    return text if text.isprintable() else untrusted.plain(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Tells whether a path is in an object store or on the web (gs://, s3://, http://, ...), not on a disk."""
    return "://" in os.fspath(path)


class _LogRecord(logging.LogRecord):
    def getMessage(self):  # noqa: N802  logging's name
        return plain(super().getMessage())


def run(function: Callable[..., int | None], *arguments: Any) -> int:
    """Calls a command and returns its exit code; a `UserError` is one message, any other error keeps its trace."""
    logging.setLogRecordFactory(_LogRecord)
    try:
        return function(*arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except OSError as error:
        if error.errno not in STORAGE:
            traceback.print_exc()
        else:
            print(
                f"error: {error}; make room or give access, and run the same command again", file=sys.stderr, flush=True
            )
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except Exception as error:
        code = 1
        if _is_one_of_several() and lost_another(error):
            from flip_jax import several

            several.say_lost(error)
        else:
            traceback.print_exc()
    if _is_one_of_several():
        from flip_jax import several

        several.leave(code)
    return code


def lost_another(error: Exception) -> bool:
    """Tells whether an error, or what caused it, is one of those that JAX raises where another process is gone."""
    return any(isinstance(e, sys.modules["jax"].errors.JaxRuntimeError) for e in (error, error.__cause__))


def _is_one_of_several() -> bool:
    # Asking for the number of processes would start JAX's backend, which many commands never use.
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def enable_compile_cache() -> None:
    """Keeps programs that took over a second to compile in `COMPILED`, so that the next process loads them.

    JAX_COMPILATION_CACHE_DIR names another folder (a gs:// one serves all hosts of a pod), and
    JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(COMPILED))


def add_distributed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `start_distributed` reads."""
    group = parser.add_argument_group("one process of several")
    group.add_argument("--distributed", action="store_true", help="the cluster is detected (TPU pod, SLURM, GKE)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster is detected")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes, with --coordinator")
    group.add_argument("--process_id", type=int, metavar="I", help="this process, from 0, with --coordinator")


def start_distributed(options: argparse.Namespace) -> None:
    """Joins the other processes, if the command line says that there are any.

    Raises:
      UserError: the options do not fit together, or the other processes cannot be reached.
    """
    if options.distributed or (options.coordinator, options.num_processes, options.process_id) != (None, None, None):
        from flip_jax import several

        several.start(options)


def is_alone() -> bool:
    """Tells whether this is the only process of the run."""
    return not _is_one_of_several()


def hush_orbax() -> None:
    """Drops Orbax's warnings about good checkpoints, and its traces of failed saves; everything else is still logged.

    Call it after Orbax is imported: absl makes its logger itself.
    """
    # We read single items of a step, and Orbax looks in an item's folder for what is in the step's. Weights that one
    # process wrote need no merge.
    harmless = ("Metadata file does not exist: ", "Skipping merge of OCDBT checkpoints")
    # The error of a save is raised again where the save is waited for.
    repeated = ("_SignalingThread.run() raised", "Save Finalize thread", "Handler Commit operations")

    def keep(record: logging.LogRecord) -> bool:
        dropped = repeated if record.levelno > logging.WARNING else harmless
        return not any(text in str(record.msg) for text in dropped)

    logging.getLogger("absl").addFilter(keep)


def say(line: str) -> None:
    """Prints a line on the first process."""
    import jax

    if jax.process_index() == 0:
        print(plain(line), flush=True)


def meet(name: str) -> None:
    """Waits for all processes, without using the devices."""
    if _is_one_of_several():
        from flip_jax import several

        several.meet(name)


def gather(name: str, own: list[str]) -> list[str]:
    """Joins the lists of all processes, in each of them; `name` is used once in a run."""
    if is_alone():
        return own
    from flip_jax import several

    return several.gather(name, own)


def sum_counts(name: str, own: dict[str, int]) -> dict[str, int]:
    """Sums counts over all processes, on the first one; `name` is used once in a run."""
    if is_alone():
        return own
    from flip_jax import several

    return several.sum_counts(name, own)


class Interrupts:
    """Ends the program on Ctrl-C: at once, in one line and with no trace, even while native code compiles."""

    signals: tuple[int, ...] = (signal.SIGINT,)

    def start(self) -> Self:
        # Python's own handlers wait until native code returns. What it writes to this pipe is read by a thread.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in self.signals}
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    __enter__ = start

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self._previous)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)

    def _watch(self):
        while number := os.read(self._reader, 1):
            if number[0] in self.signals:
                self.noticed(number[0])

    def noticed(self, number: int) -> None:
        """Acts on a signal; called in a thread."""
        _end(128 + number, "interrupted")


def _end(code: int, line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")  # at once: print would write the end of the line by itself
        sys.stderr.flush()
        for function in at_end:
            function()
        sys.stdout.flush()
    finally:
        os._exit(code)


class Termination(Interrupts):
    """Notices SIGTERM and Ctrl-C without interrupting a step; with several processes, all stop after the same step.

    Before the first step there is nothing to save and the program ends at once, as it does on a second Ctrl-C.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.stopping = self.interrupted = self._signalled = False
        self._asked = 0  # how often `reached` was called

    def noticed(self, number: int) -> None:
        if not self._asked:
            name = signal.Signals(number).name
            code = 128 + number if number == signal.SIGINT else 0
            _end(code, f"{name} before the first step: nothing new to save; run the same command to resume")
        if self.interrupted and number == signal.SIGINT:
            _end(128 + number, "interrupted again: the run ends without saving; run the same command to resume")
        self._signalled, self.interrupted = True, self.interrupted or number == signal.SIGINT
        if number == signal.SIGINT:
            print("interrupted: the run stops after this step; again ends it at once", file=sys.stderr, flush=True)
            if not is_alone():
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX notices, and tells the other processes

    def reached(self) -> bool:
        """Tells whether the run is to stop here; all processes ask at the same points of a run."""
        if is_alone():
            self.stopping = self._signalled
        else:
            from jax.experimental import multihost_utils

            from flip_jax import several

            if not self._asked:
                several.watch_preemption()
            self.stopping = self.stopping or multihost_utils.reached_preemption_sync_point(self._asked)
        self._asked += 1
        return self.stopping
