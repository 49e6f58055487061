"""The command line: what it lists, what it refuses, and what each exit code means."""

import argparse
import importlib
import pathlib
import subprocess
import sys

import pytest
from helpers import REPO

from flip_jax import runtime
from flip_jax.tools import COMMANDS, __main__

NAMES = "aot card check convert demo embed evaluate inspect merge prepare push report search".split()


def refusal(capsys, *argv):
    """The exit code and the last line of stderr of arguments that argparse refuses."""
    with pytest.raises(SystemExit) as stopped:
        __main__.main(argv)
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


class Command:
    """A command whose `main` does what a test says."""

    EXAMPLE = "flip inspect webdataset:shards/00000.tar --size=3"

    def __init__(self, main=lambda arguments: None, recipe=False):
        self.main, self.recipe = main, recipe
        self.__doc__ = "Show a data set.\n\nIt is 100 % safe."

    def add_arguments(self, parser):
        parser.add_argument("source", nargs="?", metavar="SOURCE")
        parser.add_argument("out", nargs="?", metavar="OUT")
        parser.add_argument("--size", type=int, default=2)
        parser.add_argument("--text", action="append")
        if self.recipe:
            parser.add_argument("--config")


@pytest.fixture
def install(monkeypatch):
    """A function that puts a `Command` in the place of `flip inspect`."""

    def put(**settings):
        monkeypatch.setattr(importlib, "import_module", lambda name: Command(**settings))

    return put


def test_help_lists_every_command_without_importing_jax():
    program = (
        "import runpy, sys; sys.argv = ['flip', '--help']\n"
        "try: runpy.run_module('flip_jax', run_name='__main__', alter_sys=True)\n"
        "finally: print(sorted({'jax', 'flax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert list(COMMANDS) == NAMES
    for name, line in COMMANDS.items():
        assert f"\n  {name:10}{line}\n" in done.stdout


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_home_is_expanded_in_paths(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = __main__.Parser()
    parser.add_argument("--out", type=kind)
    assert parser.parse_args(["--out=~/x"]).out == kind("/home/me/x")


def test_no_command_prints_the_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main([])
    assert not stopped.value.code and "evaluate" in capsys.readouterr().out


def test_version_names_the_package_and_jax(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("flip_jax ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evalute"], "flip: error: unknown command 'evalute'; did you mean evaluate? flip --help lists all commands"),
        (["xyz"], "flip: error: unknown command 'xyz'; flip --help lists all commands"),
        (["--verbose", "inspect"], "flip: error: the following arguments are required: command"),
    ],
)
def test_an_unknown_command_names_the_nearest(argv, message, capsys):
    assert refusal(capsys, *argv) == (2, message)


def test_a_commands_help_has_its_description_options_and_example(install, capsys):
    install()
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["inspect", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith("usage: flip inspect ") and "Show a data set.\n\nIt is 100 % safe.\n" in shown
    assert "--size SIZE" in shown and shown.endswith(f"example:\n  {Command.EXAMPLE}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b", "--siz=3"], "unexpected arguments: --siz=3 "),
        (["a", "b", "--sizes", "3"], "unexpected arguments: --sizes 3 "),
        (["a", "b", "--size=x"], "argument --size: invalid int value: 'x'"),
        (["a0.tar", "a1.tar", "a2.tar", "--size=3"], "unexpected arguments: a2.tar (put values with {...} or *"),
        (["--size=2", "--size=3"], "argument --size: given twice; put values with {...} or *"),
        (["a", "--config.seed=3"], "unexpected arguments: --config.seed=3 "),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(install, argv, message, capsys):
    install(main=lambda arguments: pytest.fail("it ran"))
    code, line = refusal(capsys, "inspect", *argv)
    assert code == 2 and line.startswith(f"flip inspect: error: {message}")


def test_arguments_are_found_in_any_order(install):
    seen = []
    install(main=seen.append)
    for argv in ("a b --size=3 --text=x --text=y", "--text=x a --size 3 b --text=y", "--size=3 --text=x --text y a b"):
        assert __main__.main(["inspect", *argv.split()]) == 0
    assert seen == [argparse.Namespace(source="a", out="b", size=3, text=["x", "y"])] * 3


def test_changes_of_a_recipe_reach_the_commands_that_take_one(install, capsys):
    seen = []
    install(main=seen.append, recipe=True)
    words = ["--config.model.image.mask_ratio=0.5", "--config.seed=3"]
    __main__.main(["inspect", "a", "--config=configs/flip_l16.py", *words])
    assert seen[0].config == "configs/flip_l16.py" and seen[0].config_changes == words and seen[0].source == "a"
    code, line = refusal(capsys, "inspect", "a", "b", "--config.seed", "3")
    assert code == 2 and line.endswith("unexpected arguments: --config.seed 3 (write --config.KEY=VALUE)")


def test_exit_codes_say_how_it_ended(install, capsys):
    def stop(error):
        def main(_):
            raise error

        return main

    install(main=lambda _: 7)
    assert __main__.main(["inspect"]) == 7
    install(main=stop(runtime.UserError("--size must be odd")))
    assert __main__.main(["inspect"]) == 1
    assert capsys.readouterr().err == "error: --size must be odd\n"
    install(main=stop(KeyboardInterrupt()))
    assert __main__.main(["inspect"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    install(main=stop(TypeError("a bug")))
    assert __main__.main(["inspect"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "TypeError: a bug" in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_description_an_example_and_arguments(name):
    command = importlib.import_module(f"flip_jax.tools.{name}")
    parser = __main__.Parser(prog=f"flip {name}")
    command.add_arguments(parser)
    assert command.EXAMPLE.startswith(f"flip {name} ") and command.__doc__ and callable(command.main)
    assert all(action.help for action in parser._actions)
