"""Translates open_clip's configuration of a model to our settings and back, or say why it cannot be done."""

from collections.abc import Mapping
from typing import Any

from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.data.clip_tokenizer import ClipTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names
from flip_jax.models.vit import PIXEL_STATS
from flip_jax.runtime import UserError

OWN_TOKENIZER = 49_408  # entries of the byte pairs that come with open_clip
EPS = 1e-5  # open_clip's default for norms
# open_clip's settings of a tower with their defaults. Those that `model_settings` does not translate must keep them.
_BLOCK = {
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "final_ln_after_pool": False,
    "block_type": None,
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False
    ),
}
_VISION = _BLOCK | {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "patch_size": 16,
    "image_size": 224,
    "patch_dropout": 0.0,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "attentional_pool": False,
    "timm_model_name": None,
}
_TEXT = _BLOCK | {
    "context_length": 77,
    "vocab_size": 49_408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "embed_cls": False,
    "proj_bias": False,
    "proj_type": "linear",
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "hf_model_name": None,
}
_TOP = {"embed_dim": None, "vision_cfg": None, "text_cfg": None, "quick_gelu": False, "init_logit_bias": None}
# These do not affect a loaded model, or are only read together with another setting that is refused.
_IDLE = (
    "output_tokens custom_text init_logit_scale nonscalar_logit_scale attn_pooler_queries attn_pooler_heads pad_id "
    "eos_id timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path hf_model_pretrained "
    "hf_proj_type hf_pooler_type"
).split()
_TRANSLATED = (
    "layers width head_width heads patch_size image_size patch_dropout no_ln_pre pos_embed_type pool_type act_kwargs "
    "norm_kwargs mlp_ratio context_length vocab_size no_causal_mask embed_dim vision_cfg text_cfg quick_gelu "
    "init_logit_bias"
).split()
_PREPROCESSING = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
# They may be lists, or need their own message.
_LISTS = ("layers", "image_size", "patch_size")
_POOLS = {"cls": "tok", "patches": "avg"}
_POSITIONS = {"learned": "learnable", "sincos": "sin_cos_2d"}


def model_settings(content: Mapping[str, Any], source: str) -> ModelConfig:
    """Translates a configuration, {"model_cfg": ..., "preprocess_cfg": ...} or only the value of "model_cfg".

    Raises:
      UserError: our settings cannot express it; the message names the setting of `source`.
    """
    top = _filled(content.get("model_cfg", content), _TOP, source)
    vision, text = (
        _filled(top[key] or {}, known, f"{source}: {key}")
        for key, known in (("vision_cfg", _VISION), ("text_cfg", _TEXT))
    )

    def refuse(key, value, allowed):
        raise UserError(f"{source}: {key} {value!r} cannot be expressed here; only {allowed} can")

    size, patch = (
        x[0] if isinstance(x, list) and x and all(y == x[0] for y in x) else x
        for x in (vision["image_size"], vision["patch_size"])
    )
    for key, value in (
        ("image_size", size),
        ("patch_size", patch),
        ("layers", vision["layers"]),
        ("embed_dim", top["embed_dim"]),
    ):
        if type(value) is not int:
            refuse(key, value, "one integer (square images, a vision transformer)")
    if vision["head_width"] < 1:
        refuse("vision_cfg.head_width", vision["head_width"], "a positive integer")
    hidden = []
    for tower in (vision, text):
        units = tower["width"] * tower["mlp_ratio"]
        if not 1 <= units <= names.LARGEST:  # nor is it no number
            refuse("mlp_ratio", tower["mlp_ratio"], "one that gives the MLPs a unit or more")
        hidden.append(0 if int(units) == 4 * tower["width"] else int(units))  # rounded as open_clip does
    causal = not text["no_causal_mask"]
    pool = {theirs: ours for ours, theirs in _POOLS.items()}.get(vision["pool_type"])
    positions = {theirs: ours for ours, theirs in _POSITIONS.items()}.get(vision["pos_embed_type"])
    text_pool = {"argmax": "last", "first": None if causal else "first"}.get(text["pool_type"])
    if pool is None:
        refuse("vision_cfg.pool_type", vision["pool_type"], "'tok' and 'avg'")
    if positions is None:
        refuse("vision_cfg.pos_embed_type", vision["pos_embed_type"], "'learnable' and 'sin_cos_2d'")
    if text_pool is None:
        refuse("text_cfg.pool_type", text["pool_type"], "'argmax', and 'first' with no_causal_mask,")
    activations, eps = [], []
    for tower in (vision, text):
        act, norm = tower["act_kwargs"] or {}, tower["norm_kwargs"] or {}
        if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (top["quick_gelu"] and act):
            refuse("act_kwargs", act, "'approximate' of GELU, 'none' or 'tanh',")
        if not isinstance(norm, dict) or norm.keys() - {"eps"}:
            refuse("norm_kwargs", norm, "'eps'")
        gelu = "gelu_tanh" if act.get("approximate") == "tanh" else "gelu"
        activations.append("quick_gelu" if top["quick_gelu"] else gelu)
        eps.append(norm.get("eps", EPS))
    if activations[0] != activations[1] or eps[0] != eps[1]:
        refuse("activation and eps of the towers", (activations, eps), "the same in both")
    return names.checked(
        source,
        image=ImageConfig(
            image_size=size,
            patch_size=patch,
            width=vision["width"],
            depth=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            mlp_width=hidden[0],
            mask_ratio=float(vision["patch_dropout"]),
            pool=pool,
            patch_bias=False,
            positions=positions,
            pre_norm=not vision["no_ln_pre"],
            pixel_stats=_pixel_stats(content.get("preprocess_cfg", {}), source),
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
            mlp_width=hidden[1],
            pool=text_pool,
            causal=causal,
        ),
        embed_dim=top["embed_dim"],
        loss="info_nce" if top["init_logit_bias"] is None else "sigmoid",
        activation=activations[0],
        norm_eps=eps[0],
        dtype="float32",
    )


def _filled(content: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a group of settings completed by their defaults; UserError for what cannot be expressed."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a group of settings, got {content!r}")
    for key, value in content.items():
        if key in _IDLE:
            continue
        if key not in known:
            raise UserError(f"{where}: {key} = {value!r} cannot be expressed here; it is unknown")
        default = known[key]
        if isinstance(value, int) and abs(value) > names.LARGEST:
            raise UserError(f"{where}: {key} = {value} cannot be expressed here; only numbers up to 2**31 can")
        if key not in _TRANSLATED and value not in (default, {}, "default"):
            raise UserError(f"{where}: {key} = {value!r} cannot be expressed here; only {default!r} can")
        kind = float | int if isinstance(default, float) else type(default)
        if key in _TRANSLATED and key not in _LISTS and default is not None and not isinstance(value, kind):
            raise UserError(f"{where}: {key} must be like {default!r}, got {value!r}")
    return {**known, **content}


def _pixel_stats(preprocessing: Any, source: str) -> str:
    """Returns the entry of `PIXEL_STATS` that a preprocess_cfg names."""
    found, others = [], {}
    if isinstance(preprocessing, Mapping):
        mean, std = PIXEL_STATS["openai"]
        given = [list(mean), list(std)]
        for i, key in enumerate(("mean", "std")):
            given[i] = preprocessing.get(key, given[i])
        found = [name for name, stats in PIXEL_STATS.items() if [list(x) for x in stats] == given]
        others = {k: v for k, v in preprocessing.items() if k in _PREPROCESSING and v != _PREPROCESSING[k]}
    if not found or others:
        raise UserError(
            f"{source}: preprocess_cfg {preprocessing!r} cannot be expressed here; only {_PREPROCESSING} and the mean "
            f"and std of {', '.join(PIXEL_STATS)} can"
        )
    return found[0]


def open_clip_settings(model: ModelConfig, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """Returns open_clip's configuration of a model, and notes; UserError if it cannot express the model."""
    image, text, notes = model.image, model.text, []
    if text.pool == "mean":
        raise UserError("config.model.text.pool 'mean': open_clip's text tower pools one token, never the mean")
    if text.mask_padding:
        raise UserError("config.model.text.mask_padding: open_clip's CLIP has no padding mask in its text tower")
    siglips = {"image.pool": (image.pool, "map"), "text.pool": (text.pool, "final")}
    siglips |= {"projection": (model.projection, "text")}
    if parts := [f"config.model.{key} {value!r}" for key, (value, theirs) in siglips.items() if value == theirs]:
        raise UserError(
            f"{', '.join(parts)}: open_clip's own towers have none of SigLIP's parts, which it takes from timm; use "
            "--format=transformers"
        )
    byte_pairs = isinstance(tokenizer, ClipTokenizer)
    if text.pool == "last" and not byte_pairs:
        raise UserError(
            "config.model.text.pool 'last': open_clip takes the token with the highest id for the last one, which only "
            "holds for CLIP's byte pairs"
        )
    text_cfg = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "no_causal_mask": not text.causal,
        "pool_type": {"first": "first", "last": "argmax"}[text.pool],
    }
    vision_cfg = {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.depth,
        "head_width": image.width // image.heads,
        "no_ln_pre": not image.pre_norm,
        "pos_embed_type": "learnable" if image.patch_bias else _POSITIONS[image.positions],
    }
    for tower, cfg in ((image, vision_cfg), (text, text_cfg)):
        if tower.mlp_width:  # open_clip rounds width x ratio down
            cfg["mlp_ratio"] = round((tower.mlp_width + 0.5) / tower.width, 6)
    if image.pool == "mean":
        vision_cfg |= {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 1}
        notes.append(
            f"embeddings have {model.embed_dim + 1} entries, the last of them 0: an attentional pool includes cls"
        )
    else:
        vision_cfg["pool_type"] = _POOLS[image.pool]
    if model.norm_eps != EPS:
        text_cfg["norm_kwargs"] = {"eps": model.norm_eps}
        if image.pool != "mean":  # there the residual stream is scaled instead
            vision_cfg["norm_kwargs"] = {"eps": model.norm_eps}
    if model.activation == "gelu_tanh":
        text_cfg["act_kwargs"] = vision_cfg["act_kwargs"] = {"approximate": "tanh"}
    if not byte_pairs:
        text_cfg["hf_tokenizer_name"] = "."  # the files next to the configuration
        notes.append(
            "open_clip.get_tokenizer uses `transformers` for the WordPiece: the same ids except for rare letters"
        )
    elif tokenizer.vocab_size != OWN_TOKENIZER:
        notes.append(
            f"open_clip's own byte pairs have {OWN_TOKENIZER} entries, these {tokenizer.vocab_size}: give it token ids"
        )
    model_cfg = {
        "embed_dim": model.embed_dim + (image.pool == "mean"),
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "quick_gelu": model.activation == "quick_gelu",
    }
    if model.loss == "sigmoid":
        model_cfg["init_logit_bias"] = -10.0
    mean, std = PIXEL_STATS[image.pixel_stats]
    return {"model_cfg": model_cfg, "preprocess_cfg": {"mean": list(mean), "std": list(std), **_PREPROCESSING}}, notes
