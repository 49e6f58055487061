"""Trains FLIP: python main.py --config=configs/flip_l16.py --workdir=DIR --config.data.train=webdataset:PATTERN"""

# ruff: noqa: E402
import time

STARTED = time.perf_counter()  # before the other imports, which take seconds

import logging
import os
import pathlib
import re
import sys
import traceback

import jax
from absl import app, flags
from ml_collections import config_flags

import flip_jax
from flip_jax import config_check, runtime, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py[:key=value,...]", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and reports", required=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process of several; the cluster is detected (TPU pod, SLURM)"
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where no cluster is detected")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0, with --coordinator")

LOST_AFTER = 60  # seconds without a heartbeat, at which JAX takes a process for lost, names it and ends the others


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("flip_jax").setLevel(logging.INFO)
    runtime.enable_compile_cache()
    if _DISTRIBUTED.value or _COORDINATOR.value:
        jax.distributed.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, heartbeat_timeout_seconds=LOST_AFTER
        )
    try:
        train.train(config_check.from_config_dict(_CONFIG.value), _WORKDIR.value, STARTED)
    except Exception as error:
        # What this package refuses, or a file is to blame for, says all there is to say; other errors keep their trace.
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = last.startswith(str(pathlib.Path(flip_jax.__file__).parent))
        refused = ours and isinstance(error, ValueError | FloatingPointError)
        if refused or (isinstance(error, OSError) and error.filename):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if jax.process_count() > 1:
            # At a normal exit this process would wait for the others, and they are waiting for it in a step.
            if isinstance(error, jax.errors.JaxRuntimeError):
                print(
                    f"error: process {jax.process_index()} cannot go on. If that is because another was lost, JAX says "
                    f"which one within {2 * LOST_AFTER} s; start all of them again with the same command, and they go "
                    f"on from the newest checkpoint in {_WORKDIR.value}",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(2 * LOST_AFTER)
            os._exit(1)
        sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Flags as absl reads them; a recipe or a setting that does not exist is one clear error."""
    try:
        rest = app.parse_flags_with_usage(argv)
        _CONFIG.value.lock()  # a recipe that could not be read says so at its first use
        return rest
    except (KeyError, AttributeError, OSError) as error:
        keys = re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE)
        reason = next(filter(None, map(config_check.unknown, keys)), " ".join(str(error.args[0]).split()))
        sys.exit(f"error: --config: {reason} (flip_jax/config.py has all settings)")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
