"""Convert models: those of other libraries and of the hub to a portable folder, and ours to where they are served.

flip convert export RUN OUT [--format=transformers|open_clip|onnx] [--dtype=bfloat16]
flip convert import FROM OUT

RUN is a run, one of its steps, a portable folder or hf://ORG/NAME[@REVISION]. FROM is a folder or hf://ORG/NAME of
open_clip or of transformers' CLIP or SigLIP; a safetensors file of open_clip with --open_clip_config and --vocab; or a
released FLIP checkpoint with --config and --config.data.vocab. OUT, a new folder, is portable if no --format is given:
model.safetensors, config.json, tokenizer.json and a card, for flip_jax.load, --model and config.init_from.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from flip_jax import config_check, lock, models, runtime, saved_config, saved_step, weights
from flip_jax.config import Config, DataConfig
from flip_jax.data import vocabulary
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import open_clip, portable, timm, transformers_models
from flip_jax.runtime import UserError
from flip_jax.tools import card
from flip_jax.tools.compat import official

EXAMPLE = "flip convert export runs/b16 exported"
FORMATS = ("flip_jax", "open_clip", "transformers", "onnx")
# Names of earlier versions.
EARLIER = {"official": "import", "open-clip-import": "import", "open-clip-export": "export"}


class Model(NamedTuple):
    """A model in memory; a classifier has no tokenizer, and names of its classes."""

    config: Config
    params: Any
    tokenizer: Tokenizer | None
    class_names: tuple[str, ...] | None


def read(path: str, vocab: str = "") -> Model:
    """Read a run's newest step, one step, or any model that `flip_jax.load` reads; `vocab` replaces its tokenizer."""
    step = saved_step.newest(path)
    if step.is_file():
        raise timm.alone(path)
    config = saved_config.read(step)
    if vocab:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, vocab=vocab))
    tokenizer = _tokenizer(config) if vocab else saved_step.tokenizer(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))[1])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    return Model(config, weights.read_params(step, abstract), tokenizer, weights.read_class_names(step))


def from_official(folder: str, config: Config) -> Model:
    """Read a released checkpoint, given the recipe that it was trained with and BERT's vocabulary."""
    if not config.data.vocab:
        raise UserError(
            f"{folder} is a checkpoint of the official code, which needs --config.data.vocab, the vocab.txt of BERT "
            "base uncased, 30,522 lines"
        )
    tokenizer = _tokenizer(config)
    return Model(config, official.load(folder, config.model), tokenizer, None)


def from_open_clip(file: str, settings: str, vocab: str, activation: str = "") -> Model:
    """Read a safetensors file, given open_clip's JSON configuration and its byte pairs."""
    model, params = open_clip.import_model(pathlib.Path(file), pathlib.Path(settings), activation)
    config = Config(model=model, data=DataConfig(vocab=vocab))
    return Model(config, params, _tokenizer(config), None)


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer, size = vocabulary.read(config.data.vocab, config.model.text), config.model.text.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{config.data.vocab} has {tokenizer.vocab_size} entries, but the model's text.vocab_size is only {size}"
        )
    return tokenizer


def export(path: str, out: str, kind: str = "flip_jax", dtype: str = "float32") -> None:
    """Write a model as a portable folder, or as another library loads it."""
    model = read(path)
    described = card.from_model(path) | {"library": kind}
    _write(out, model, described, kind, dtype)


def import_model(arguments: argparse.Namespace) -> None:
    """Write a model of another library, or of the hub, as a portable folder."""
    source, activation = arguments.source, arguments.activation
    if source.endswith((".safetensors", *open_clip.tensors.PICKLES)):
        if not (arguments.open_clip_config and arguments.vocab):
            raise UserError(
                f"{source} alone does not say which model it is: give --open_clip_config and --vocab, or name the "
                "folder that holds it with its config.json"
            )
        model = from_open_clip(source, arguments.open_clip_config, arguments.vocab, activation)
        origin = f"converted from the open_clip model {source}"
    elif arguments.config or os.path.isfile(os.path.join(source, "checkpoint")):
        if not arguments.config:
            raise UserError(
                f"{source} is a checkpoint of the official code, which needs --config, the recipe that it had"
            )
        config = config_check.read_recipe([f"--config={arguments.config}", *arguments.config_changes])
        model, origin = from_official(source, config), f"converted from the official checkpoint {source}"
    else:
        model, origin = read(source, arguments.vocab or ""), f"converted from {source}"
    _write(arguments.out, model, card.describe(model.config, model.tokenizer, origin), "flip_jax", arguments.dtype)


def _write(out: str, model: Model, described: card.Card, kind: str, dtype: str) -> None:
    with new_folder(out) as folder:
        if kind == "flip_jax":
            portable.write(folder, model.params, model.config, model.tokenizer, model.class_names, dtype)
        else:
            for note in _export_elsewhere(folder, model, kind):
                print(f"note: {runtime.plain(note)}")
        card.write(folder, described, os.path.basename(os.path.abspath(out)))


def _export_elsewhere(folder: pathlib.Path, model: Model, kind: str) -> list[str]:
    """Write a model as another library loads it; return notes for the user."""
    if model.config.finetune.classes:
        raise UserError(
            f"this model is a classifier (config.finetune.classes), but {kind} holds only models with two towers here"
        )
    # The decoder only serves training, and other libraries have no place for it.
    decoder = dataclasses.replace(model.config.model.decoder, weight=0.0)
    config = dataclasses.replace(model.config.model, decoder=decoder)
    params = {name: part for name, part in model.params.items() if name != "decoder"}
    if kind == "open_clip":
        return open_clip.export_model(folder, config, params, model.tokenizer)
    if kind == "onnx":
        from flip_jax.formats import onnx_towers  # needs an extra

        return onnx_towers.export_model(folder, config, params, model.tokenizer)
    return transformers_models.export_model(folder, config, params, model.tokenizer)


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[pathlib.Path]:
    """Yield a folder that becomes OUT at the end; after an error nothing of it is left.

    Raises:
      UserError: OUT exists and is not empty, or cannot be written.
    """
    final = pathlib.Path(out).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"OUT {out!r} already exists; use another folder")
    partial = final.with_name(f".{final.name}.partial")
    clean = functools.partial(shutil.rmtree, partial, ignore_errors=True)
    clean()  # of a command that was killed; the lock keeps others out
    runtime.at_end.insert(0, clean)  # Ctrl-C does not come back here; before the lock is released
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(final)
    except OSError as error:
        raise UserError(f"OUT {out!r} cannot be written ({error.strerror or error}): use another folder") from None
    finally:
        runtime.at_end.remove(clean)
        clean()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; `--config.KEY=VALUE` is collected by the command line itself."""
    parser.add_argument("conversion", choices=("export", "import", *EARLIER), metavar="export|import", help="direction")
    parser.add_argument("source", metavar="SOURCE", help="what to read: RUN or FROM, above")
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    parser.add_argument("--format", choices=FORMATS, default="flip_jax", help="export: for which library")
    parser.add_argument(
        "--dtype", choices=list(portable.DTYPES), default="float32", help="of the weights in a portable folder"
    )
    parser.add_argument(
        "--config", metavar="RECIPE", help="official checkpoint: configs/NAME.py[:ARG]; --config.KEY=VALUE changes it"
    )
    parser.add_argument("--open_clip_config", metavar="JSON", help="open_clip file: the model's configuration")
    parser.add_argument(
        "--activation", choices=("gelu", "quick_gelu"), default="", help="open_clip file: if the JSON does not say it"
    )
    parser.add_argument("--vocab", metavar="FILE", help="vocabulary, in place of the model's tokenizer.json")


def main(arguments: argparse.Namespace) -> None:
    """Run one conversion and print what it wrote."""
    logging.getLogger().setLevel(logging.ERROR)
    source, out = arguments.source, arguments.out
    if arguments.dtype != "float32" and arguments.format != "flip_jax":
        raise UserError(
            f"--dtype={arguments.dtype} is for a portable folder; --format={arguments.format} writes float32"
        )
    with lock.hold(f"{os.path.normpath(out)}.lock", f"OUT {out!r}"):
        if EARLIER.get(arguments.conversion, arguments.conversion) == "import":
            import_model(arguments)
        else:
            kind = "open_clip" if arguments.conversion in EARLIER else arguments.format
            export(source, out, kind, arguments.dtype)
    print(f"{source} -> {out}")
