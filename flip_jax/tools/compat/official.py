"""Read the weights of the released FLIP checkpoints, which t5x wrote, under our names."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from flip_jax.config import ModelConfig
from flip_jax.formats.names import abstract_params
from flip_jax.models.vit import sincos_2d
from flip_jax.runtime import UserError

MAX_INDEX_BYTES = 2**26  # limit for the file that names the arrays; the released models need far less
_TOWERS = {"image": "img_encoder", "text": "txt_encoder"}
_NORM, _DENSE = ("scale", "bias"), ("kernel", "bias")
_BLOCK = {
    "norm1": ("LayerNorm_0", _NORM),
    "norm2": ("LayerNorm_1", _NORM),
    "mlp1": ("MlpBlock_0/Dense_0", _DENSE),
    "mlp2": ("MlpBlock_0/Dense_1", _DENSE),
    **{name: (f"MultiHeadDotProductAttention_0/{name}", _DENSE) for name in ("query", "key", "value", "out")},
}
# Our parameters and the official ones. Each layer of a stacked parameter is an official one, with number {:02}.
NAMES = {
    "logit_scale": "logit_scale",
    "image_projection/kernel": "img_mlp1/kernel",
    "text_projection/kernel": "txt_mlp1/kernel",
    "image/cls": "img_encoder/cls",
    "image/patch_kernel": "img_encoder/embedding/kernel",
    "image/patch_bias": "img_encoder/embedding/bias",
    "text/token_embed": "txt_encoder/token_embedding/embedding",
}
for _ours, _theirs in _TOWERS.items():
    NAMES[f"{_ours}/pos_embed"] = f"{_theirs}/posembed_encoder/pos_embedding"
    for _leaf in _NORM:
        NAMES[f"{_ours}/transformer/norm/{_leaf}"] = f"{_theirs}/Transformer/encoder_norm/{_leaf}"
    for _layer, (_official, _leaves) in _BLOCK.items():
        for _leaf in _leaves:
            name = f"{_theirs}/Transformer/encoderblock_{{:02}}/{_official}/{_leaf}"
            NAMES[f"{_ours}/transformer/blocks/{_layer}/{_leaf}"] = name
POSITIONS = NAMES["image/pos_embed"]


def to_ours(official: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turn {official name: array} into {"image/cls": array, ...} with stacked layers; UserError for unknown names."""
    rest, found = dict(official), {}
    for ours, template in NAMES.items():
        layers = []
        while (name := template.format(len(layers))) in rest:
            layers.append(rest.pop(name))
        if layers:
            found[ours] = np.stack(layers) if "{" in template else np.asarray(layers[0])
    if rest:
        raise UserError(f"unknown parameters, not FLIP's: {', '.join(sorted(rest))}")
    return found


def load(folder: str | pathlib.Path, model: ModelConfig) -> dict[str, Any]:
    """Read the weights of a folder checkpoint_STEP as nested dicts of f32 arrays, without the optimizer's state.

    A position table of another size is recomputed for the model's size, as the official code does.

    Raises:
      UserError: files are missing or damaged, or names or shapes differ from the model's (both sides are listed).
    """
    folder = pathlib.Path(folder).absolute()
    leaves = _index(folder)
    stores = {name: _open(folder, name, leaf) for name, leaf in leaves.items()}
    theirs = {name: tuple(store.shape) for name, store in stores.items()}
    ours = _shapes(model)
    rebuilt = POSITIONS in theirs and theirs[POSITIONS] != ours.get(POSITIONS, theirs[POSITIONS])
    differences = [
        f"  {name}: checkpoint {theirs.get(name)}, config.model {ours.get(name)} (None: absent)"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and not (rebuilt and name == POSITIONS)
    ]
    if differences:
        raise UserError(f"The weights in {folder} do not fit config.model:\n" + "\n".join(differences))
    arrays = {name: _read(folder, name, store) for name, store in stores.items()}
    if rebuilt:
        image = model.image
        arrays[POSITIONS] = sincos_2d(image.image_size // image.patch_size, image.width)
    return unflatten_dict(to_ours(arrays), sep="/")


def _index(folder: pathlib.Path) -> dict[str, Any]:
    """Return {official name: where its array is}."""
    path = folder / "checkpoint"
    if not path.is_file():
        raise UserError(f"{folder} has no file 'checkpoint': it must be a folder checkpoint_STEP of the official code")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, more than {MAX_INDEX_BYTES}: this is no t5x checkpoint"
        )
    try:
        content = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises many kinds of errors on damaged bytes
        raise UserError(f"{path} is damaged or no t5x checkpoint: {type(error).__name__}: {error}") from None
    optimizer = content.get("optimizer") if isinstance(content, Mapping) else None
    target = optimizer.get("target") if isinstance(optimizer, Mapping) else None
    if not isinstance(target, Mapping):
        raise UserError(f"{path} is damaged or no t5x checkpoint: it has no parameters under optimizer/target")
    return flatten_dict(target, sep="/", is_leaf=lambda _, value: "driver" in value)


def _open(folder: pathlib.Path, name: str, leaf: Any) -> Any:
    """Open an array without reading it; it must lie next to the index, wherever its specification points."""
    if isinstance(leaf, np.ndarray):
        if not jnp.issubdtype(leaf.dtype, np.number):
            raise UserError(f"{folder}: {name} must hold numbers, got {leaf.dtype}")
        return leaf
    own = "target." + name.replace("/", ".")
    try:
        driver, path = leaf["driver"], pathlib.PurePosixPath(leaf["kvstore"]["path"]).name
        shape, dtype = tuple(leaf["metadata"]["shape"]), leaf["dtype"]
    except (KeyError, TypeError):  # the file decides what is in `leaf`
        raise UserError(f"{folder}: the specification of {name} is damaged: {leaf!r}") from None
    if driver != "zarr" or dtype != "float32" or path != own:
        raise UserError(f"{folder}: {name} must be a float32 zarr in {own}, got {dtype} {driver} in {path!r}")
    place = folder / own
    if not (place / ".zarray").is_file() or place.resolve().parent != folder.resolve():
        raise UserError(f"{place} with its .zarray must be in the folder of the checkpoint, but is missing")
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
    }
    try:
        store = tensorstore.open(spec, open=True).result()
    except Exception as error:  # tensorstore raises a different type for every failure
        raise UserError(f"{place / '.zarray'} is damaged: {error}") from None
    if tuple(store.shape) != shape or store.dtype.name != dtype:
        raise UserError(f"{place}: .zarray says {store.dtype.name} {store.shape}, 'checkpoint' {dtype} {shape}")
    chunk = store.chunk_layout.read_chunk.shape
    if any(c > max(1, n) for c, n in zip(chunk, shape, strict=True)):  # reading any part unpacks a whole chunk
        raise UserError(f"{place}: an array of {shape} in chunks of {chunk}, larger than itself, is damaged")
    return store


def _read(folder: pathlib.Path, name: str, store: Any) -> np.ndarray:
    array = store
    if not isinstance(store, np.ndarray):
        try:
            array = store.read().result()
        except Exception as error:  # tensorstore raises a different type for every failure
            raise UserError(f"{folder}: {name} has missing or damaged chunks: {error}") from None
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{folder}: {name} holds values that are not finite")
    return array


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {official name: shape} of the model's parameters; those without a counterpart keep our name."""
    shapes = {}
    for name, leaf in flatten_dict(abstract_params(model), sep="/").items():
        template = NAMES.get(name, name)
        layered = "{" in template
        for layer in range(leaf.shape[0] if layered else 1):
            shapes[template.format(layer)] = leaf.shape[1:] if layered else leaf.shape
    return shapes
