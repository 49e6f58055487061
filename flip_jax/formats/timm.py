"""Image towers of timm, one safetensors file: ViTs of MAE, AugReg, DINO, as the start of ours (config.init_from)."""

import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flip_jax.config import Config, FinetuneConfig, ImageConfig, ModelConfig
from flip_jax.formats import tensors
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

HEAD = 64  # width of an attention head in timm's ViTs, which no shape shows
_PREFIX = re.compile(r"^(?:module|model|backbone|encoder|visual\.trunk)\.")
_BLOCK = {
    "norm1": ("norm1", ("scale", "bias")),
    "norm2": ("norm2", ("scale", "bias")),
    "mlp1": ("mlp.fc1", ("kernel", "bias")),
    "mlp2": ("mlp.fc2", ("kernel", "bias")),
    "out": ("attn.proj", ("kernel", "bias")),
}
_LEAVES = {"scale": "weight", "kernel": "weight", "bias": "bias"}


def _read(file: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the image tower's parameters by our names, and the names in the file that have no place in it.

    Raises:
      UserError: the file holds no ViT by timm's names.
    """
    opened = tensors.Tensors([file])
    names = {_PREFIX.sub("", name): name for name in opened.shapes()}

    def take(name: str) -> np.ndarray:
        if name not in names:
            raise UserError(
                f"{file} has no {name}: it must be a ViT of timm's, vit_base_patch16_224 or such; of any other model "
                "give the folder"
            )
        return opened.read(names.pop(name))

    kernel = take("patch_embed.proj.weight")
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        raise UserError(f"{file}: patch_embed.proj.weight {kernel.shape} must be [width, 3, size, size]")
    tower = {"patch_kernel": kernel.transpose(2, 3, 1, 0), "pos_embed": take("pos_embed")}
    if "patch_embed.proj.bias" in names:
        tower["patch_bias"] = take("patch_embed.proj.bias")
    if "cls_token" in names:
        tower["cls"] = take("cls_token")
        if math.isqrt(tower["pos_embed"].shape[1]) ** 2 == tower["pos_embed"].shape[1]:  # none for cls
            tower["pos_embed"] = np.pad(tower["pos_embed"], [(0, 0), (1, 0), (0, 0)])
    if "norm_pre.weight" in names:
        tower["pre_norm"] = {leaf: take(f"norm_pre.{_LEAVES[leaf]}") for leaf in ("scale", "bias")}
    depth = 1 + max((int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    layers = [_block(f"blocks.{i}", names, take) for i in range(depth)]
    if not layers:
        raise UserError(f"{file} has no blocks.0: it must be a ViT of timm's, vit_base_patch16_224 or such")
    last = "norm" if "norm.weight" in names else "fc_norm"  # of the mean, where timm pools before its norm
    norm = {leaf: take(f"{last}.{_LEAVES[leaf]}") for leaf in ("scale", "bias")}
    tower["transformer"] = {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers), "norm": norm}
    return tower, sorted(names)


def _block(prefix: str, names: Mapping[str, str], take: Any) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for ours, (theirs, leaves) in _BLOCK.items():
        arrays = {leaf: take(f"{prefix}.{theirs}.{_LEAVES[leaf]}") for leaf in leaves}
        block[ours] = {leaf: array.T if leaf == "kernel" else array for leaf, array in arrays.items()}
    kernel = take(f"{prefix}.attn.qkv.weight").T
    bias_name = f"{prefix}.attn.qkv.bias"
    bias = take(bias_name) if bias_name in names else np.zeros(kernel.shape[1], np.float32)
    for name, w, b in zip(("query", "key", "value"), np.split(kernel, 3, axis=1), np.split(bias, 3), strict=True):
        block[name] = {"kernel": np.ascontiguousarray(w), "bias": b}
    for ours, scale in (("out", "ls1.gamma"), ("mlp2", "ls2.gamma")):  # layer scale (DINOv2), which ours has not
        if f"{prefix}.{scale}" in names:
            gamma = take(f"{prefix}.{scale}")
            block[ours] = {leaf: value * gamma for leaf, value in block[ours].items()}
    return block


def config(file: pathlib.Path) -> Config:
    """Returns settings with the image tower of a file; as of a classifier, whose other settings nobody takes."""
    tower, _ = _read(file)
    size, _, _, width = tower["patch_kernel"].shape
    grid = math.isqrt(tower["pos_embed"].shape[1])
    hidden = tower["transformer"]["blocks"]["mlp1"]["kernel"].shape[2]
    image = ImageConfig(
        image_size=grid * size,
        patch_size=size,
        width=width,
        depth=len(tower["transformer"]["blocks"]["norm1"]["scale"]),
        heads=max(1, width // HEAD),
        mask_ratio=0.0,
        patch_bias="patch_bias" in tower,
        positions="learned",
        pre_norm="pre_norm" in tower,
        mlp_width=0 if hidden == 4 * width else hidden,
    )
    return Config(model=ModelConfig(image=image, activation="gelu"), finetune=FinetuneConfig(classes=1))


def alone(path: str | os.PathLike) -> UserError:
    """Makes the error of a program that needs more than an image tower."""
    return UserError(f"{os.fspath(path)} is an image tower alone: start a run with it, --config.init_from=FILE")


def params(file: pathlib.Path) -> dict[str, Any]:
    """Reads the weights of a file by our names, and logs those that have no place."""
    tower, rest = _read(file)
    if rest:
        _log.info("%s: skipped weights that the image tower has no place for: %s", file, ", ".join(rest))
    return {"image": tower}
