"""The commands of README.md and of docs/*.md: each names what there is; those of the README run on small data."""

import ast
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
from flip_jax import config_check
from flip_jax.data import sources

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SETTINGS = config_check.flatten(config_lib.Config())

# Programs of others, which tests cannot ask what they take.
OTHERS = {
    "clip_benchmark_export_wds",
    "curl",
    "docker",
    "img2dataset",
    "ssh-add",
    "tensorboard",
    "tfds",
    "wandb",
    "xprof",
}


def commands(page):
    """The commands in a page's fenced blocks, those of other languages left out, as lists of words."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        lines = [] if language else block.replace("\\\n", " ").splitlines()
        for part in (part for line in lines for part in line.split(" && ")):
            if words := shlex.split(part, comments=True):
                yield words


def cases():
    found = ((page, words) for page in PAGES for words in commands(page))
    return [pytest.param(words, id=f"{page.name}: {' '.join(words)[:90]}") for page, words in found]


def check_config(words):
    """A recipe that is there, unless the page makes it up or leaves it open, and settings that it has."""
    for word in words:
        if word.startswith("--config."):
            key = word.removeprefix("--config.").partition("=")[0]
            assert key in SETTINGS or key == "KEY", f"no such setting: {word}"
        elif word.startswith("--config="):
            recipe = word.removeprefix("--config=").partition(":")[0]
            invented = recipe in ("configs/RECIPE.py", "configs/flip_b32.py")  # the latter in docs/extend.md
            assert invented or (REPO / recipe).is_file(), f"no such recipe: {recipe}"


def defined_flags(file):
    """The names of a program's absl flags (or those that argparse is told of), and whether it takes --config."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = {
        call.args[0].value.lstrip("-")
        for call in calls
        if getattr(call.func, "attr", "").startswith(("DEFINE_", "add_argument"))
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    return names


def check_flags(file, words):
    names = defined_flags(file)
    for word in words:
        if match := re.match(r"--(\w+)", word):
            assert match[1] in names, f"{file.name} has no flag --{match[1]}"
    if "config" in names:
        check_config(words)


def check(words):
    """Fails where a command names a program, flag, setting, file or extra that there is not."""
    program, *rest = words
    if program == "make":
        for target in rest:
            assert re.search(rf"^{re.escape(target)}:", (REPO / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[0] == "main.py":
        check_flags(REPO / "main.py", rest[1:])
    elif program == "python" and rest[0] == "-m":
        file = REPO / (rest[1].replace(".", "/") + ".py")
        assert file.is_file(), f"no such module: {rest[1]}"
        check_flags(file, rest[2:])
    elif program == "export" and rest[0].startswith("MALLOC_"):
        assert dict(word.split("=") for word in rest) == turns.HEAP
    elif program == "export" or re.match(r"\w+=", program) or program.startswith("launch/"):
        check_launch(words)
    else:
        assert program in OTHERS, f"nothing here checks the command {program}: say how, or that it belongs to others"


def check_pip(rest):
    assert rest[0] == "install"
    tree = ast.parse((REPO / "setup.py").read_text())
    (extras,) = (
        k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "extras_require"
    )
    known = {key.value for key in extras.keys}
    for word in rest[1:]:
        if match := re.fullmatch(r"\.\[(\w+)\]", word):
            assert match[1] in known, f"setup.py has no extra {match[1]}"
        else:
            assert word in ("-e", ".", "xprof", "clip-benchmark"), word


def check_launch(words):
    """Variables and scripts of launch/, and what the scripts are asked to do."""
    text = "".join(path.read_text() for path in (REPO / "launch").iterdir() if path.is_file())
    variables = [word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    for name in variables:
        assert re.search(rf"\b{name}\b", text) or name == "SBATCH_PARTITION", f"launch/ does not know {name}"
    script = next((i for i, word in enumerate(words) if word.startswith("launch/")), None)
    if script is not None:
        file = REPO / words[script]
        assert os.access(file, os.X_OK), f"{file} cannot be run"
        assert re.search(rf"\b{words[script + 1]}\b", text), f"{words[script]} knows no {words[script + 1]}"
        check_config(words)


@pytest.mark.parametrize("words", cases())
def test_a_command_names_what_there_is(words):
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "make dmo",
        "pip install -e .[gpu]",
        "python main.py --config=configs/flip_x16.py",
        "python main.py --config=configs/flip_l16.py --config.batch_size=3",
        "python -m flip_jax.evaluat --workdir=a",
        "python -m flip_jax.evaluate --work_dir=a",
        "launch/tpu_vm.sh destroy",
        "export NAMES=flip",
        "train --fast",
    ],
)
def test_a_command_that_is_wrong_is_found(line):
    with pytest.raises(AssertionError):
        check(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_setting_in_the_text_is_one(page):
    groups = {key.partition(".")[0] for key in SETTINGS if "." in key} - {"model"} | {"model.image", "model.text"}
    names = re.findall(rf"`((?:{'|'.join(groups)})\.\w+)[`=]", page.read_text().replace("`config.", "`"))
    for name in names:
        if not name.endswith((".py", ".md", ".load", ".json")):
            assert name in SETTINGS or name == "config.data", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_text_names_is_there(page):
    """Modules to run with -m, files of the project, and tests, where they stand in the text."""
    text = page.read_text()
    for module in re.findall(r"python -m ([\w.]*\w)", text):
        assert (REPO / (module.replace(".", "/") + ".py")).is_file(), module
    for file in re.findall(r"`((?:flip_jax|configs|tests|launch|benchmarks|colab)/[\w./]+\.\w+)", text):
        assert (REPO / file).is_file() or file == "configs/RECIPE.py", file
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+?))?(?:_\.\.\.)?`", text):
        assert f"def {name}" in (REPO / "tests" / file).read_text(), f"{file}::{name}"


def test_every_page_is_in_the_table_of_contents():
    contents = (REPO / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in contents, page.name


def test_the_messages_are_those_of_the_program():
    section = (REPO / "README.md").read_text().partition("## When it says no")[2].partition("\n## ")[0]
    source = "".join(path.read_text() for path in [REPO / "main.py", *(REPO / "flip_jax").rglob("*.py")])
    rows = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        for part in re.split(r"\bconfig\.mask_ratio\b|\b[NM]\b|\bnan\b|\.\.\.", row):
            assert part in source, f"{part!r} of {row!r} is nowhere in the program"
    assert set(sources.KINDS) >= {"webdataset", "tfrecord", "parquet", "csv", "tfds"}


# What the README's commands need to run here in seconds. They run in their order, each in the folder that the earlier
# ones left their output in.
CHANGES = {"total_samples": 96, "warmup_samples": 32, "checkpoint.every_steps": 0, "model.unroll": True}
CHANGES |= {"model.image.depth": 1, "model.text.depth": 1}
SMALL = [word for word in arguments("", "", **CHANGES)[4:] if "data.train" not in word]
RUN = {
    "python -m flip_jax.inspect_data": [],
    "python main.py --config=configs/flip_b16.py": [
        *SMALL,
        "--config.microbatches=2",
        "--config.eval.every_steps=3",
        "--config.model.text.vocab_size=200",
    ],
    "python -m flip_jax.evaluate": ["--batch_size=64", "--classnames=pairs/classes.txt"],
    "python -m flip_jax.card": [],
    "python -m flip_jax.embed": [],
    "python -m flip_jax.search": [],
    "python -m flip_jax.convert open-clip-export": [],
    "python main.py --config=configs/finetune_l16.py": [
        *(word for word in SMALL if "text" not in word and "mask" not in word),
        "--config.finetune.classes=8",
        "--config.eval.batch_size=32",
    ],
}
NOT_HERE = {
    "make": "the whole demo and the whole suite: .ci/run",
    "pip": "installs",
    "img2dataset": "a program of others",
    "export": "a pod",
    "launch/": "a pod",
    "python -m flip_jax.demo": "serves until it is stopped: tests/test_demo.py",
    "python -m flip_jax.convert official": "released weights: tests/test_convert_official.py runs it on ones made here",
}
REPLACED = {
    "/data/pairs/{00000..00127}.tar": "pairs/{00000..00001}.tar",
    "/data/bert_uncased/vocab.txt": "vocab.txt",
    "zeroshot/imagenet,retrieval/coco": "zeroshot/webdataset:pairs/*.tar,retrieval/webdataset:pairs/*.tar",
    "--config.init_from=converted": "--config.init_from=runs/b16",
    "folder:/data/birds/": "folder:birds/",
}


def test_every_command_of_the_readme_is_run_or_said_to_need_more():
    for words in commands(REPO / "README.md"):
        line = " ".join(words)
        assert sum(line.startswith(start) for start in [*RUN, *NOT_HERE]) == 1, line


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
    for words in commands(REPO / "README.md"):
        line = " ".join(words)
        if not (start := next((start for start in RUN if line.startswith(start)), None)):
            continue
        for old, new in REPLACED.items():
            words = [word.replace(old, new) for word in words]
        words = [sys.executable, *words[1:], *RUN[start]]
        if words[1] == "main.py":
            words[1] = str(REPO / "main.py")
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert json.loads((tmp_path / "runs" / "b16" / "card.json").read_text())["license"] == "apache-2.0"
    for made in ("report", "b16.json", "runs/b16/README.md", "index/index.json", "hits.html"):
        assert (tmp_path / made).exists(), made
    assert (tmp_path / "exported" / "card.json").exists() and (tmp_path / "runs" / "birds" / "checkpoints").is_dir()

    (snippet,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    Image.new("RGB", (40, 40)).save(tmp_path / "cat.png")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"\[\[\s*\S+\s+\S+\s*\]\]\n", done.stdout), done.stderr
