"""open_clip's configuration of a model as our settings and back, with the reason for what either cannot express."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flip_jax import config_check
from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.data.tokenizer import ClipTokenizer, Tokenizer
from flip_jax.models.vit import PIXEL_STATS

OWN_TOKENIZER = 49_408  # entries of the byte pairs that open_clip brings
EPS = 1e-5  # of open_clip's norms, where nothing else is said
# open_clip's settings of a tower with their defaults. Those that `model_settings` does not translate must have them.
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
# Without effect on a model that is loaded, or read only with another setting that is refused.
_IDLE = (
    "output_tokens custom_text init_logit_scale nonscalar_logit_scale attn_pooler_queries attn_pooler_heads pad_id "
    "eos_id timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path hf_model_pretrained "
    "hf_proj_type hf_pooler_type"
).split()
_TRANSLATED = (
    "layers width head_width heads patch_size image_size patch_dropout no_ln_pre pos_embed_type pool_type act_kwargs "
    "norm_kwargs context_length vocab_size no_causal_mask embed_dim vision_cfg text_cfg quick_gelu init_logit_bias"
).split()
_PICTURES = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
_POOLS = {"cls": "tok", "patches": "avg"}
_POSITIONS = {"learned": "learnable", "sincos": "sin_cos_2d"}


def model_settings(content: Mapping[str, Any], source: str) -> ModelConfig:
    """Our settings of an open_clip configuration, {"model_cfg": ..., "preprocess_cfg": ...} or what is in "model_cfg".

    Raises:
      ValueError: what ours cannot express.
    """
    top = _filled(content.get("model_cfg", content), _TOP, source)
    vision, text = (
        _filled(top[key] or {}, known, f"{source}: {key}")
        for key, known in (("vision_cfg", _VISION), ("text_cfg", _TEXT))
    )

    def refuse(key, value, allowed):
        raise ValueError(f"{source}: {key} {value!r} cannot be expressed here; only {allowed} can")

    size, patch = (
        x[0] if isinstance(x, list) and len(set(x)) == 1 else x for x in (vision["image_size"], vision["patch_size"])
    )
    for key, value in (
        ("image_size", size),
        ("patch_size", patch),
        ("layers", vision["layers"]),
        ("embed_dim", top["embed_dim"]),
    ):
        if type(value) is not int:
            refuse(key, value, "one integer (square pictures, a vision transformer)")
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
    if len(set(activations)) > 1 or len(set(eps)) > 1:
        refuse("activation and eps of the towers", (activations, eps), "the same in both")
    try:
        model = ModelConfig(
            image=ImageConfig(
                image_size=size,
                patch_size=patch,
                width=vision["width"],
                depth=vision["layers"],
                heads=vision["width"] // vision["head_width"],
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
                pool=text_pool,
                causal=causal,
            ),
            embed_dim=top["embed_dim"],
            loss="info_nce" if top["init_logit_bias"] is None else "sigmoid",
            activation=activations[0],
            norm_eps=eps[0],
            dtype="float32",
        )
        config_check.from_config_dict({"model": dataclasses.asdict(model)})
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{source}: {error}") from error
    return model


def _filled(content: Any, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A group of settings with the defaults of those that are not given; ValueError for what cannot be expressed."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a group of settings, got {content!r}")
    for key, value in content.items():
        if key not in (*known, *_IDLE) or (
            key not in _TRANSLATED and value not in (known.get(key), {}, "default") and key not in _IDLE
        ):
            default = f"only {known[key]!r} can" if key in known else "it is unknown"
            raise ValueError(f"{where}: {key} = {value!r} cannot be expressed here; {default}")
    return {**known, **content}


def _pixel_stats(pictures: Mapping[str, Any], source: str) -> str:
    openai = PIXEL_STATS["openai"]
    given = (tuple(pictures.get("mean", openai[0])), tuple(pictures.get("std", openai[1])))
    found = [name for name, stats in PIXEL_STATS.items() if stats == given]
    others = {k: v for k, v in pictures.items() if k in _PICTURES and v != _PICTURES[k]}
    if not found or others:
        raise ValueError(
            f"{source}: preprocess_cfg {dict(pictures)} cannot be expressed here; only {_PICTURES} and the mean and "
            f"std of {', '.join(PIXEL_STATS)} can"
        )
    return found[0]


def open_clip_settings(model: ModelConfig, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    """open_clip's configuration of a model, and what a user has to know. ValueError for what it cannot express."""
    image, text, notes = model.image, model.text, []
    if text.pool == "mean":
        raise ValueError(
            "config.model.text.pool 'mean': open_clip pools one token of its own text tower, never their mean"
        )
    if text.mask_padding:
        raise ValueError("config.model.text.mask_padding: open_clip's CLIP has no padding mask in its text tower")
    byte_pairs = isinstance(tokenizer, ClipTokenizer)
    if text.pool == "last" and not byte_pairs:
        raise ValueError(
            "config.model.text.pool 'last': open_clip finds the last token by its number, the highest, which only "
            "CLIP's byte pairs end with"
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
    if image.pool == "mean":
        vision_cfg |= {"attentional_pool": True, "attn_pooler_queries": 1, "attn_pooler_heads": 1}
        notes.append(
            f"embeddings have {model.embed_dim + 1} entries, the last 0: cls is pooled, too, by an attentional pool"
        )
    else:
        vision_cfg["pool_type"] = _POOLS[image.pool]
    if model.norm_eps != EPS:
        text_cfg["norm_kwargs"] = {"eps": model.norm_eps}
        if image.pool != "mean":  # else the stream is scaled instead
            vision_cfg["norm_kwargs"] = {"eps": model.norm_eps}
    if model.activation == "gelu_tanh":
        text_cfg["act_kwargs"] = vision_cfg["act_kwargs"] = {"approximate": "tanh"}
    if not byte_pairs:
        text_cfg["hf_tokenizer_name"] = "."  # the files beside the configuration
        notes.append("open_clip.get_tokenizer reads the WordPiece by `transformers`: the same ids but for rare letters")
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
    return {"model_cfg": model_cfg, "preprocess_cfg": {"mean": list(mean), "std": list(std), **_PICTURES}}, notes
