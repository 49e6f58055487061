"""Folders of models that are no run's: which kind each is, and its settings, tokenizer and weights by our names."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from flip_jax import config_check
from flip_jax.config import Config, ModelConfig
from flip_jax.formats import (
    names,
    open_clip,
    portable,
    tensors,
    timm,
    tokenizer_files,
    transformers_models,
    transformers_settings,
)
from flip_jax.runtime import UserError, is_remote

CONFIG = "config.json"


def find(path: str | os.PathLike) -> epath.Path:
    """Finds the folder of a model that no run has written; of hf://ORG/NAME[@REVISION] it is downloaded.

    Raises:
      UserError: the folder holds no model, or one that is unknown here.
    """
    text = os.fspath(path)
    if text.startswith("hf://"):
        from flip_jax.formats import hub

        folder = hub.fetch(text)
    else:
        folder = pathlib.Path(text).expanduser().absolute()
        if folder.is_file() and folder.suffix == ".safetensors":
            timm.config(folder)  # refuses what is none
            return epath.Path(folder)
    if not _is_one(folder):
        missing = "" if is_remote(text) or folder.exists() else " (there is no such file or folder)"
        raise UserError(
            f"{text} holds no checkpoint{missing}: expected a workdir with checkpoints/STEP, such a STEP folder, a "
            f"folder with {CONFIG} and {tensors.WEIGHTS}, hf://ORG/NAME, or, to start a run, a safetensors file of timm"
        )
    _kind(folder)
    return epath.Path(folder)


def _is_one(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, open_clip.SETTINGS))


def _kind(folder: pathlib.Path) -> tuple[str, Mapping[str, Any]]:
    """Returns "flip_jax", "open_clip" or "transformers", and the content of config.json where that matters."""
    content: Mapping[str, Any] = {}
    if (folder / CONFIG).is_file():
        content = tensors.read_object(folder / CONFIG, "a model's settings")
        if content.get("model_type") == portable.KIND:
            return portable.KIND, content
    if (folder / open_clip.SETTINGS).is_file():
        if (folder / open_clip.WEIGHTS).is_file():
            return "open_clip", content
        if not content:
            raise UserError(f"{folder} has no {open_clip.WEIGHTS}. {open_clip.SAVE}")
    return "transformers", content


def read_json(step: epath.Path, item: str) -> Any:
    """Returns what a step's folder holds under the name `item`: config, tokenizer or class_names."""
    folder = pathlib.Path(step)
    if folder.is_file():
        return {"config": config_check.flatten(timm.config(folder)), "tokenizer": {}}.get(item)
    if not _is_one(folder):
        raise UserError(f"{step} has no {item}: the checkpoint is damaged; use another step")
    kind, content = _kind(folder)
    if kind == portable.KIND:
        return portable.read_json(folder, content, item)
    if item == "class_names":
        return None
    model = _model(folder, kind, content)
    if item == "config":
        return config_check.flatten(Config(model=model))
    tokenizer = tokenizer_files.read(folder, model.text)
    if kind == "transformers":
        transformers_settings.check_tokenizer(content, tokenizer, tokenizer_files.end_of(tokenizer), str(folder))
    return tokenizer.to_json()


def _model(folder: pathlib.Path, kind: str, content: Mapping[str, Any]) -> ModelConfig:
    if kind == "open_clip":
        # Next to its weights, the configuration is the one that open_clip itself reads, with its defaults.
        return open_clip.read_settings(folder / open_clip.SETTINGS, folder / open_clip.WEIGHTS, ask=False)
    return transformers_settings.model_settings(content, folder)


def shapes(step: epath.Path) -> Any:
    """Returns the shapes of a folder's weights, as a tree by our names."""
    folder = pathlib.Path(step)
    if folder.is_file():
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), timm.params(folder))
    kind, content = _kind(folder)
    if kind != portable.KIND:
        return names.abstract_params(_model(folder, kind, content))
    tree: dict[str, Any] = {}
    for name, shape in tensors.Tensors(tensors.find(folder)).shapes().items():
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, "float32")
    return tree


def _params_of_others(folder: pathlib.Path) -> dict[str, Any]:
    """Reads all weights of another library's model by our names."""
    if folder.is_file():
        return timm.params(folder)
    kind, content = _kind(folder)
    model = _model(folder, kind, content)
    if kind == "open_clip":
        return open_clip.read_params(model, folder / open_clip.WEIGHTS, folder / open_clip.SETTINGS)
    return transformers_models.read_params(model, folder)


def read_params(step: epath.Path, wanted: Any) -> Any:
    """Reads the weights of a folder, laid out as the abstract tree `wanted` says; each process reads its part."""
    folder = pathlib.Path(step)
    ours = folder.is_dir() and _kind(folder)[0] == portable.KIND
    file = tensors.Tensors(tensors.find(folder)) if ours else None
    params = {} if ours else portable.flat(_params_of_others(folder))
    arrays = {name: jax.device_get(value) for name, value in params.items()}

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        part = functools.partial(file.read, name) if file else arrays[name].__getitem__
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(place, wanted)
