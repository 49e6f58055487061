"""Convert weights from the official code, and from and to open_clip.

flip convert official CHECKPOINT_DIR OUT --config=configs/flip_l16.py --config.data.vocab=VOCAB
flip convert open-clip-import FILE.safetensors OUT --open_clip_config=JSON --vocab=MERGES
flip convert open-clip-export MODEL OUT

The first two write OUT as the folder of a step, for flip_jax.load and config.init_from; the last writes a folder that
open_clip loads. Each has a model card.
"""

import argparse
import dataclasses
import logging
import os
import pathlib

import jax

from flip_jax import config_check, lock, runtime, saved_config, saved_step, weights
from flip_jax.config import Config, DataConfig
from flip_jax.data import vocabulary
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError
from flip_jax.tools import card
from flip_jax.tools.compat import official, open_clip

EXAMPLE = "flip convert open-clip-export runs/b16 exported"
COMMANDS = ("official", "open-clip-import", "open-clip-export")


def from_official(folder: str, out: str, config: Config) -> None:
    """Convert a released checkpoint, given the recipe that it was trained with and BERT's vocabulary."""
    if not config.data.vocab:
        raise UserError("official needs --config.data.vocab, the vocab.txt of BERT base uncased, 30,522 lines")
    tokenizer = _tokenizer(config)
    _write(out, official.load(folder, config.model), tokenizer, config)
    card.write(out, card.describe(config, tokenizer, f"converted from the official checkpoint {folder}"))


def from_open_clip(file: str, out: str, settings: str, vocab: str, activation: str = "") -> None:
    """Convert a safetensors file, given open_clip's JSON configuration and its byte pairs."""
    model, params = open_clip.import_model(pathlib.Path(file), pathlib.Path(settings), activation)
    config = Config(model=model, data=DataConfig(vocab=vocab))
    tokenizer = _tokenizer(config)
    _write(out, params, tokenizer, config)
    card.write(out, card.describe(config, tokenizer, f"converted from the open_clip model {file}"))


def _write(out, params, tokenizer, config):
    try:
        weights.write(out, params, tokenizer, config)
    except OSError as error:
        raise UserError(f"OUT {out!r} cannot be written ({error.strerror or error}): use another folder") from error


def to_open_clip(path: str, out: str) -> None:
    """Write the newest step of a run, or one step, as open_clip loads it."""
    step = saved_step.newest(path)
    config, tokenizer = saved_config.read(step), saved_step.tokenizer(step)
    if config.finetune.classes:
        raise UserError(
            f"{path} is a classifier (config.finetune.classes), but open_clip holds only models with two towers"
        )
    # The decoder only serves training, and open_clip has no place for it.
    model = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, weight=0.0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), official.abstract_params(model)
    )
    params = weights.read_params(step, abstract, start_of=model)
    for note in open_clip.export_model(pathlib.Path(out), model, params, tokenizer):
        print(f"note: {runtime.plain(note)}")
    card.write(out, card.from_model(path) | {"library": "open_clip"})


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer, size = vocabulary.read(config.data.vocab), config.model.text.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"{config.data.vocab} has {tokenizer.vocab_size} entries, but the model's text.vocab_size is only {size}"
        )
    return tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; `--config.KEY=VALUE` is collected by the command line itself."""
    parser.add_argument("conversion", choices=COMMANDS, help="what to convert")
    parser.add_argument("source", metavar="SOURCE", help="folder or file to read")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--config", metavar="RECIPE", help="official: configs/NAME.py[:ARG]; --config.KEY=VALUE changes a setting"
    )
    parser.add_argument("--open_clip_config", metavar="JSON", help="open-clip-import: the model's configuration")
    parser.add_argument(
        "--activation", choices=("gelu", "quick_gelu"), default="", help="open-clip-import: if the JSON does not say it"
    )
    parser.add_argument("--vocab", metavar="FILE", help="open-clip-import: open_clip's bpe_simple_vocab_16e6.txt.gz")


def main(arguments: argparse.Namespace) -> None:
    """Run one conversion and print what it wrote."""
    logging.getLogger().setLevel(logging.ERROR)
    source, out = arguments.source, arguments.out
    with lock.hold(f"{os.path.normpath(out)}.lock", f"OUT {out!r}"):
        _convert(arguments, source, out)
    print(f"{source} -> {out}")


def _convert(arguments, source, out):
    if arguments.conversion == "official":
        if not arguments.config:
            raise UserError("official needs --config, the recipe that the checkpoint was trained with")
        config = config_check.read_recipe([f"--config={arguments.config}", *arguments.config_changes])
        from_official(source, out, config)
    elif arguments.conversion == "open-clip-import":
        if not (arguments.open_clip_config and arguments.vocab):
            raise UserError("open-clip-import needs --open_clip_config and --vocab")
        from_open_clip(source, out, arguments.open_clip_config, arguments.vocab, arguments.activation)
    else:
        to_open_clip(source, out)
