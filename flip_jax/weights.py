"""The weights of a step's folder: read for a model, adapted to one that starts from them, or written alone."""

import logging
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import config_check, manifest, models, saved_config, stored_arrays
from flip_jax.checkpoint import absolute
from flip_jax.config import Config, ImageConfig, ModelConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import vit
from flip_jax.runtime import UserError
from flip_jax.saved_step import differences, read_json

_log = logging.getLogger(__name__)

# Settings of a model that are no part of its architecture, and groups of those that a classifier has not.
OWN = (
    "model.image.image_size",
    "model.image.mask",
    "model.image.mask_ratio",
    "model.text.mask",
    "model.text.mask_ratio",
    "model.text.mask_counts",
    "model.init_logit_scale",
    "model.dtype",
    "model.remat",
    "model.attention",
    "model.unroll",
)
PAIRED = ("model.text.", "model.embed_dim", "model.projection", "model.loss")
RESIZED = ("image.pos_embed", "image.patch_kernel")  # what `read_params` resizes for a model that it starts


def write(
    folder: str | os.PathLike,
    params: Any,
    tokenizer: Tokenizer | None,
    config: Config,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Writes a step's folder of weights alone, as `newest` and `read_params` take it; a classifier has no tokenizer.

    Raises:
      UserError: the folder exists.
    """
    folder = absolute(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; use another folder")
    items = {"tokenizer": tokenizer.to_json() if tokenizer else {}, "config": config_check.flatten(config)}
    if class_names is not None:
        items["class_names"] = list(class_names)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        for item, content in items.items():
            checkpointer.save(folder / item, args=ocp.args.JsonSave(content))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"params": params})
    manifest.write(folder)


def read_class_names(step: epath.Path) -> tuple[str, ...] | None:
    """Reads the class names of a classifier's labels, () if it was trained on numbers; None in older checkpoints."""
    names = read_json(step, "class_names") if (step / "class_names").exists() or _is_portable(step) else None
    return None if names is None else tuple(names)


def check_start(config: Config, step: epath.Path) -> None:
    """Raises UserError, before anything is compiled, where the weights of a step cannot start this run."""
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))[1])
    _, saved = _shapes(step)
    _compare(step, _startable(params, saved), saved, config.model)


def with_model_of(config: Config, step: epath.Path) -> Config:
    """Returns the config with the architecture of a step's model, of its image tower alone where one has no other."""
    written = saved_config.read(step)
    ours, theirs = config_check.flatten(config), config_check.flatten(written)
    groups = ("model.decoder.", *(PAIRED if config.finetune.classes or written.finetune.classes else ()))
    shared = (key for key in ours if key.startswith("model.") and not key.startswith(groups))
    taken = {key: theirs[key] for key in shared if key not in OWN}
    if changes := [f"{key} {value}" for key, value in taken.items() if value != ours[key]]:
        _log.info("from %s: %s", step, ", ".join(changes))
    return saved_config.from_flat(ours | taken)


def read_params(step: epath.Path, params: Any, start_of: ModelConfig | None = None) -> Any:
    """Reads only the weights of a step's folder, their average where the run kept one, laid out as `params` says.

    Where another model, `start_of`, starts from them, weights that belong to an image or patch size are resized to its
    own, weights that it does not use (a decoder, the text tower of a classifier) are skipped, and so are those that it
    must learn: a classifier's head, and all but the image tower where the step has no other.

    Raises:
      UserError: names or shapes that differ, both sides.
    """
    part, saved = _shapes(step)
    ours = _startable(params, saved) if start_of else params
    unused, resized = _compare(step, ours, saved, start_of)
    if unused:
        _log.info("%s: skipped weights this model does not use: %s", step, ", ".join(sorted(unused)))
    if fresh := sorted(params.keys() - ours.keys()):
        _log.info("%s has no weights for %s, trained from scratch", step, ", ".join(fresh))

    def as_saved(path, leaf):
        if (name := _name(path)) not in resized:
            return leaf
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(resized[name], leaf.dtype, sharding=whole)

    def as_ours(path, leaf, value):
        if (name := _name(path)) not in resized:
            return value
        value = resize_weight(start_of.image, name.removeprefix("image."), np.asarray(value))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    restored = _read(step, part, jax.tree_util.tree_map_with_path(as_saved, ours))
    return jax.tree_util.tree_map_with_path(as_ours, ours, restored)


def _is_portable(step: epath.Path) -> bool:
    """Tells whether a folder holds a model of another kind than a step."""
    return not (step / "state").is_dir()


def _shapes(step: epath.Path) -> tuple[str, Any]:
    """Returns the name of a folder's weights, and their names and shapes."""
    if _is_portable(step):
        from flip_jax.formats import folders

        return "", folders.shapes(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return stored_arrays.checked(step, checkpointer.metadata(step / "state").item_metadata)


def _read(step: epath.Path, part: str, wanted: Any) -> Any:
    """Reads the weights of a folder that the abstract tree `wanted` names, laid out as it says."""
    if _is_portable(step):
        from flip_jax.formats import folders

        return folders.read_params(step, wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args({part: wanted})
        args = ocp.args.PyTreeRestore({part: wanted}, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(step / "state", args=args)[part]


def _startable(params: dict[str, Any], saved: Any) -> dict[str, Any]:
    """Returns the parts of a model that weights may start: the image tower where they have no other, and no head."""
    alone = "text" not in saved
    return {name: part for name, part in params.items() if name == "image" or not (alone or name == "head")}


def _compare(step: epath.Path, params: Any, saved: Any, start_of: ModelConfig | None) -> tuple[set[str], dict]:
    """Finds the parts of `saved` that `params` has no use for, and the shapes of weights to resize.

    Raises:
      UserError: names or shapes that differ otherwise.
    """
    ours, theirs = (
        {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, saved)
    )
    unused: set[str] = set()
    resized = {}
    if start_of:
        unused = {name.partition(".")[0] for name in theirs} - set(params)
        theirs = {name: shape for name, shape in theirs.items() if name.partition(".")[0] not in unused}
        resized = {name: theirs[name] for name in RESIZED if name in theirs and theirs[name] != ours[name]}
    unfit = [
        f"  {name}: checkpoint {saved_shape}, model {our_shape} (None: absent)"
        for name, saved_shape, our_shape in differences(theirs, ours)
        if name not in resized
    ]
    if unfit:
        raise UserError(f"The weights in {step} do not fit config.model:\n" + "\n".join(unfit))
    return unused, resized


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def resize_weight(config: ImageConfig, name: str, value: np.ndarray) -> np.ndarray:
    """Resizes a weight ("pos_embed" or "patch_kernel") of a tower of another image or patch size to this one."""
    if name == "patch_kernel":
        return resize_patch_kernel(value, config.patch_size)
    grid = config.image_size // config.patch_size
    if config.positions == "learned":
        return np.asarray(vit.resize_positions(value, grid))
    return vit.sincos_2d(grid, config.width)[:, int(config.pool == "map") :]  # rebuilt, as the official code does


def resize_patch_kernel(kernel_PxPx3xD: np.ndarray, patch_size: int) -> np.ndarray:
    """Resizes the kernel to another patch size: it responds to a resized patch as the old one did to the patch.

    Exact for larger patches, least squares for smaller ones (pseudo-inverse; FlexiViT, arXiv 2212.08013).
    """
    old, _, channels, width = kernel_PxPx3xD.shape
    by_side = np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (patch_size, old), "linear"), np.float64)
    back = np.linalg.pinv(np.kron(by_side, by_side).T)  # [patch_size**2, old**2]
    resized = back @ np.asarray(kernel_PxPx3xD, np.float64).reshape(old**2, channels * width)
    return resized.reshape(patch_size, patch_size, channels, width).astype(np.float32)
