"""The process: the error that users see, its compilation cache, and the other processes of the run."""

import argparse
import collections
import errno
import json
import logging
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

COMPILED = pathlib.Path.home() / ".cache" / "flip_jax" / "compiled"
# What a file system answers when it does not take a file.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
LOST_AFTER = 60  # seconds without a heartbeat before JAX declares a process lost, names it and ends the others


class UserError(ValueError):
    """Something that the user can put right: the message says what was given, what is allowed and the remedy."""

    exit_code = 1

    def __str__(self) -> str:
        return plain(super().__str__())


def plain(text: str) -> str:
    """Escapes what a terminal would obey: messages quote files, keys and captions that strangers wrote."""
    from flip_jax import untrusted

    return text if text.isprintable() else untrusted.plain(text)


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
        traceback.print_exc()
        code = 1
        if _is_one_of_several() and lost_another(error):
            index, wait = sys.modules["jax"].process_index(), 2 * LOST_AFTER
            print(
                f"error: process {index} cannot continue. If another process was lost, JAX names it within {wait} s. "
                "Start all processes again with the same command; training resumes from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(wait)
    if _is_one_of_several():
        # At a normal exit this process would wait for the others, and they are waiting for it in a step.
        os._exit(code)
    return code


def leave(code: int) -> NoReturn:
    """Ends the program. After Ctrl-C threads still work on a step, and a normal exit would take Python from them."""
    if code == 128 + signal.SIGINT:
        print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


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
    address, count, index = options.coordinator, options.num_processes, options.process_id
    if not address and (count is not None or index is not None):
        raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT, the address of process 0")
    if address and (":" not in address or count is None or index is None or not 0 <= index < count):
        raise UserError(
            "--coordinator needs HOST:PORT, --num_processes=N and --process_id=I with 0 <= I < N; got "
            f"{address!r}, {count} and {index}"
        )
    if not (options.distributed or address):
        return
    import jax

    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=LOST_AFTER)
    except Exception as error:  # JAX's errors depend on the cluster that it finds
        raise UserError(
            f"this process cannot join the others: {error}. --distributed detects TPU pods, SLURM and GKE; elsewhere "
            "give --coordinator, --num_processes and --process_id"
        ) from error


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
    import jax
    import orbax.checkpoint as ocp

    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"flip_jax/{name}", timeout=1200, processes=processes)


def sum_counts(name: str, own: dict[str, int]) -> dict[str, int]:
    """Sums counts over all processes, on the first one; `name` is used once in a run.

    The processes meet at the coordination service: a collective could run next to a step and lock it.
    """
    import jax
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return own
    client, folder = ocp.multihost.get_jax_distributed_client(), f"flip_jax/{name}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(own))
    meet(name)
    total: collections.Counter[str] = collections.Counter()
    if jax.process_index() == 0:
        for _, theirs in client.key_value_dir_get(folder):
            total.update(json.loads(theirs))
        client.key_value_delete(folder)
    return dict(total)


class Termination:
    """Notices SIGTERM without interrupting a step; with several processes, all stop after the same step."""

    def __enter__(self) -> "Termination":
        import jax

        self._signalled, self._several = False, jax.process_count() > 1
        # With several processes jax.distributed has its own handler, which a second one would replace.
        self._previous = None if self._several else signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, *_):
        self._signalled = True

    def reached(self, step: int) -> bool:
        """Tells whether the run ends after this step."""
        if self._several:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled
