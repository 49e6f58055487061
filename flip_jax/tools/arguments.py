"""Command-line arguments that several commands share."""

import argparse


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --model."""
    parser.add_argument("--model", required=required, metavar="DIR", help="folder of a run, or of one of its steps")


def add_tfds_dir(parser: argparse.ArgumentParser) -> None:
    """Add --tfds_dir, which is an empty string by default."""
    parser.add_argument("--tfds_dir", default="", metavar="DIR", help="as config.data.tfds_dir")
