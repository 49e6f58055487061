"""The command line `flip NAME ...`: finds the command, parses its arguments and runs it."""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import flip_jax
from flip_jax import runtime
from flip_jax.tools import COMMANDS

ON_CPU = ("card", "check", "convert", "push")  # these only move arrays, so they leave accelerators to others
QUOTES = "put values with {...} or * in quotes, because the shell expands them"


class Parser(argparse.ArgumentParser):
    """A parser that takes options by their full names only, and each of them once."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.given: set[str] = set()
        self.register("action", None, _Once)
        self.register("action", "store", _Once)


class _Once(argparse.Action):
    """Store a value; a second one usually comes from a shell that expanded a pattern into several words."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser.given:
            raise argparse.ArgumentError(self, f"given twice; {QUOTES}")
        parser.given.add(self.dest)
        if str(values).startswith("~"):  # the shell leaves it as it is in --out=~/PATH
            values = type(values)(os.path.expanduser(values))
        setattr(namespace, self.dest, values)


def version() -> str:
    """Return the versions of this package, JAX and Python, without importing JAX."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "(not installed)"
    return f"flip_jax {flip_jax.__version__}, jax {jax}, Python {platform.python_version()}"


def select(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return a command's name and its own arguments; prints help and exits if there is no such command."""
    lines = "\n".join(f"  {name:10}{line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="flip",
        usage="flip COMMAND [ARGUMENT ...]",
        description="Tools for FLIP models: train with main.py, and do everything else with these commands.",
        epilog=f"commands:\n{lines}\n\nflip COMMAND --help describes a command and its arguments.",
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument("command", help=argparse.SUPPRESS)
    # Everything after the command's name belongs to the command, options included.
    name = parser.parse_args(argv[:1] or ["--help"]).command
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown command {name!r}; {hint}flip --help lists all commands")
    return name, list(argv[1:])


def parse(name: str, module: Any, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments.

    A command with an option --config takes --config.KEY=VALUE as well; they are listed in `config_changes`.
    """
    parser = Parser(prog=f"flip {name}", description=module.__doc__, epilog=f"example:\n  {module.EXAMPLE}")
    module.add_arguments(parser)
    arguments, rest = parser.parse_known_intermixed_args(argv)
    if "config" in arguments:
        arguments.config_changes = [word for word in rest if word.startswith("--config.") and "=" in word]
        rest = [word for word in rest if word not in arguments.config_changes]
    if rest:
        hint = "write --config.KEY=VALUE" if rest[0].startswith("--config.") else QUOTES
        parser.error(f"unexpected arguments: {' '.join(rest)} ({hint})")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return the exit code; as the program `flip`, end with it."""
    if argv is None:
        runtime.Interrupts().start()
        sys.exit(runtime.run(_run, sys.argv[1:]))
    return runtime.run(_run, argv)


def _run(argv):
    name, rest = select(argv)
    if name in ON_CPU:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    module = importlib.import_module(f"flip_jax.tools.{name}")
    return module.main(parse(name, module, rest))


if __name__ == "__main__":
    sys.exit(main())
