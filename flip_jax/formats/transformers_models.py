"""Weights of transformers' CLIPModel and SiglipModel: theirs read by our names, and ours written by theirs."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax.config import ModelConfig
from flip_jax.data.library_tokenizer import LibraryTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, tensors, tokenizer_files
from flip_jax.formats.transformers_settings import preprocessor_settings, transformers_settings

_BUFFERS = re.compile(r"(vision|text)_model\.embeddings\.position_ids")  # constants of earlier versions
_PATCHES = "vision_model.embeddings.patch_embedding"


def read_params(model: ModelConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Reads the weights of a folder; UserError, with both sides, where names or shapes differ."""
    file = tensors.Tensors(tensors.find(folder))
    shapes = {name: shape for name, shape in file.shapes().items() if not _BUFFERS.fullmatch(name)}
    return names.to_ours(to_transformers, model, shapes, file.read, folder, folder / "config.json")


def to_transformers(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns {transformers' name: array} for an architecture that it has. Linear: it only moves numbers."""
    image, text = params["image"], params["text"]
    named = {
        f"{_PATCHES}.weight": image["patch_kernel"].transpose(3, 2, 0, 1),
        "vision_model.embeddings.position_embedding.weight": image["pos_embed"].reshape(image["pos_embed"].shape[1:]),
        "text_model.embeddings.token_embedding.weight": text["token_embed"],
        "text_model.embeddings.position_embedding.weight": text["pos_embed"].reshape(text["pos_embed"].shape[1:]),
        **names.norm("vision_model.post_layernorm", image["transformer"]["norm"]),
        **names.norm("text_model.final_layer_norm", text["transformer"]["norm"]),
        **_blocks("vision_model", image["transformer"]["blocks"]),
        **_blocks("text_model", text["transformer"]["blocks"]),
    }
    if "map_head" in image:  # SiglipModel
        named |= {f"{_PATCHES}.bias": image["patch_bias"], **_map_head(image["map_head"])}
        named |= names.dense("text_model.head", params["text_projection"])
        return named | {name: params[name] for name in ("logit_scale", "logit_bias")}
    named |= {
        "vision_model.embeddings.class_embedding": image["cls"].reshape(-1),
        **names.norm("vision_model.pre_layrnorm", image["pre_norm"]),  # their spelling
        **names.dense("visual_projection", params["image_projection"]),
        **names.dense("text_projection", params["text_projection"]),
    }
    return named | {"logit_scale": params["logit_scale"].reshape(())}


def _blocks(tower: str, stacked: Mapping[str, Any]) -> dict[str, Any]:
    named = {}
    for i, block in enumerate(names.layers(stacked)):
        prefix = f"{tower}.encoder.layers.{i}"
        named |= names.norm(f"{prefix}.layer_norm1", block["norm1"]) | names.norm(
            f"{prefix}.layer_norm2", block["norm2"]
        )
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            named |= names.dense(f"{prefix}.self_attn.{theirs}", block[ours])
        named |= names.dense(f"{prefix}.mlp.fc1", block["mlp1"]) | names.dense(f"{prefix}.mlp.fc2", block["mlp2"])
    return named


def _map_head(head: Mapping[str, Any]) -> dict[str, Any]:
    inputs = [head[name] for name in ("query", "key", "value")]
    return {
        "vision_model.head.probe": head["probe"],
        "vision_model.head.attention.in_proj_weight": jnp.concatenate([x["kernel"].T for x in inputs]),
        "vision_model.head.attention.in_proj_bias": jnp.concatenate([x["bias"] for x in inputs]),
        **names.dense("vision_model.head.attention.out_proj", head["out"]),
        **names.norm("vision_model.head.layernorm", head["norm"]),
        **names.dense("vision_model.head.mlp.fc1", head["mlp1"]),
        **names.dense("vision_model.head.mlp.fc2", head["mlp2"]),
    }


def export_model(
    folder: pathlib.Path, model: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> list[str]:
    """Writes config.json, model.safetensors, the tokenizer's files and preprocessor_config.json; returns notes.

    Raises:
      UserError: transformers cannot express the architecture (the message says why), or the weights are not finite.
    """
    settings = transformers_settings(model, tokenizer_files.end_of(tokenizer))
    image = names.fold_positions(model, params["image"]) if model.image.pool == "cls" else dict(params["image"])
    if model.image.pool == "map" and "patch_bias" not in image:
        image["patch_bias"] = jnp.zeros(model.image.width)
    scale = names.clipped_scale(model, params["logit_scale"])  # transformers does not clip it
    weights = to_transformers({**params, "image": image, "logit_scale": scale})
    arrays = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    names.check_finite(arrays)
    tensors.write_json(folder / "config.json", settings)
    tensors.write_json(folder / "preprocessor_config.json", preprocessor_settings(model))
    tokenizer_files.write(folder, tokenizer, model.text)
    tensors.write(folder, arrays)
    if not isinstance(tokenizer, LibraryTokenizer):
        return ["texts are tokenised by tokenizer.json: the same ids except for rare letters"]
    return []
