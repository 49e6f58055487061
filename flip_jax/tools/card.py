"""Model cards: README.md for people, as Hugging Face shows it, and card.json for programs, beside a model's weights.

python -m flip_jax.card --workdir=RUN [--evaluation=FILE.json] [--license=apache-2.0]

writes those of a run. `flip_jax.convert` writes them with every model; to these, too, the command adds an evaluation
and a licence.
"""

import hashlib
import json
import logging
import math
import os
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags
from etils import epath
from flax import nnx
from huggingface_hub import EvalResult, ModelCardData

from flip_jax import checkpoint, config_check, metrics, models
from flip_jax.config import Config
from flip_jax.data.tokenizer import ClipTokenizer, Tokenizer

JSON, MARKDOWN = "card.json", "README.md"
TASKS = {"zeroshot": "zero-shot-image-classification", "classify": "image-classification"}  # as the hub calls them
Card = dict[str, Any]


def describe(config: Config, tokenizer: Tokenizer | None, origin: str) -> Card:
    """What a model's settings and tokenizer tell: the card of one whose training is not known."""
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
        "kind": "CLIP's byte pairs" if isinstance(tokenizer, ClipTokenizer) else "WordPiece",
        "entries": tokenizer.vocab_size,
        "from": config.data.vocab or "trained on the captions",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def of(path: str | os.PathLike) -> Card:
    """The card of a run's newest step, or of one step; for a converted or exported model the one that lies there.

    Raises:
      ValueError: it is none of these.
    """
    folder = epath.Path(path)
    if (folder / JSON).exists() and not (folder / "checkpoints").is_dir():
        return json.loads((folder / JSON).read_text())
    step = checkpoint.newest(path)
    config = config_check.from_flat(checkpoint.read_json(step, "config"))
    tokenizer = None if config.finetune.classes else Tokenizer.from_json(checkpoint.read_json(step, "tokenizer"))
    if step.parent.name != "checkpoints":
        return describe(config, tokenizer, "weights of unknown training")
    card, run = describe(config, tokenizer, "trained with flip_jax"), step.parent.parent
    if (run / JSON).exists():
        earlier = json.loads((run / JSON).read_text())
        if earlier["step"] == int(step.name):  # with what it was given
            return earlier
        card["license"] = earlier["license"]
    lines = [line for line in metrics.read_metrics(run) if line["step"] <= int(step.name)]
    records = next((line for line in reversed(lines) if "data/read" in line), {})
    results = next((line for line in reversed(lines) if "loss" not in line), None)
    card |= {
        "step": int(step.name),
        "samples_seen": int(step.name) * config.global_batch_size,
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


def add_evaluation(card: Card, path: str) -> None:
    """Puts the numbers of a file that `flip_jax.evaluate --json` wrote in place of those that are there.

    Raises:
      ValueError: it is no such file, or has no results.
    """
    try:
        report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        tasks = report["results"].items()
        results = {f"{task}/{metric}": value for task, metrics in tasks for metric, value in metrics.items()}
        card["evaluation"] = {"model": report["model"], "results": results | report["means"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--evaluation {path!r} is not what `python -m flip_jax.evaluate --json` writes: {error!r}"
        ) from error
    if not results:
        raise ValueError(f"--evaluation {path!r} has no results")


def write(folder: str | os.PathLike, card: Card) -> None:
    """Writes both files into the folder, over those of an earlier card.

    Raises:
      ValueError: there is a README.md that is no card.
    """
    folder = epath.Path(folder)
    if (folder / MARKDOWN).exists() and not (folder / JSON).exists():
        raise ValueError(f"{folder / MARKDOWN} is there already and is no model card; move it away")
    (folder / JSON).write_text(json.dumps(card, indent=1) + "\n")
    (folder / MARKDOWN).write_text(markdown(card, os.path.basename(os.path.abspath(folder))))


def markdown(card: Card, name: str) -> str:
    """The README.md: front matter as Hugging Face reads it, and what card.json says in words."""
    config, blank = config_check.from_flat(card["config"]), "not known"
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
        facts |= {
            "samples seen": f"{card['samples_seen']:,}, in {card['step']:,} steps of {config.global_batch_size:,}",
            "seen in training": f"{image.visible_patches} of {patches} patches ({image.mask})"
            + (f", {text.visible_tokens} of {text.context_length} tokens" if "text" in card["parameters"] else ""),
            "started from": config.init_from or "random weights",
            "loss": config.model.loss if not config.finetune.classes else "cross-entropy",
            "training data": f"`{data['train']}`",
            "records": ", ".join(f"{count:,} {kind}" for kind, count in data["records"].items()) or blank,
        }
    else:
        facts |= {"samples seen": blank, "training data": blank}
    lines = [
        "---",
        _front_matter(card, name, results),
        "---",
        "",
        f"# {name}",
        "",
        "A classifier of pictures." if config.finetune.classes else "An image-text model of CLIP's kind.",
        "All settings are in card.json.",
        "",
        "```python",
        _snippet(card),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        "## Evaluation",
        "",
    ]
    if results:
        lines += [f"Of {evaluation['model']}.", "", "| | |", "|---|---|"]
        lines += [f"| `{key}` | {value:.2f} |" for key, value in results.items()]
    else:
        lines += ["None is known."]
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
    return 'import flip_jax\n\nmodel = flip_jax.load("FOLDER")'


def update(folder: str | os.PathLike, evaluation: str | None = None, license_name: str | None = None) -> None:
    """Writes the card of a run, or anew that of a model which has one, with an evaluation and a licence if given.

    Raises:
      ValueError: as `of`, `add_evaluation` and `write`.
    """
    card = of(folder)
    card["license"] = license_name or card["license"]
    if evaluation:
        add_evaluation(card, evaluation)
    write(folder, card)


def main(_) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    try:
        update(_WORKDIR.value, _EVALUATION.value, _LICENSE.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{_WORKDIR.value}: {MARKDOWN} and {JSON}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Folder of a run, or of a converted or exported model", required=True
    )
    _EVALUATION = flags.DEFINE_string(
        "evaluation", None, "What flip_jax.evaluate --json wrote (default: the run's last)"
    )
    _LICENSE = flags.DEFINE_string("license", None, "The model's licence, as Hugging Face calls it; you decide")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    app.run(main)
