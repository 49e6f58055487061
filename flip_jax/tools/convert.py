"""Weights of other code bases to ours and back:

python -m flip_jax.convert official CHECKPOINT_DIR OUT --config=configs/flip_l16.py --config.data.vocab=VOCAB
python -m flip_jax.convert open-clip-import FILE.safetensors OUT --open_clip_config=JSON --vocab=MERGES
python -m flip_jax.convert open-clip-export WORKDIR_OR_STEP OUT_DIR

OUT is a step's folder, as training writes them: for `flip_jax.load` and `config.init_from`. Each has a model card.
"""

import dataclasses
import logging
import os
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from flip_jax import checkpoint, config_check
from flip_jax.config import Config, DataConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.tools import card
from flip_jax.tools.compat import official, open_clip

_CONFIG = config_flags.DEFINE_config_file("config", None, "official: the recipe of the checkpoint", lock_config=True)
_OPEN_CLIP_CONFIG = flags.DEFINE_string("open_clip_config", None, "open-clip-import: the model's open_clip_config.json")
_VOCAB = flags.DEFINE_string("vocab", None, "open-clip-import: bpe_simple_vocab_16e6.txt.gz, as open_clip has it")


def from_official(folder: str, out: str) -> None:
    """Converts a released checkpoint with the recipe and vocabulary of the flags."""
    if _CONFIG.value is None:
        raise ValueError("official needs --config, the recipe that the checkpoint was trained with")
    config = config_check.from_config_dict(_CONFIG.value)
    if not config.data.vocab:
        raise ValueError("official needs --config.data.vocab, the vocab.txt of BERT base uncased, 30,522 lines")
    tokenizer = _tokenizer(config)
    checkpoint.write(out, official.load(folder, config.model), tokenizer, config)
    card.write(out, card.describe(config, tokenizer, f"converted from the official checkpoint {folder}"))


def from_open_clip(file: str, out: str) -> None:
    """Converts a safetensors file with the configuration and byte pairs of the flags."""
    if not (_OPEN_CLIP_CONFIG.value and _VOCAB.value):
        raise ValueError("open-clip-import needs --open_clip_config and --vocab")
    model, params = open_clip.import_model(pathlib.Path(file), pathlib.Path(_OPEN_CLIP_CONFIG.value))
    config = Config(model=model, data=DataConfig(vocab=_VOCAB.value))
    tokenizer = _tokenizer(config)
    checkpoint.write(out, params, tokenizer, config)
    card.write(out, card.describe(config, tokenizer, f"converted from the open_clip model {file}"))


def to_open_clip(path: str, out: str) -> None:
    """Writes the newest step of a workdir, or one step, as open_clip loads it."""
    step = checkpoint.newest(path)
    config = config_check.from_flat(checkpoint.read_json(step, "config"))
    if config.finetune.classes:
        raise ValueError(
            f"{path} is a classifier (config.finetune.classes): open_clip holds image and text towers only"
        )
    tokenizer = Tokenizer.from_json(checkpoint.read_json(step, "tokenizer"))
    # What reconstructs pictures in training is no part of the model that open_clip gets.
    model = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, weight=0.0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), official.abstract_params(model)
    )
    params = checkpoint.read_params(step, abstract, start_of=model)
    for note in open_clip.export_model(pathlib.Path(out), model, params, tokenizer):
        print(f"note: {note}")
    card.write(out, card.of(path) | {"library": "open_clip"})


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer, size = Tokenizer.from_vocab(config.data.vocab), config.model.text.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f"{config.data.vocab} has {tokenizer.vocab_size} entries, the model's text.vocab_size is {size}"
        )
    return tokenizer


COMMANDS = {"official": from_official, "open-clip-import": from_open_clip, "open-clip-export": to_open_clip}


def main(argv: list[str]) -> None:
    if len(argv) != 4 or argv[1] not in COMMANDS:
        raise app.UsageError(f"expected one of {', '.join(COMMANDS)}, then what to read and what to write")
    logging.getLogger().setLevel(logging.ERROR)
    _, command, source, out = argv
    try:
        COMMANDS[command](source, out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{source} -> {out}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # arrays are only moved
    app.run(main)
