"""Converts weights of open_clip models to ours and back, as safetensors files."""

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax.config import ModelConfig
from flip_jax.data.clip_tokenizer import ClipTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, tensors, tokenizer_files
from flip_jax.formats.open_clip_settings import EPS, model_settings, open_clip_settings
from flip_jax.runtime import UserError

WEIGHTS, SETTINGS = "open_clip_model.safetensors", "open_clip_config.json"
BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")  # constants; the last 3 are OpenAI's alone
SAVE = """Save the model with open_clip: `python -c "import open_clip, safetensors.torch as s; s.save_file(\
open_clip.create_model('ViT-B-32-quickgelu', pretrained='openai').state_dict(), 'open_clip_model.safetensors')"`, with \
your model's name and its tag or file. Repositories of the hub often hold open_clip_model.safetensors already"""


def read_settings(settings: pathlib.Path, weights: pathlib.Path, activation: str = "", ask: bool = True) -> ModelConfig:
    """Reads a model's settings from open_clip's JSON configuration, next to weights that may contradict it.

    `activation` is gelu or quick_gelu, for a configuration that does not say which; without `ask` it is then GELU, as
    open_clip takes it.

    Raises:
      UserError: a file is damaged or of another library, our settings cannot express the architecture (the message says
        why), or the activation is unknown.
    """
    content = tensors.read_object(settings, "open_clip's configuration of the model")
    given = _bare_names(_open(weights).shapes(), weights)
    if "model_type" in content:
        raise UserError(f"{settings} is a configuration of Hugging Face's transformers, not open_clip's. {SAVE}")
    openai = bool(given.keys() & set(BUFFERS[1:]))
    return model_settings(_with_activation(content, activation, openai, weights, settings, ask), str(settings))


def read_params(model: ModelConfig, weights: pathlib.Path, settings: pathlib.Path) -> dict[str, Any]:
    """Reads a model's weights from a safetensors file; UserError, with both sides, where names or shapes differ."""
    file = _open(weights)
    shapes = file.shapes()
    given = {name: original for name, original in _bare_names(shapes, weights).items() if name not in BUFFERS}
    ours = names.to_ours(
        to_open_clip,
        model,
        {name: shapes[original] for name, original in given.items()},
        lambda name: file.read(given[name]),
        weights,
        settings,
    )
    if model.image.positions == "sincos" and np.any(ours["image"]["pos_embed"][0, 0]):
        raise UserError(
            f"{weights}: with fixed positions visual.positional_embedding[0], which is added to cls, must be 0"
        )
    return ours


def import_model(
    weights: pathlib.Path, settings: pathlib.Path, activation: str = ""
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a model's settings and weights; raises as `read_settings` and `read_params`."""
    model = read_settings(settings, weights, activation)
    return model, read_params(model, weights, settings)


def _open(weights: pathlib.Path) -> tensors.Tensors:
    if weights.suffix in tensors.PICKLES:
        raise UserError(f"{weights} is a file of PyTorch, which can run code and is not read; safetensors is. {SAVE}")
    return tensors.Tensors([weights])


def _bare_names(given: Iterable[str], weights: pathlib.Path) -> dict[str, str]:
    """Returns {open_clip's name: name in the file}, which may have the prefixes of training wrappers."""
    bare = {name: name for name in given}
    for prefix in ("module.", "_orig_mod.", "module.", "text."):
        whole = prefix == "text." or all(name.startswith(prefix) for name in bare)
        bare = {name.removeprefix(prefix): original for name, original in bare.items()} if whole else bare
    if any(name.startswith(("vision_model.", "text_model.")) for name in bare):
        raise UserError(
            f"{weights} has the names of Hugging Face's transformers (vision_model..., text_model...), and only "
            f"open_clip's are read. {SAVE}"
        )
    return bare


def _with_activation(content, activation, openai, weights, settings, ask):
    """Returns the configuration with quick_gelu, which OpenAI's models need and configurations often leave out."""
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
    if ask and not stated:
        raise UserError(
            f"{settings} does not say quick_gelu, and {weights} cannot show it: give --activation=quick_gelu for "
            "models of OpenAI, MetaCLIP and DFN and configurations named -quickgelu, --activation=gelu for LAION's"
        )
    return content


def to_open_clip(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns {open_clip's name: array} for an architecture that open_clip has. Linear: it only moves numbers."""
    image, text = params["image"], params["text"]
    named = {
        "visual.conv1.weight": image["patch_kernel"].transpose(3, 2, 0, 1),
        "visual.class_embedding": image["cls"].reshape(-1),
        "visual.positional_embedding": image["pos_embed"].reshape(image["pos_embed"].shape[1:]),
        **names.norm("visual.ln_post", image["transformer"]["norm"]),
        "visual.proj": params["image_projection"]["kernel"],
        "token_embedding.weight": text["token_embed"],
        "positional_embedding": text["pos_embed"].reshape(text["pos_embed"].shape[1:]),
        **names.norm("ln_final", text["transformer"]["norm"]),
        "text_projection": params["text_projection"]["kernel"],
        **{name: params[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in params},
        **_blocks("visual.transformer", image["transformer"]["blocks"]),
        **_blocks("transformer", text["transformer"]["blocks"]),
    }
    if "pre_norm" in image:
        named |= names.norm("visual.ln_pre", image["pre_norm"])
    return named


def _blocks(name: str, stacked: Mapping[str, Any]) -> dict[str, Any]:
    named = {}
    for i, block in enumerate(names.layers(stacked)):
        prefix, inputs = f"{name}.resblocks.{i}", [block[x] for x in ("query", "key", "value")]
        named |= {
            **names.norm(f"{prefix}.ln_1", block["norm1"]),
            f"{prefix}.attn.in_proj_weight": jnp.concatenate([x["kernel"].T for x in inputs]),
            f"{prefix}.attn.in_proj_bias": jnp.concatenate([x["bias"] for x in inputs]),
            **names.dense(f"{prefix}.attn.out_proj", block["out"]),
            **names.norm(f"{prefix}.ln_2", block["norm2"]),
            **names.dense(f"{prefix}.mlp.c_fc", block["mlp1"]),
            **names.dense(f"{prefix}.mlp.c_proj", block["mlp2"]),
        }
    return named


def export_model(
    folder: pathlib.Path, model: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> list[str]:
    """Writes open_clip_config.json, open_clip_model.safetensors and, but for CLIP's byte pairs, transformers' files.

    Returns notes on the result for the user.

    Raises:
      UserError: open_clip cannot express the architecture (the message says why), or the weights are not finite.
    """
    settings, notes = open_clip_settings(model, tokenizer)
    weights = {name: np.asarray(value, np.float32) for name, value in _export_weights(model, params).items()}
    names.check_finite(weights)
    tensors.write_json(folder / SETTINGS, settings)
    if not isinstance(tokenizer, ClipTokenizer):
        tokenizer_files.write(folder, tokenizer, model.text)
    tensors.save(folder / WEIGHTS, weights)
    return notes


def _export_weights(model: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns open_clip's weights, with parameters that it has no name for folded into others."""
    image = names.fold_positions(model, params["image"])
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
    scale = names.clipped_scale(model, params["logit_scale"])  # open_clip does not clip it
    named = to_open_clip({**params, "image": image, "logit_scale": scale})
    if model.image.pool == "mean":
        named |= _attentional_pool(
            named.pop("visual.proj"), named.pop("visual.ln_post.weight"), named.pop("visual.ln_post.bias")
        )
        named["text_projection"] = jnp.pad(named["text_projection"], [(0, 0), (0, 1)])
    return named


def _attentional_pool(kernel_DxE: jax.Array, scale: jax.Array, bias: jax.Array) -> dict[str, Any]:
    """Expresses norm, mean over all tokens and projection as an attention head that weights all tokens equally.

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
