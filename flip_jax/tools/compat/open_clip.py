"""Convert weights of open_clip models to ours and back, as safetensors files."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save

from flip_jax.config import ModelConfig
from flip_jax.data.clip_tokenizer import ClipTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.flip import MAX_SCALE
from flip_jax.runtime import UserError
from flip_jax.tools import options
from flip_jax.tools.compat.official import abstract_params
from flip_jax.tools.compat.open_clip_settings import EPS, model_settings, open_clip_settings

MAX_JSON_BYTES = 2**20
BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # constants; the last 3 are OpenAI's alone
SAVE = """Save the model with open_clip: `python -c "import open_clip, safetensors.torch as s; s.save_file(\
open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai').state_dict(), 'open_clip_model.safetensors')"`, with \
your model's name and its tag or file. Repositories of the hub often hold open_clip_model.safetensors already"""


def import_model(
    weights: pathlib.Path, settings: pathlib.Path, activation: str = ""
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a model's settings and weights from open_clip's JSON configuration and a safetensors file.

    `activation` is gelu or quick_gelu, for a configuration that does not say which.

    Raises:
      UserError: a file is damaged or of another library, our settings cannot express the architecture (the message says
        why), the activation is unknown, or names or shapes differ (both sides are listed).
    """
    content = _read_json(settings)
    theirs = _bare_names(_read_weights(weights), weights)
    if "model_type" in content:
        raise UserError(f"{settings} is a configuration of Hugging Face's transformers, not open_clip's. {SAVE}")
    openai = theirs.keys() & set(BUFFERS[1:])
    model = model_settings(_with_activation(content, activation, bool(openai), weights, settings), str(settings))
    theirs = {name: array for name, array in theirs.items() if name not in BUFFERS}
    abstract = abstract_params(model)
    expected = jax.eval_shape(to_open_clip, abstract)
    for name in ("logit_scale", "logit_bias"):
        if np.size(theirs.get(name, ())) == 1:
            theirs[name] = theirs[name].reshape(())
    differences = [
        f"  {name}: file {np.shape(theirs[name]) if name in theirs else 'absent'}, "
        f"settings {expected[name].shape if name in expected else 'absent'}"
        for name in sorted(theirs.keys() | expected.keys())
        if name not in theirs or name not in expected or theirs[name].shape != expected[name].shape
    ]
    if differences:
        raise UserError(f"{weights} is not the model that {settings} describes:\n" + "\n".join(differences))
    # `to_open_clip` only moves numbers: it is a permutation, so its transpose is its inverse.
    (params,) = jax.linear_transpose(to_open_clip, abstract)({k: jnp.asarray(v) for k, v in theirs.items()})
    if model.image.positions == "sincos" and np.any(params["image"]["pos_embed"][0, 0]):
        raise UserError(
            f"{weights}: with fixed positions visual.positional_embedding[0], which is added to cls, must be 0"
        )
    return model, params


def _bare_names(arrays: Mapping[str, np.ndarray], weights: pathlib.Path) -> dict[str, np.ndarray]:
    """Return weights by open_clip's names, without the prefixes of training wrappers."""
    for prefix in ("module.", "_orig_mod.", "module.", "text."):
        whole = prefix == "text." or all(name.startswith(prefix) for name in arrays)
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()} if whole else arrays
    if any(name.startswith(("vision_model.", "text_model.")) for name in arrays):
        raise UserError(
            f"{weights} has the names of Hugging Face's transformers (vision_model..., text_model...), and only "
            f"open_clip's are read. {SAVE}"
        )
    return dict(arrays)


def _with_activation(content, activation, openai, weights, settings):
    """Return the configuration with quick_gelu, which OpenAI's models need and configurations often leave out."""
    model = content.get("model_cfg", content)
    if not isinstance(model, Mapping):
        return content
    if activation:
        said = model.get("quick_gelu")
        if said is not None and said != (activation == "quick_gelu"):
            raise UserError(f"{settings} has quick_gelu {said}, which --activation={activation} contradicts: omit one")
        model = {**model, "quick_gelu": activation == "quick_gelu"}
        return {**content, "model_cfg": model} if "model_cfg" in content else model
    # A model whose configuration states an activation of GELU was certainly not trained with QuickGELU.
    stated = "quick_gelu" in model or any(
        isinstance(tower := model.get(key), Mapping) and tower.get("act_kwargs") for key in ("vision_cfg", "text_cfg")
    )
    if openai and not model.get("quick_gelu"):
        raise UserError(
            f"{weights} has OpenAI's names ({', '.join(BUFFERS[1:])}), and OpenAI trained with QuickGELU, but "
            f"{settings} does not say so: give --activation=quick_gelu, or --activation=gelu if that is wrong"
        )
    # The names and shapes of the weights are the same for both, and the wrong one costs accuracy without an error.
    if not stated:
        raise UserError(
            f"{settings} does not say quick_gelu, and {weights} cannot show it: give --activation=quick_gelu for "
            "models of OpenAI, MetaCLIP and DFN and configurations named -quickgelu, --activation=gelu for LAION's"
        )
    return content


def to_open_clip(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return {open_clip's name: array} for an architecture that open_clip has. Linear: it only moves numbers."""
    image, text = params["image"], params["text"]
    named = {
        "visual.conv1.weight": image["patch_kernel"].transpose(3, 2, 0, 1),
        "visual.class_embedding": image["cls"].reshape(-1),
        "visual.positional_embedding": image["pos_embed"].reshape(image["pos_embed"].shape[1:]),
        **_norm("visual.ln_post", image["transformer"]["norm"]),
        "visual.proj": params["image_projection"]["kernel"],
        "token_embedding.weight": text["token_embed"],
        "positional_embedding": text["pos_embed"].reshape(text["pos_embed"].shape[1:]),
        **_norm("ln_final", text["transformer"]["norm"]),
        "text_projection": params["text_projection"]["kernel"],
        **{name: params[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in params},
        **_blocks("visual.transformer", image["transformer"]["blocks"]),
        **_blocks("transformer", text["transformer"]["blocks"]),
    }
    if "pre_norm" in image:
        named |= _norm("visual.ln_pre", image["pre_norm"])
    return named


def _norm(name: str, norm: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}


def _dense(name: str, layer: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.weight": layer["kernel"].T, f"{name}.bias": layer["bias"]}


def _blocks(name: str, stacked: Mapping[str, Any]) -> dict[str, Any]:
    depth = stacked["norm1"]["scale"].shape[0]
    parts = jax.tree.map(lambda x: [y.reshape(y.shape[1:]) for y in jax.lax.split(x, [1] * depth)], stacked)
    named = {}
    for i in range(depth):
        block = {layer: {leaf: parts[layer][leaf][i] for leaf in stacked[layer]} for layer in stacked}
        prefix, inputs = f"{name}.resblocks.{i}", [block[x] for x in ("query", "key", "value")]
        named |= {
            **_norm(f"{prefix}.ln_1", block["norm1"]),
            f"{prefix}.attn.in_proj_weight": jnp.concatenate([x["kernel"].T for x in inputs]),
            f"{prefix}.attn.in_proj_bias": jnp.concatenate([x["bias"] for x in inputs]),
            **_dense(f"{prefix}.attn.out_proj", block["out"]),
            **_norm(f"{prefix}.ln_2", block["norm2"]),
            **_dense(f"{prefix}.mlp.c_fc", block["mlp1"]),
            **_dense(f"{prefix}.mlp.c_proj", block["mlp2"]),
        }
    return named


def export_model(
    folder: pathlib.Path, model: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> list[str]:
    """Write open_clip_config.json, open_clip_model.safetensors and, for a WordPiece, the files of `transformers`.

    Returns notes on the result for the user.

    Raises:
      UserError: open_clip cannot express the architecture (the message says why), or the folder already has a model.
    """
    settings, notes = open_clip_settings(model, tokenizer)
    weights = {name: np.asarray(value, np.float32) for name, value in _export_weights(model, params).items()}
    broken = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(f"these weights hold values that are not finite: {', '.join(broken)}")
    path = folder / "open_clip_model.safetensors"
    if path.exists():
        raise UserError(f"{path} already exists; use another folder")
    options.make_folder("OUT", folder)
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    if not isinstance(tokenizer, ClipTokenizer):
        for name, content in _tokenizer_files(tokenizer, model.text.context_length).items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    # Not safetensors' save_file, whose files only their owner can read.
    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in weights.items()}))
    return notes


def _export_weights(model: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's weights, with parameters that it has no name for folded into others."""
    image = dict(params["image"])
    table = image["pos_embed"]
    if model.image.positions == "sincos":
        table = jnp.asarray(table).at[:, 0].set(0)  # cls has no position
    if "patch_bias" in image:
        table = jnp.asarray(table).at[:, 1:].add(image["patch_bias"])
    image["pos_embed"] = table
    if model.image.pool == "mean":
        # The attentional pool's norm always has eps 1e-5. LayerNorm of c x with this eps equals LayerNorm of x with
        # eps 1e-5 / c**2, so everything that is written to the residual stream is multiplied by c.
        c = math.sqrt(EPS / model.norm_eps)
        blocks = dict(image["transformer"]["blocks"])
        for name in ("out", "mlp2"):
            blocks[name] = {leaf: c * value for leaf, value in blocks[name].items()}
        image["transformer"] = {**image["transformer"], "blocks": blocks}
        for name in ("patch_kernel", "cls", "pos_embed"):
            image[name] = c * image[name]
        if "pre_norm" in image:
            image["pre_norm"] = {leaf: c * value for leaf, value in image["pre_norm"].items()}
    scale = jnp.clip(params["logit_scale"], 0, math.log(MAX_SCALE))  # open_clip does not clip it
    named = to_open_clip({**params, "image": image, "logit_scale": scale})
    if model.image.pool == "mean":
        named |= _attentional_pool(
            named.pop("visual.proj"), named.pop("visual.ln_post.weight"), named.pop("visual.ln_post.bias")
        )
        named["text_projection"] = jnp.pad(named["text_projection"], [(0, 0), (0, 1)])
    return named


def _attentional_pool(kernel_DxE: jax.Array, scale: jax.Array, bias: jax.Array) -> dict[str, Any]:
    """Express norm, mean over all tokens and projection as an attention head that weights all tokens equally.

    open_clip applies another LayerNorm to the pooled embedding, which subtracts its mean and divides. An additional
    entry, minus the sum of the others, makes the mean 0, the L2 norm undoes the division, and the final projection
    drops the entry.
    """
    width, embed = kernel_DxE.shape
    size = embed + 1
    value = jnp.concatenate([kernel_DxE, -jnp.sum(kernel_DxE, axis=1, keepdims=True)], axis=1).T
    zeros = {name: jnp.zeros((size, width)) for name in ("q", "k")} | {"q": jnp.zeros((size, size))}
    inputs = {"q": zeros["q"], "k": zeros["k"], "v": value}
    named = {f"attn.{name}_proj_weight": array for name, array in inputs.items()}
    if width == size:  # torch's MultiheadAttention then holds the three as one
        named = {"attn.in_proj_weight": jnp.concatenate(list(inputs.values()))}
    named |= {
        "query": jnp.zeros((1, size)),
        "ln_q.weight": jnp.ones(size),
        "ln_q.bias": jnp.zeros(size),
        "ln_k.weight": scale,
        "ln_k.bias": bias,
        "attn.in_proj_bias": jnp.zeros(3 * size),
        "attn.out_proj.weight": jnp.eye(size),
        "attn.out_proj.bias": jnp.zeros(size),
    }
    return {f"visual.attn_pool.{name}": array for name, array in named.items()} | {
        "visual.ln_post.weight": jnp.ones(size),
        "visual.ln_post.bias": jnp.zeros(size),
        "visual.proj": jnp.eye(size).at[-1, -1].set(0),
    }


def _tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Return the files of a WordPiece for `transformers`; our case folding in Python becomes lower-casing."""
    content = tokenizer.to_json()
    before = [{"type": kind} for kind in ("NFKC", "Lowercase", "NFKC")]
    content["normalizer"]["normalizers"] = before + content["normalizer"]["normalizers"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": length,
    }
    return {"tokenizer.json": content, "tokenizer_config.json": settings}


def _read_json(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{path} has {len(data)} bytes, more than {MAX_JSON_BYTES}; it must be open_clip's JSON")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; it must be open_clip's configuration of the model, JSON") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a group of settings, got {type(content).__name__}")
    return content


def _read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file as f32."""
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{path} is a file of PyTorch, which can run code and is not read; safetensors is. {SAVE}")
    arrays = {}
    try:
        # The library checks that the header and the size of the file agree.
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in ("F64", "F32", "F16", "BF16") and name not in BUFFERS:
                    raise UserError(f"{path}: {name} is of type {dtype}; only F64, F32, F16 and BF16 are read")
                arrays[name] = file.get_tensor(name).astype(np.float32)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: {error}; it must be a safetensors file") from error
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite: {', '.join(broken)}")
    return arrays
