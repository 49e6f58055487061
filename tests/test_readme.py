"""The commands, links and names in README.md, CONTRIBUTING.md and docs/; the README's commands run on small data."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import REPO, arguments, environment
from PIL import Image

from benchmarks import turns
from flip_jax import config as config_lib
from flip_jax import config_check, stages
from flip_jax.data import sources
from flip_jax.tools import COMMANDS
from flip_jax.tools import __main__ as command_line

README = REPO / "README.md"
DOCS = sorted((REPO / "docs").rglob("*.md"))
PAGES = [README, REPO / "CONTRIBUTING.md", *DOCS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
SETTINGS = config_check.flatten(config_lib.Config())
INVENTED = ("configs/RECIPE.py", "configs/flip_b32.py")  # a placeholder, and the example of docs/extend.md
# Programs of others, whose options cannot be checked here.
OTHERS = (
    "clip_benchmark_export_wds curl docker gcloud helm img2dataset kubectl pre-commit ray srun ssh-add tensorboard "
    "tfds wandb xprof"
).split()


def commands(page):
    """Yield the commands in a page's fenced blocks without a language, as lists of words."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        lines = [] if language else block.replace("\\\n", " ").splitlines()
        for command in (command for line in lines for command in line.split(" && ")):
            if words := shlex.split(command, comments=True):
                yield words


def check_recipe(text):
    """Fail unless the recipe exists and accepts its argument."""
    path, _, argument = text.partition(":")
    if path not in INVENTED:
        assert (REPO / path).is_file(), f"no such recipe: {path}"
        recipe = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        config_check.from_config_dict(recipe.get_config(argument or None))


def check_config(words):
    """Fail at a recipe or a setting that does not exist."""
    for word in words:
        if word.startswith("--config."):
            key = word.removeprefix("--config.").partition("=")[0]
            assert key in SETTINGS or key == "KEY", f"no such setting: {word}"
        elif word.startswith("--config="):
            check_recipe(word.removeprefix("--config="))


def check_flip(words):
    """Fail where the parser of `flip` does."""
    try:
        name, rest = command_line.select(words)
        command_line.parse(name, importlib.import_module(f"flip_jax.tools.{name}"), rest)
    except SystemExit as error:
        assert not error.code, f"flip {' '.join(words)}: refused by its parser"
    check_config(words)


def check_flags(file, words):
    """Fail at an option that a program's source does not define."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = {
        call.args[0].value.lstrip("-")
        for call in calls
        if getattr(call.func, "attr", "").startswith(("DEFINE_", "add_argument"))
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    for word in words:
        if match := re.match(r"--(\w+)", word):
            assert match[1] in names, f"{file.name} has no flag --{match[1]}"
    check_config(words)


def check_pip(words):
    assert words[0] == "install"
    text = (REPO / "setup.py").read_text()
    for word in words[1:]:
        if match := re.fullmatch(r"\.\[(\w+)\]", word):
            extras = text.partition("extras_require")[2]
            assert f'"{match[1]}": [' in extras, f"setup.py has no extra {match[1]}"
        else:
            assert word in ("-e", ".", "xprof", "clip-benchmark", "pre-commit"), word


def check_launch(words):
    """Fail at a variable, script or action that launch/ does not know."""
    text = "".join(path.read_text() for path in (REPO / "launch").iterdir() if path.is_file())
    for name in (word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)):
        assert re.search(rf"\b{name}\b", text) or name == "SBATCH_PARTITION", f"launch/ does not know {name}"
    script = next((i for i, word in enumerate(words) if word.startswith("launch/")), None)
    if script is not None:
        assert os.access(REPO / words[script], os.X_OK), f"{words[script]} cannot be run"
        assert re.search(rf"\b{words[script + 1]}\b", text), f"{words[script]} has no action {words[script + 1]}"
        check_config(words)


def check(words):
    """Fail at a program, option, setting, file or extra that does not exist."""
    program, *rest = words
    if program == "make":
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", (REPO / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        check_pip(rest)
    elif program == "flip":
        check_flip(rest)
    elif program.endswith("python") and rest[0] == "main.py":
        check_flags(REPO / "main.py", rest[1:])
    elif program.endswith("python") and rest[:2] == ["-m", "flip_jax"]:
        check_flip(rest[2:])
    elif program.endswith("python") and rest[:2] == ["-m", "pytest"]:
        assert all((REPO / path).is_file() for path in rest[2:]), rest
    elif program.endswith("python") and rest[0] == "-m":
        file = REPO / (rest[1].replace(".", "/") + ".py")
        assert file.is_file(), f"no such module: {rest[1]}"
        check_flags(file, rest[2:])
    elif program == "export" and rest[0].startswith("MALLOC_"):
        assert dict(word.split("=") for word in rest) == turns.HEAP
    elif program == "export" or re.match(r"\w+=", program) or program.startswith("launch/"):
        check_launch(words)
    else:
        assert program in OTHERS, f"{program} is neither a program of this repository nor listed in OTHERS"


CASES = [pytest.param(words, id=f"{page.name}: {' '.join(words)[:90]}") for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", CASES)
def test_a_command_is_valid(words):
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "make dmo",
        "pip install -e .[gpu]",
        "python main.py --config=configs/flip_x16.py",
        "python main.py --config=configs/flip_l16.py:masked",
        "python main.py --config=configs/flip_l16.py --config.batch_size=3",
        "flip evaluat --model=a",
        "flip evaluate --workdir=a",
        "python -m flip_jax.evaluate --model=a",
        "python -m flip_jax evaluate --workdir=a",
        "launch/tpu_vm.sh destroy",
        "export NAMES=flip",
        "train --fast",
    ],
)
def test_an_invalid_command_is_found(line):
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check(shlex.split(line))


@each_page
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@each_page
def test_a_heading_that_a_link_names_exists(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        if "://" not in target:
            headings = re.findall(r"^#+ (.*)$", ((page.parent / target) if target else page).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@each_page
def test_a_setting_in_the_text_exists(page):
    groups = {key.partition(".")[0] for key in SETTINGS if "." in key} - {"model"} | {"model.image", "model.text"}
    names = re.findall(rf"`((?:{'|'.join(groups)})\.\w+)[`=]", page.read_text().replace("`config.", "`"))
    for name in names:
        if not name.endswith((".py", ".md", ".load", ".json")):
            assert name in SETTINGS or name in ("config.data", stages.STATE), name


@each_page
def test_commands_files_and_tests_in_the_text_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ([\w.]*\w)", text):
        path = REPO / module.replace(".", "/")
        assert module == "pytest" or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for name in re.findall(r"`(?:flip|python -m flip_jax) (\w+)", text):
        assert name in COMMANDS or name == "NAME", f"flip {name}"
    for recipe in re.findall(r"`(configs/\w+\.py(?::[^`]*)?)`", text):
        if recipe not in ("configs/common.py", "configs/variants.py"):
            check_recipe(recipe)
    for file in re.findall(r"`((?:flip_jax|tests|launch|benchmarks|colab|dev|docs)/[\w./]+\.\w+)", text):
        assert (REPO / file).is_file(), file
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(test_\w+?))?(?:_\.\.\.)?`", text):
        found = list((REPO / "tests").rglob(file))
        assert found and f"def {name}" in found[0].read_text(), f"{file}::{name}"


def test_the_table_of_contents_has_every_page():
    contents = (REPO / "docs" / "README.md").read_text()
    for page in DOCS:
        assert page.name == "README.md" or f"]({page.relative_to(REPO / 'docs')})" in contents, page.name


def test_common_errors_are_messages_of_the_program():
    section = README.read_text().partition("## Common errors")[2].partition("\n## ")[0]
    source = "".join(path.read_text() for path in [REPO / "main.py", *(REPO / "flip_jax").rglob("*.py")])
    rows = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        for part in re.split(r"\bconfig\.mask_ratio\b|\b[NM]\b|\bnan\b|\.\.\.", row):
            assert part in source, f"{part!r} of {row!r} is nowhere in the program"


def test_the_readme_names_kinds_of_sources_that_exist():
    (names,) = re.findall(r"Kinds include (.*?);", README.read_text(), re.DOTALL)
    assert set(re.findall(r"`(\w+)`", names)) <= set(sources.KINDS)


# What makes the README's commands run in seconds. They run in the order of the page, in one folder.
CHANGES = {"total_samples": 96, "warmup_samples": 32, "checkpoint.every_steps": 0, "model.unroll": True}
CHANGES |= {"model.image.depth": 1, "model.text.depth": 1, "model.text.vocab_size": 200}
SMALL = [word for word in arguments("", "", **CHANGES)[4:] if "data.train" not in word]
RUN = {
    "flip inspect": [],
    "flip prepare": [],
    "python main.py --config=configs/flip_b16.py --workdir": [
        *SMALL,
        "--config.microbatches=2",
        "--config.eval.every_steps=3",
    ],
    "python main.py --config=configs/flip_emoji.py": [
        *(word for word in SMALL if "mask" not in word),
        "--config.microbatches=1",
    ],
    "flip check": [],
    "flip evaluate": ["--batch_size=64", "--classnames=pairs/classes.txt"],
    "flip report": [],
    "flip embed": [],
    "flip search": [],
    "flip convert export": [],
    "python main.py --config=configs/finetune_l16.py": [
        *(word for word in SMALL if "text" not in word and "mask" not in word),
        "--config.finetune.classes=8",
        "--config.eval.batch_size=32",
    ],
    "flip card": [],
}
REPLACED = {
    "/data/pairs/{00000..00127}.tar": "pairs/{00000..00001}.tar",
    "/data/even": "even",
    "--shards=256": "--shards=3",
    "csv:/data/pairs.csv": "webdataset:pairs/*.tar",
    "/data/bert_uncased/vocab.txt": "vocab.txt",
    "zeroshot/imagenet,retrieval/coco": "zeroshot/webdataset:pairs/*.tar,retrieval/webdataset:pairs/*.tar",
    "--config.init_from=converted": "--config.init_from=runs/b16",
    "folder:/data/birds/": "folder:birds/",
}
MADE = "report/inspection.png b16.json runs/b16/report/loss.png runs/b16/README.md index/index.json hits.html"
NOT_RUN = {
    "make": "runs everything",
    "python main.py --config=configs/flip_b16.py:runlocal": "the whole B/16 takes minutes",
    "pip": "installs",
    "img2dataset": "a program of others",
    "export": "a pod",
    "launch/": "a pod",
    "flip aot": "the TPU compiler: tests/tools/test_aot.py",
    "flip demo": "serves until it is stopped: tests/tools/test_demo.py",
    "flip convert import": "released weights: tests/tools/test_convert_official.py converts weights made there",
}


def test_every_command_of_the_readme_is_run_or_has_a_reason_not_to():
    lines = [" ".join(words) for words in commands(README)]
    for line in lines:
        assert sum(line.startswith(start) for start in [*RUN, *NOT_RUN]) == 1, line
    for start in [*RUN, *NOT_RUN]:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.slow
def test_the_readme_from_shards_to_a_classifier(shards, tmp_path):
    (tmp_path / "pairs").symlink_to(shards)
    words = "[PAD] [UNK] a red green blue white square frame".split()
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (tmp_path / "configs").symlink_to(REPO / "configs")
    for split in ("train", "val"):
        for label, colour in enumerate(("red", "blue") * 4):
            folder = tmp_path / "birds" / split / f"{label}"
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (40, 40), colour).save(folder / f"{i}.png")
    env = environment() | {"PYTHONPATH": str(REPO)}
    for words in commands(README):
        line = " ".join(words)
        if not (start := next((start for start in RUN if line.startswith(start)), None)):
            continue
        for old, new in REPLACED.items():
            words = [word.replace(old, new) for word in words]
        program = ["-m", "flip_jax"] if words[0] == "flip" else [str(REPO / "main.py")]
        rest = words[1:] if words[0] == "flip" else words[2:]
        changed = {word.partition("=")[0] for word in RUN[start]}
        rest = [word for word in rest if word.partition("=")[0] not in changed]
        command = [sys.executable, *program, *rest, *RUN[start]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    for path in MADE.split():
        assert (tmp_path / path).exists(), path
    assert len(list((tmp_path / "even").glob("*.tar"))) == 3
    assert json.loads((tmp_path / "runs" / "b16" / "card.json").read_text())["license"] == "apache-2.0"
    assert (tmp_path / "exported" / "card.json").exists() and (tmp_path / "runs" / "birds" / "checkpoints").is_dir()

    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    Image.new("RGB", (40, 40)).save(tmp_path / "cat.png")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\[\[\s*\S+\s+\S+\s*\]\]\n", done.stdout), done.stderr
