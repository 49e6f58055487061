"""Trains FLIP: python main.py --config=configs/flip_l16.py --workdir=DIR --config.data.train=webdataset:PATTERN"""

# ruff: noqa: E402
import time

STARTED = time.perf_counter()  # before the other imports, which take seconds

import argparse
import faulthandler
import logging
import sys

from flip_jax import config_check, runtime, train


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
    parser.add_argument("--workdir", required=True, help="folder for checkpoints, metrics and reports")
    runtime.add_distributed_arguments(parser)
    own, settings = parser.parse_known_args()
    return own, [f"--config={recipe}" for recipe in own.config or ()] + settings


def main(own: argparse.Namespace, settings: list[str]) -> None:
    faulthandler.enable()
    # Libraries install a handler of their own when they are imported, which this one replaces.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("flip_jax").setLevel(logging.INFO)
    config = config_check.read_recipe(settings)
    runtime.enable_compile_cache()
    runtime.start_distributed(own)
    train.train(config, own.workdir, STARTED)


if __name__ == "__main__":
    own, settings = arguments()
    sys.exit(runtime.run(main, own, settings))
