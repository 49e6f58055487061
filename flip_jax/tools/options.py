"""Command-line arguments that several commands share, and the checks of the paths among them."""

import argparse
import pathlib

from flip_jax.runtime import UserError

MODEL = "a run, one of its steps, a portable folder, or hf://ORG/NAME[@REVISION]"  # what a model may be given as


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def add_model(parser: argparse.ArgumentParser, help: str = MODEL) -> None:
    """Add --model, which is required."""
    parser.add_argument("--model", required=True, metavar="DIR", help=help)


def add_source(parser: argparse.ArgumentParser, out: bool = False) -> None:
    """Add SOURCE, or SOURCE and OUT, which may also be given as --source and --out; `require` checks them."""
    for name, text in (("source", "data set, KIND:REST, as in config.data.train"), ("out", "folder for the output")):
        if name == "source" or out:
            # Suppressed, so that a missing positional does not overwrite the option of the same name.
            parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, metavar=name.upper(), help=text)
            parser.add_argument(f"--{name}", metavar=name.upper(), help=f"the same as {name.upper()}")


def add_tfds_dir(parser: argparse.ArgumentParser) -> None:
    """Add --tfds_dir, which is an empty string by default."""
    parser.add_argument("--tfds_dir", default="", metavar="DIR", help="folder of TFDS data, as config.data.tfds_dir")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add what all commands take that run tasks: --json, --batch_size, --classnames and --tfds_dir."""
    parser.add_argument("--json", metavar="FILE", help="write all metrics to this file")
    parser.add_argument("--batch_size", type=positive, help="as config.eval.batch_size")
    parser.add_argument("--classnames", default="", help="as config.eval.classnames")
    add_tfds_dir(parser)


def require(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an argument that may be given in two ways and was given in neither."""
    for name in names:
        if not getattr(arguments, name):
            raise UserError(f"{name.upper()} is missing: give it as an argument or with --{name}")


def make_folder(option: str, path: pathlib.Path) -> None:
    """Create the folder that an option names; UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {str(path)!r} cannot be created ({error.strerror}): use another folder") from None


def write_text(option: str, path: pathlib.Path, text: str) -> None:
    """Write the file that an option names; UserError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {str(path)!r} cannot be written ({error.strerror}): use another path") from None
