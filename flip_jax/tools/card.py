"""Write a model card: README.md, as the Hugging Face hub shows it, and card.json for programs, next to the weights.

`flip convert` writes a card with every model. For such a model this command adds an evaluation and a license.
"""

import argparse
import hashlib
import json
import logging
import math
import os
from typing import Any

import jax
from etils import epath
from flax import nnx
from huggingface_hub import EvalResult, ModelCardData

from flip_jax import config_check, metrics_file, models, saved_config, saved_step, stages, untrusted
from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError, is_remote
from flip_jax.tools import options
from flip_jax.untrusted import code
from flip_jax.untrusted import markdown as escaped

EXAMPLE = "flip card --model=runs/l16 --evaluation=l16.json --license=apache-2.0"

JSON, MARKDOWN = "card.json", "README.md"
TASKS = {"zeroshot": "zero-shot-image-classification", "classify": "image-classification"}  # the hub's names
KEYS = {
    "origin",
    "library",
    "license",
    "step",
    "samples_seen",
    "parameters",
    "config",
    "tokenizer",
    "data",
    "evaluation",
}
Card = dict[str, Any]


def describe(config: Config, tokenizer: Tokenizer | None, origin: str) -> Card:
    """Return the card of a model whose training is unknown, from its settings and tokenizer."""
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))[1])
    sizes = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in params.items()}
    return {
        "origin": origin,
        "library": "flip_jax",
        "license": None,
        "step": None,
        "samples_seen": None,
        "parameters": sizes | {"all": sum(sizes.values())},
        "config": config_check.flatten(config),
        "tokenizer": _tokenizer(tokenizer, config) if tokenizer else None,
        "data": None,
        "evaluation": None,
    }


def _tokenizer(tokenizer, config):
    content = json.dumps(tokenizer.to_json(), sort_keys=True).encode()
    return {
        "kind": tokenizer.kind,
        "entries": tokenizer.vocab_size,
        "from": config.data.vocab or "trained on the captions",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def from_model(path: str | os.PathLike) -> Card:
    """Return the card of a run's newest step, of one step, or the existing card of a converted or exported model.

    Raises:
      UserError: the folder holds no model.
    """
    folder = saved_step.newest(path) if os.fspath(path).startswith("hf://") else epath.Path(path)
    if (folder / JSON).exists() and not (folder / "checkpoints").is_dir():
        return _earlier(folder / JSON)
    step = saved_step.newest(folder)
    config, tokenizer = saved_config.read(step), saved_step.tokenizer(step)
    if step.parent.name != "checkpoints":
        return describe(config, tokenizer, "weights of unknown training")
    card, run = describe(config, tokenizer, "trained with flip_jax"), step.parent.parent
    if (run / JSON).exists():
        earlier = _earlier(run / JSON)
        if earlier["step"] == int(step.name):  # the same step: keep the evaluation and license that were added
            return earlier
        card["license"] = earlier["license"]
    lines = [line for line in metrics_file.read(run) if line["step"] <= int(step.name)]
    records = next((line for line in reversed(lines) if "data/read" in line), {})
    results = next((line for line in reversed(lines) if "loss" not in line), None)
    card |= {
        "step": int(step.name),
        "samples_seen": _samples_seen(step),
        "data": {
            "train": config.data.train,
            "captions": list(config.data.captions),
            "records": {key.removeprefix("data/"): records[key] for key in records if key.startswith("data/")},
        },
    }
    if results:
        numbers = {key: value for key, value in results.items() if "/" in key}
        card["evaluation"] = {"model": f"step {results['step']}, during training", "results": numbers}
    return card


def _samples_seen(step: epath.Path) -> int:
    """Count the samples up to a step, over all stages of its run."""
    plan, number = stages.plan(stages.written(step)), int(step.name)
    return plan[stages.place(plan, number)].samples_seen(number)


def _earlier(path):
    """Return an earlier card; UserError if it is none."""
    content = path.read_text() if is_remote(path) else untrusted.read_file(path)
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):
        card = None
    if not (isinstance(card, dict) and card.keys() >= KEYS and isinstance(card["config"], dict)):
        raise UserError(f"{path} is no model card: move it away")
    return card


def add_evaluation(card: Card, path: str) -> None:
    """Replace the card's evaluation by the file that `flip evaluate --json` wrote.

    Raises:
      UserError: the file cannot be read, is something else, or has no results.
    """
    try:
        content = untrusted.read_file(path)
    except OSError as error:
        raise UserError(f"--evaluation {path!r} cannot be read: {error.strerror}") from None
    try:
        report = json.loads(content.decode())
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON
        report = None
    tasks, means = (report.get(key) if isinstance(report, dict) else None for key in ("results", "means"))
    if not (isinstance(tasks, dict) and isinstance(means, dict) and all(isinstance(x, dict) for x in tasks.values())):
        raise UserError(f"--evaluation {path!r} is not a file that `flip evaluate --json` writes")
    results = {f"{task}/{metric}": value for task, metrics in tasks.items() for metric, value in metrics.items()}
    if not results:
        raise UserError(f"--evaluation {path!r} has no results")
    card["evaluation"] = {"model": report.get("model"), "results": results | means}


def write(folder: str | os.PathLike, card: Card, name: str = "") -> None:
    """Write both files into the folder, over those of an earlier card; the model's name is by default the folder's.

    Raises:
      UserError: the folder has a README.md that is no card, or cannot be written to.
    """
    folder = epath.Path(folder)
    if (folder / MARKDOWN).exists() and not (folder / JSON).exists():
        raise UserError(f"{folder / MARKDOWN} already exists and is no model card; move it away")
    try:
        (folder / JSON).write_text(json.dumps(card, indent=1) + "\n")
        (folder / MARKDOWN).write_text(markdown(card, name or os.path.basename(os.path.abspath(folder))))
    except OSError as error:
        raise UserError(f"{folder}: the model card cannot be written: {error.strerror or error}") from None


def markdown(card: Card, name: str) -> str:
    """Format README.md: front matter for the hub, then the facts of card.json in words."""
    config, blank = saved_config.from_flat(card["config"]), "unknown"
    image, text, data, evaluation = config.model.image, config.model.text, card["data"], card["evaluation"]
    results = evaluation["results"] if evaluation else {}
    patches = (image.image_size // image.patch_size) ** 2
    facts = {
        "image tower": f"ViT, {image.depth} layers of {image.width}, {image.image_size} px, patches of "
        f"{image.patch_size} px, {card['parameters']['image']:,} parameters",
        "text tower": f"{text.depth} layers of {text.width}, {text.context_length} tokens, "
        f"{card['parameters']['text']:,} parameters"
        if "text" in card["parameters"]
        else "none",
        "output": f"{config.finetune.classes} classes"
        if config.finetune.classes
        else f"embeddings of {config.model.embed_dim}",
        "tokenizer": "{kind}, {entries:,} entries, {from}".format(**card["tokenizer"]) if card["tokenizer"] else "none",
        "origin": card["origin"],
    }
    if card["samples_seen"] is not None:
        batch = config.global_batch_size
        facts |= {
            "samples seen": f"{card['samples_seen']:,}, in {card['step']:,} steps"
            + (f" of {batch:,}" if card["samples_seen"] == card["step"] * batch else f", the last of {batch:,}"),
            "seen in training": f"{image.visible_patches} of {patches} patches ({image.mask})"
            + (f", {text.visible_tokens} of {text.context_length} tokens" if "text" in card["parameters"] else ""),
            "started from": config.init_from or "random weights",
            "loss": config.model.loss if not config.finetune.classes else "cross-entropy",
            "training data": code(data["train"]),
            "records": ", ".join(f"{count:,} {kind}" for kind, count in data["records"].items()) or blank,
        }
    else:
        facts |= {"samples seen": blank, "training data": blank}
    lines = [
        "---",
        _front_matter(card, name, results),
        "---",
        "",
        f"# {escaped(name)}",
        "",
        "An image classifier." if config.finetune.classes else "A CLIP-style image-text model.",
        "All settings are in card.json.",
        "",
        "```python",
        _snippet(card),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value if key == 'training data' else escaped(value)} |" for key, value in facts.items()),
        "",
        "## Evaluation",
        "",
    ]
    if results:
        lines += [f"Measured on {escaped(evaluation['model'])}.", "", "| | |", "|---|---|"]
        lines += [f"| {code(key)} | {value:.2f} |" for key, value in results.items()]
    else:
        lines += ["No evaluation is known."]
    return "\n".join(lines) + "\n"


def _front_matter(card, name, results):
    found = []
    for key, value in results.items():
        task, _, metric = key.rpartition("/")
        evaluator, slash, dataset = task.partition("/")
        if slash:
            kind = TASKS.get(evaluator, evaluator.replace("_", "-"))
            found.append(EvalResult(kind, dataset, dataset, metric, round(value, 4)))
    classes = card["config"]["finetune.classes"]
    return ModelCardData(
        model_name=name,
        library_name=card["library"],
        license=card["license"],
        pipeline_tag=TASKS["classify"] if classes else TASKS["zeroshot"],
        tags=["flip", "image-classification" if classes else "clip"],
        eval_results=found or None,
    ).to_yaml()


def _snippet(card):
    if card["library"] == "open_clip":
        return (
            "import open_clip\n\n"
            'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")'
        )
    if card["library"] == "transformers":
        return (
            "from transformers import AutoModel, AutoProcessor\n\n"
            'model = AutoModel.from_pretrained("FOLDER")\n'
            'processor = AutoProcessor.from_pretrained("FOLDER")'
        )
    if card["library"] == "onnx":
        return 'import onnxruntime\n\nimage = onnxruntime.InferenceSession("FOLDER/image.onnx")'
    return 'import flip_jax\n\nmodel = flip_jax.load("FOLDER")'


def update(folder: str | os.PathLike, evaluation: str | None = None, license_name: str | None = None) -> None:
    """Write or rewrite a model's card, with an evaluation and a license if given.

    Raises:
      UserError: as `from_model`, `add_evaluation` and `write`.
    """
    if os.fspath(folder).startswith("hf://"):
        raise UserError(
            f"{folder} is not on this machine: flip convert import {folder} FOLDER, and write its card there"
        )
    card = from_model(folder)
    card["license"] = license_name or card["license"]
    if evaluation:
        add_evaluation(card, evaluation)
    write(folder, card)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    options.add_model(parser, "folder of a run, of one of its steps, or of a converted or exported model")
    parser.add_argument(
        "--evaluation", metavar="FILE", help="what flip evaluate --json wrote (default: the run's last evaluation)"
    )
    parser.add_argument("--license", metavar="NAME", help="the model's license by the hub's name, such as apache-2.0")


def main(arguments: argparse.Namespace) -> None:
    """Write the card and print where."""
    logging.getLogger().setLevel(logging.ERROR)
    update(arguments.model, arguments.evaluation, arguments.license)
    print(f"{arguments.model}: {MARKDOWN} and {JSON}")
