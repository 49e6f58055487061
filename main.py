"""Trains FLIP: python main.py --config=configs/flip_l16.py --config.data.train=webdataset:PATTERN"""

# ruff: noqa: E402
import time

STARTED = time.perf_counter()  # before the other imports, which take seconds

import argparse
import faulthandler
import logging
import os
import sys

from flip_jax import runtime

if __name__ == "__main__":
    runtime.Interrupts().start()

from flip_jax import config_check, train

TRY = "To try a recipe on this machine, on emoji that are drawn at first use: python main.py --config={}:runlocal"
NO_DATA = (
    "config.data.train is missing: give the image-text pairs as KIND:PATTERN, "
    "--config.data.train='webdataset:/data/pairs/{00000..00127}.tar'"
)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parses the program's own options; returns them and the rest, the recipe and its settings."""
    parser = argparse.ArgumentParser(
        description="Trains FLIP; run the same command again to resume.",
        epilog="All settings are in flip_jax/config.py. Example: python main.py --config=configs/flip_b16.py "
        "--workdir=runs/b16 --config.data.train='webdataset:/data/{00000..00127}.tar' --config.global_batch_size=4096",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", metavar="configs/NAME.py[:ARG]", help="the recipe; --config.KEY=VALUE changes it"
    )
    parser.add_argument("--workdir", help="folder for checkpoints, metrics and reports (default: runs/RECIPE)")
    runtime.add_distributed_arguments(parser)
    own, settings = parser.parse_known_args()
    return own, [f"--config={recipe}" for recipe in own.config or ()] + settings


def main(own: argparse.Namespace, settings: list[str]) -> int:
    faulthandler.enable()
    # Libraries install a handler of their own when they are imported, which this one replaces.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("flip_jax").setLevel(logging.INFO)
    if not own.config:
        from flip_jax import did_you_mean

        lines = "\n".join(f"  {path:24}{line}" for path, line in did_you_mean.recipes().items())
        missing = f"--config=configs/NAME.py is missing. The recipes:\n{lines}"
        parts = (missing, TRY.format("configs/flip_b16.py"), config_check.unknown_options(settings))
        raise runtime.UserError("\n".join(filter(None, parts)))
    config = config_check.read_recipe(settings)
    path, variants = config_check.find_recipe(own.config[0])
    workdir = os.path.expanduser(own.workdir or f"runs/{config_check.run_name(path, variants)}")
    if not config.data.train:
        from flip_jax import evaluators

        raise runtime.UserError("\n".join([NO_DATA, TRY.format(path), *evaluators.problems(config)]))
    runtime.enable_compile_cache()
    runtime.start_distributed(own)
    runtime.say(f"{path}{':' if variants else ''}{variants} -> {workdir}")
    if code := train.train(config, workdir, STARTED):
        return code
    if "runlocal" in variants.split(",") and runtime.is_alone():
        from flip_jax.tools import report

        report.local(workdir, config_check.read_recipe([f"--config={path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(runtime.run(lambda: main(*arguments())))
