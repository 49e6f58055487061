"""The weights of a step's folder: read for a model, adapted to one that starts from them, or written alone."""

import dataclasses
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

# What fine-tuning takes from the model in `init_from`; the image size is the run's own.
IMAGE_TOWER = ("width", "depth", "heads", "patch_size", "pool", "patch_bias", "positions", "pre_norm", "pixel_stats")
RESIZED = ("image.pos_embed", "image.patch_kernel")  # what `read_params` resizes for a model that it starts


def write(folder: str | os.PathLike, params: Any, tokenizer: Tokenizer, config: Config):
    """Writes a step's folder of weights alone, as `newest` and `read_params` take it.

    Raises:
      UserError: the folder exists.
    """
    folder = absolute(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; use another folder")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        for item, content in (("tokenizer", tokenizer.to_json()), ("config", config_check.flatten(config))):
            checkpointer.save(folder / item, args=ocp.args.JsonSave(content))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"params": params})
    manifest.write(folder)


def read_class_names(step: epath.Path) -> tuple[str, ...] | None:
    """Reads the class names of a classifier's labels, () if it was trained on numbers; None in older checkpoints."""
    return tuple(read_json(step, "class_names")) if (step / "class_names").exists() else None


def check_start(config: Config, step: epath.Path) -> None:
    """Raises UserError, before anything is compiled, where the weights of a step cannot start this run."""
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))[1])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = stored_arrays.checked(step, checkpointer.metadata(step / "state").item_metadata)
    _compare(step, {name: part for name, part in params.items() if name != "head"}, saved, config.model)


def with_tower_of(config: Config, step: epath.Path) -> Config:
    """Returns the config of a fine-tuning with the image tower of a step's model."""
    ours, theirs = config.model, saved_config.read(step).model
    image = {key: getattr(theirs.image, key) for key in IMAGE_TOWER}
    taken = [f"{key} {value}" for key, value in image.items() if value != getattr(ours.image, key)]
    if taken:
        _log.info("the image tower of %s: %s", step, ", ".join(taken))
    model = dataclasses.replace(
        ours,
        image=dataclasses.replace(ours.image, **image),
        activation=theirs.activation,
        norm_eps=theirs.norm_eps,
    )
    return saved_config.from_flat(config_check.flatten(dataclasses.replace(config, model=model)))


def read_params(step: epath.Path, params: Any, start_of: ModelConfig | None = None) -> Any:
    """Reads only the weights of a step's folder, laid out as the abstract tree `params` says.

    Where another model, `start_of`, starts from them, weights that belong to an image or patch size are resized to its
    own, and weights that it does not use (a decoder, the text tower of a classifier) are skipped.

    Raises:
      UserError: names or shapes that differ, both sides.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = stored_arrays.checked(step, checkpointer.metadata(step / "state").item_metadata)
        unused, resized = _compare(step, params, saved, start_of)
        if unused:
            _log.info("%s: skipped weights this model does not use: %s", step, ", ".join(sorted(unused)))

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

        wanted = {"params": jax.tree_util.tree_map_with_path(as_saved, params)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        restored = checkpointer.restore(step / "state", args=args)["params"]
        return jax.tree_util.tree_map_with_path(as_ours, params, restored)


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
    return vit.sincos_2d(grid, config.width)  # rebuilt, as the official code does


def resize_patch_kernel(kernel_PxPx3xD: np.ndarray, patch_size: int) -> np.ndarray:
    """Resizes the kernel to another patch size: it responds to a resized patch as the old one did to the patch.

    Exact for larger patches, least squares for smaller ones (pseudo-inverse; FlexiViT, arXiv 2212.08013).
    """
    old, _, channels, width = kernel_PxPx3xD.shape
    by_side = np.asarray(jax.image.resize(np.eye(old, dtype=np.float32), (patch_size, old), "linear"), np.float64)
    back = np.linalg.pinv(np.kron(by_side, by_side).T)  # [patch_size**2, old**2]
    resized = back @ np.asarray(kernel_PxPx3xD, np.float64).reshape(old**2, channels * width)
    return resized.reshape(patch_size, patch_size, channels, width).astype(np.float32)
