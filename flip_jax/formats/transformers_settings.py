"""Translates the config.json of transformers' CLIP and SigLIP to our settings and back, or says why it cannot."""

import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, tensors
from flip_jax.models.vit import PIXEL_STATS
from flip_jax.runtime import UserError

_TOWER = {"num_attention_heads": 12, "num_hidden_layers": 12}
# transformers' defaults of the settings that are read; a config.json may leave them out.
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": (
        _TOWER
        | {"hidden_size": 768, "intermediate_size": 3072, "image_size": 224, "patch_size": 32, "num_channels": 3}
        | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        _TOWER
        | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49_408}
        | {"max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49_407},
    ),
    "siglip": (
        _TOWER
        | {"hidden_size": 768, "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "num_channels": 3}
        | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
        _TOWER
        | {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 32_000, "max_position_embeddings": 64}
        | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "projection_size": None},
    ),
}
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh"}
# The nearest of what is read, for models that are not.
RELATIVES = {
    "siglip2": "siglip (SigLIP 2 of fixed resolution has that model_type)",
    "clip_vision_model": "clip, with both towers",
    "clip_text_model": "clip, with both towers",
    "siglip_vision_model": "siglip, with both towers",
    "siglip_text_model": "siglip, with both towers",
    **dict.fromkeys(("align", "altclip", "chinese_clip", "clipseg", "metaclip_2", "xclip", "blip"), "clip"),
    "vit": "timm's ViT, as config.init_from=FILE.safetensors",
    "dinov2": "timm's ViT, as config.init_from=FILE.safetensors",
    "flip_jax_onnx": "the model that these files were exported from",
}
LARGEST = 2  # an eos_token_id of configurations that means the largest id of a row instead


def model_settings(content: Mapping[str, Any], folder: pathlib.Path) -> ModelConfig:
    """Translates a folder's config.json, with the preprocessor_config.json next to it.

    Raises:
      UserError: our settings cannot express the model; the message names the setting, or the nearest known model.
    """
    source = str(folder / "config.json")
    given = content.get("model_type")
    kind = "vit" if given is None and "architecture" in content else str(given)  # that is how timm names a model
    if kind not in DEFAULTS:
        near = RELATIVES.get(kind) or next(iter(difflib.get_close_matches(kind, DEFAULTS, n=1)), "clip")
        raise UserError(
            f"{source}: models of model_type {given!r} are unknown here; the nearest that is read is {near}. Read are "
            "transformers' clip and siglip, open_clip's (open_clip_config.json) and folders of flip convert export"
        )

    def refuse(key, value, allowed):
        raise UserError(f"{source}: {key} {value!r} cannot be expressed here; only {allowed} can")

    towers = []
    for key, defaults in zip(("vision_config", "text_config"), DEFAULTS[kind], strict=True):
        groups = [content.get(name) or {} for name in (key, f"{key}_dict")]  # the second overrules the first
        if not all(isinstance(group, Mapping) for group in groups):
            refuse(key, groups, "groups of settings")
        given = {name: value for group in groups for name, value in group.items()}
        tower = defaults | {name: value for name, value in given.items() if name in defaults and value is not None}
        for name, default in defaults.items():
            kinds = (int, float) if isinstance(default, float) else type(default) if default is not None else int
            if tower[name] is not None and (
                not isinstance(tower[name], kinds) or isinstance(tower[name], bool) != (default is True)
            ):
                refuse(f"{key}.{name}", tower[name], f"a value like {default!r}")
            if isinstance(tower[name], int) and abs(tower[name]) > names.LARGEST:
                refuse(f"{key}.{name}", tower[name], "numbers up to 2**31")
        if tower["hidden_act"] not in ACTIVATIONS:
            refuse(f"{key}.hidden_act", tower["hidden_act"], ", ".join(ACTIVATIONS))
        tower["hidden_act"] = ACTIVATIONS[tower["hidden_act"]]
        towers.append(tower)
    vision, text = towers
    if vision["num_channels"] != 3:
        refuse("vision_config.num_channels", vision["num_channels"], "3")
    for key in ("hidden_act", "layer_norm_eps"):
        if vision[key] != text[key]:
            refuse(key, (vision[key], text[key]), "the same in both towers")
    clip = kind == "clip"
    if clip:
        embed = content.get("projection_dim", 512)
        if type(embed) is not int:
            refuse("projection_dim", embed, "a whole number")
    else:
        if not vision["vision_use_head"]:
            refuse("vision_config.vision_use_head", False, "a tower with its head")
        embed = text["projection_size"] or text["hidden_size"]
        if embed != vision["hidden_size"]:
            refuse("text_config.projection_size", embed, "the width of the image tower")
    return names.checked(
        source,
        image=ImageConfig(
            **_sizes(vision),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            mask_ratio=0.0,
            pool="cls" if clip else "map",
            patch_bias=not clip,
            positions="learned",
            pre_norm=clip,
            pixel_stats=_pixel_stats(folder, "openai" if clip else "inception"),
        ),
        text=TextConfig(
            **_sizes(text),
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            pool="last" if clip else "final",
            causal=clip,
        ),
        embed_dim=embed,
        projection="both" if clip else "text",
        loss="info_nce" if clip else "sigmoid",
        activation=vision["hidden_act"],
        norm_eps=float(vision["layer_norm_eps"]),
        dtype="float32",
    )


def _sizes(tower: Mapping[str, Any]) -> dict[str, int]:
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    sizes = {"width": width, "depth": tower["num_hidden_layers"], "heads": tower["num_attention_heads"]}
    return sizes | {"mlp_width": 0 if hidden == 4 * width else hidden}


def _pixel_stats(folder: pathlib.Path, usual: str) -> str:
    """Returns the entry of `PIXEL_STATS` that preprocessor_config.json names; the `usual` one without that file."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return usual
    content = tensors.read_object(path, "transformers' settings of an image processor")
    mean, std = PIXEL_STATS[usual]
    given = [content.get("image_mean", list(mean)), content.get("image_std", list(std))]
    for name, stats in PIXEL_STATS.items():
        if given == [list(x) for x in stats]:
            return name
    raise UserError(
        f"{path}: image_mean and image_std {given} cannot be expressed here; only those of {', '.join(PIXEL_STATS)} can"
    )


def check_tokenizer(content: Mapping[str, Any], tokenizer: Tokenizer, end: int | None, source: str) -> None:
    """Raises UserError where CLIPModel would pool another token than ours, the last one that is not padding."""
    if content.get("model_type") != "clip":
        return
    wanted = (content.get("text_config") or {}).get("eos_token_id", DEFAULTS["clip"][1]["eos_token_id"])
    if wanted == LARGEST:
        wanted = tokenizer.vocab_size - 1
    if end != wanted:
        raise UserError(
            f"{source}: CLIPModel pools the token of id {wanted} (text_config.eos_token_id; 2: the largest), but the "
            f"tokenizer ends a text by {end}: use the tokenizer that the model was trained with"
        )


def transformers_settings(model: ModelConfig, end: int | None) -> dict[str, Any]:
    """Returns the config.json of a model, given the id that ends each text.

    Raises:
      UserError: neither CLIPModel nor SiglipModel can express the model; the message lists what is in the way of each.
    """
    image, text = model.image, model.text
    common = {
        "model.image.pre_norm": image.pre_norm,
        "model.text.causal": text.causal,
        "model.text.pool": text.pool,
        "model.image.pool": image.pool,
        "model.projection": model.projection,
        "model.loss": model.loss,
        "model.text.mask_padding": text.mask_padding,
    }
    wanted = {
        "clip": (True, True, "last", "cls", "both", "info_nce", False),
        "siglip": (False, False, "final", "map", "text", "sigmoid", False),
    }
    unlike = {
        kind: [
            f"config.{key} {value!r}, not {want!r}"
            for (key, value), want in zip(common.items(), values, strict=True)
            if value != want
        ]
        for kind, values in wanted.items()
    }
    if not unlike["clip"] and end is None:
        unlike["clip"] = ["a tokenizer without a token that ends each text (config.data.vocab)"]
    kind = min(unlike, key=lambda kind: len(unlike[kind]))
    if unlike[kind]:
        raise UserError(
            f"transformers' {CLASSES[kind]} cannot express this model: {'; '.join(unlike[kind])}. Train with "
            "--config=configs/flip_b16.py:clip_layout to export to transformers, or use --format=open_clip, which can "
            "express FLIP's own"
        )
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation)
    towers = [
        {
            "model_type": f"{kind}_{name}_model",
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width or 4 * tower.width,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads,
            "hidden_act": activation,
            "layer_norm_eps": model.norm_eps,
        }
        for name, tower in (("vision", image), ("text", text))
    ]
    towers[0] |= {"image_size": image.image_size, "patch_size": image.patch_size, "num_channels": 3}
    towers[1] |= {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    if kind == "clip":
        towers = [tower | {"projection_dim": model.embed_dim} for tower in towers]
        towers[1] |= {"eos_token_id": end}
    else:
        towers[1] |= {"projection_size": model.embed_dim}
    content: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "dtype": "float32"}
    content |= {"projection_dim": model.embed_dim} if kind == "clip" else {}
    return content | {"vision_config": towers[0], "text_config": towers[1]}


def preprocessor_settings(model: ModelConfig) -> dict[str, Any]:
    """Returns the preprocessor_config.json of a model: our centre crop, resized with transformers' bicubic."""
    size = model.image.image_size
    mean, std = PIXEL_STATS[model.image.pixel_stats]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
