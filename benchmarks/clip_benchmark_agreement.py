"""Compare the scores of clip_benchmark and of `flip evaluate` for one model.

usage: python -m benchmarks.clip_benchmark_agreement WORKDIR SOURCE CLASSNAMES CLIP_BENCHMARK_PYTHON

WORKDIR is a run with an architecture that open_clip has; SOURCE has images with class numbers, CLASSNAMES is a file
with the names of the classes; CLIP_BENCHMARK_PYTHON is the Python of an environment with clip-benchmark and open_clip
(clip-benchmark 1.6.2 works with NumPy 2.2 and fails with 2.4). The model is exported to open_clip's format. Both tools
read the same folders, in the layout that clip_benchmark calls webdataset: all images with their classes, and for
retrieval one image of each class with one caption per prompt. Prints the metrics of both as JSON, ours first, in
percent.
"""

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from flip_jax.config import DataConfig
from flip_jax.data import sources
from flip_jax.evaluators import retrieval

ROOT = pathlib.Path(__file__).parent.parent
TEMPLATES = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a small picture of the {}.",
    "itap of my {}.",
    "a close {}.",
)


def write(folder: pathlib.Path, samples, **files: str) -> None:
    """Write a data set as clip_benchmark reads it: a tar, the number of shards, and text files next to them."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for i, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{i:07}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)


def write_both(out: pathlib.Path, source: str, names: list[str]) -> None:
    """Write the folders `classes` and `captions` of `out`."""
    opened = sources.open_source(source, DataConfig())
    records = [record for record in sources.in_order(opened, iter(range(len(opened)))) if "image" in record]
    first = {record["label"]: record for record in reversed(records)}
    write(
        out / "classes",
        ({"jpg": record["image"], "cls": b"%d" % record["label"]} for record in records),
        classnames="\n".join(names),
        zeroshot_classification_templates="\n".join(template.replace("{}", "{c}") for template in TEMPLATES),
    )
    captions = {label: "\n".join(template.format(names[label]) for template in TEMPLATES) for label in first}
    write(
        out / "captions",
        ({"jpg": first[label]["image"], "txt": captions[label].encode()} for label in sorted(first)),
        dataset_type="retrieval",
    )


def ours(workdir: str, data: pathlib.Path) -> dict[str, float]:
    """Return the metrics of `flip evaluate` under clip_benchmark's names."""
    tasks = f"zeroshot/webdataset:{data}/classes/test/0.tar,retrieval/webdataset:{data}/captions/test/0.tar"
    out = data / "ours.json"
    command = [sys.executable, "-m", "flip_jax", "evaluate", f"--model={workdir}", f"--tasks={tasks}", f"--json={out}"]
    run(*command, *(f"--template={template}" for template in TEMPLATES))
    found = json.loads(out.read_text())["results"]
    zeroshot, recall = (found[task] for task in tasks.split(","))
    return {
        "acc1": zeroshot["top1"],
        "acc5": zeroshot["top5"],
        "mean_per_class_recall": zeroshot["mean_per_class"],
        **{
            f"{kind}_retrieval_recall@{k}": recall[f"{kind}_recall@{k}"]
            for k in retrieval.AT
            for kind in ("image", "text")
        },
    }


def theirs(python: str, model: pathlib.Path, data: pathlib.Path) -> dict[str, float]:
    """Return the metrics of clip_benchmark in f32."""
    found = {}
    for folder, task in (("classes", "zeroshot_classification"), ("captions", "zeroshot_retrieval")):
        out = data / f"{task}.json"
        command = [
            python,
            "-m",
            "clip_benchmark.cli",
            "eval",
            "--model",
            f"local-dir:{model}",
            "--pretrained",
            "exported",
        ]
        command += ["--dataset", f"wds/{folder}", "--dataset_root", str(data / folder), "--task", task, "--no_amp"]
        command += ["--recall_k", *map(str, retrieval.AT), "--num_workers", "1", "--output", str(out)]
        run(*command)
        found |= {name: 100 * value for name, value in json.loads(out.read_text())["metrics"].items()}
    return found


def run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=sys.stderr, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("workdir", "source", "classnames", "clip_benchmark_python"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    text = pathlib.Path(arguments.classnames).read_text()
    names = json.loads(text) if text.startswith("[") else text.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder)
        write_both(data, arguments.source, names)
        run(
            sys.executable,
            "-m",
            "flip_jax",
            "convert",
            "export",
            arguments.workdir,
            f"{data}/exported",
            "--format=open_clip",
        )
        mine, other = ours(arguments.workdir, data), theirs(arguments.clip_benchmark_python, data / "exported", data)
    print(json.dumps({name: [round(value, 4), round(other[name], 4)] for name, value in mine.items()}))


if __name__ == "__main__":
    main()
