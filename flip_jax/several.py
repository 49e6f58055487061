"""The other processes of a run: how this one joins them, meets them and notices that one is lost.

Imported only by a run of several processes. They meet at JAX's coordination service: a collective could run next to a
step and lock it.
"""

import argparse
import collections
import json
import os
import re
import signal
import sys
import time
import traceback
from typing import NoReturn

import jax
import orbax.checkpoint as ocp
from jax._src import distributed

from flip_jax.runtime import UserError

# What Gloo and the coordination service write of another process that is gone.
_GONE = re.compile(r"[Gg]loo|by peer|Connection refused|heartbeat|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED")
LOST_AFTER = 60  # seconds without a heartbeat before JAX declares a process lost, names it and ends the others


def start(options: argparse.Namespace) -> None:
    """Joins the other processes, as the options of the command line say.

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
    jax.config.update("jax_enable_preemption_service", False)  # until the first step, see `watch_preemption`
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=LOST_AFTER)
    except Exception as error:  # JAX's errors depend on the cluster that it finds
        raise UserError(
            f"this process cannot join the others: {error}. --distributed detects TPU pods, SLURM and GKE; elsewhere "
            "give --coordinator, --num_processes and --process_id"
        ) from error
    # JAX aborts a process that lost another one and says so; `faulthandler` would add where each thread was.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    if jax.default_backend() == "cpu":
        # The cache serves the first process alone, and there a loaded program has its collectives in another order than
        # one that has just been compiled.
        jax.config.update("jax_enable_compilation_cache", False)


def watch_preemption() -> None:
    """Has JAX notice SIGTERM from now on, in place of our handler, and agree on a step to stop after.

    That begins with the first step, because before it a signal ends the program at once.
    """
    jax.config.update("jax_enable_preemption_service", True)
    distributed.global_state.initialize_preemption_sync_manager()


def meet(name: str) -> None:
    """Waits for all processes, without using the devices."""
    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"flip_jax/{name}", timeout=1200, processes=processes)


def gather(name: str, own: list[str]) -> list[str]:
    """Joins the lists of all processes, in each of them; `name` is used once in a run."""
    client, folder = _exchange(name, own)
    return [line for _, lines in client.key_value_dir_get(folder) for line in json.loads(lines)]


def sum_counts(name: str, own: dict[str, int]) -> dict[str, int]:
    """Sums counts over all processes, on the first one; `name` is used once in a run."""
    client, folder = _exchange(name, own)
    total: collections.Counter[str] = collections.Counter()
    if jax.process_index() == 0:
        for _, theirs in client.key_value_dir_get(folder):
            total.update(json.loads(theirs))
        client.key_value_delete(folder)
    return dict(total)


def _exchange(name, own):
    """Gives all processes what each has; returns the client and the folder of the values."""
    client, folder = ocp.multihost.get_jax_distributed_client(), f"flip_jax/{name}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(own))
    meet(name)
    return client, folder


def leave(code: int) -> NoReturn:
    """Ends this process. At a normal exit it would wait for the others, and they are waiting for it in a step."""
    if jax.process_index() == 0:
        time.sleep(1)  # what is refused in all processes is said by all, before the service in this one ends
    os._exit(code)


def say_lost(error: Exception) -> None:
    """Says what to do where another process may be lost, and waits until JAX has named it.

    An error that may have another cause keeps its trace.
    """
    index, wait, text = jax.process_index(), 2 * LOST_AFTER, str(error)
    if not _GONE.search(text):
        traceback.print_exc()
    print(
        f"error: process {index} cannot continue: {text.partition(chr(10))[0]}\n"
        f"If another process was lost, JAX names it within {wait} s. Start all processes again with the same "
        "command; training resumes from its newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(wait)
