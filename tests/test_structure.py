"""The structure that keeps the project readable: who imports whom, how large files are, what a run loads."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest
from helpers import REPO, arguments, environment

FILES = sorted(
    path
    for folder in ("flip_jax", "configs", "tests", "benchmarks", "dev", "launch")
    for path in (REPO / folder).rglob("*.py")
)
PACKAGE = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
    if path.is_relative_to(REPO / "flip_jax")
}
UNUSED = {"scipy", "matplotlib", "tensorflow", "torch", "wandb"}


def imports(path: pathlib.Path, everywhere: bool) -> set[str]:
    """Modules of the package that a file imports, at its top or everywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & PACKAGE.keys()
            found |= submodules or {node.module}
    return found & PACKAGE.keys()


def test_nothing_imports_in_a_circle():
    graph, done = {name: imports(path, False) - {name} for name, path in PACKAGE.items()}, set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_only_tools_import_tools():
    for name, path in PACKAGE.items():
        if not name.startswith("flip_jax.tools"):
            assert not [other for other in imports(path, True) if other.startswith("flip_jax.tools")], name


def test_the_list_of_settings_imports_nothing_of_ours():
    assert not imports(PACKAGE["flip_jax.config"], True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_a_run_without_evaluation_loads_nothing_that_it_does_not_use(shards, tmp_path):
    """In a process of its own, after training to the end."""
    _, script, *rest = arguments(shards, tmp_path / "run")
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = {[script, *rest]!r}\n"
        "try:\n    runpy.run_path('main.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "flip_jax.train" in loaded and "flip_jax.data.shards" in loaded
    others = "evaluators tools inference stages optimizers average models.decoder models.classifier".split()
    others += ["data.emoji", "data.indexed", "data.library_tokenizer", "formats", "models.map_head"]
    assert not [name for name in loaded if name.startswith(tuple(f"flip_jax.{other}" for other in others))]
    assert not UNUSED & {name.partition(".")[0] for name in loaded}
