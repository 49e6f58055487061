"""Our own portable folder: model.safetensors, config.json, tokenizer.json."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flip_jax
from flip_jax import config_check
from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, tensors, tokenizer_files
from flip_jax.runtime import UserError

KIND = "flip_jax"  # config.json's model_type
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16}


def write(
    folder: pathlib.Path,
    params: Any,
    config: Config,
    tokenizer: Tokenizer | None,
    class_names: tuple[str, ...] | None = None,
    dtype: str = "float32",
    shard: int = tensors.SHARD,
) -> None:
    """Writes a model into an empty folder; files of weights hold at most `shard` bytes each."""
    arrays = {name: np.asarray(value) for name, value in flat(params).items()}
    names.check_finite(arrays)
    tensors.write(folder, {name: value.astype(DTYPES[dtype]) for name, value in arrays.items()}, shard)
    content = {
        "model_type": KIND,
        "flip_jax_version": flip_jax.__version__,
        "dtype": dtype,
        "class_names": None if class_names is None else list(class_names),
        "tokenizer_fill": None if tokenizer is None else tokenizer.to_json().get("fill"),
        "config": config_check.flatten(config),
    }
    tensors.write_json(folder / "config.json", content)
    if tokenizer:
        tensors.write_json(folder / tokenizer_files.TOKENIZER, tokenizer_files.for_others(tokenizer))


def read_json(folder: pathlib.Path, content: Mapping[str, Any], item: str) -> Any:
    """Returns what a step's folder holds under the name `item`; UserError if the files are damaged."""
    if not isinstance(content.get("config"), Mapping):
        raise UserError(f'{folder / "config.json"} has no settings under "config": it is damaged')
    if item == "class_names":
        found = content.get("class_names")
        if not (found is None or (isinstance(found, list) and all(isinstance(name, str) for name in found))):
            raise UserError(f"{folder / 'config.json'}: class_names must be a list of names")
        return found
    if item == "config":
        return content["config"]
    path, fill = folder / tokenizer_files.TOKENIZER, content.get("tokenizer_fill")
    if not path.exists() and content["config"].get("finetune.classes"):
        return {}
    found = tensors.read_object(path, "the tokenizers library's file")
    return found if fill is None else {"library": found, "fill": fill}


def flat(params: Any) -> dict[str, Any]:
    """Returns {"image.cls": array, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
