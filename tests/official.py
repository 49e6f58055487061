"""Official parameter names against ours, for tests that compare with recordings of the official code."""

import re

import numpy as np

_PLAIN = {
    "logit_scale": "logit_scale",
    "img_mlp1/kernel": "image_projection/kernel",
    "txt_mlp1/kernel": "text_projection/kernel",
    "img_encoder/cls": "image/cls",
    "img_encoder/embedding/kernel": "image/patch_kernel",
    "img_encoder/embedding/bias": "image/patch_bias",
    "img_encoder/posembed_encoder/pos_embedding": "image/pos_embed",
    "txt_encoder/posembed_encoder/pos_embedding": "text/pos_embed",
    "txt_encoder/token_embedding/embedding": "text/token_embed",
}
_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "MlpBlock_0/Dense_0": "mlp1",
    "MlpBlock_0/Dense_1": "mlp2",
    **{f"MultiHeadDotProductAttention_0/{name}": name for name in ("query", "key", "value", "out")},
}


def our_name(name):
    """(our name, layer or None) of an official parameter."""
    if name in _PLAIN:
        return _PLAIN[name], None
    tower, rest = name.split("/Transformer/")
    tower = {"img_encoder": "image", "txt_encoder": "text"}[tower]
    if match := re.fullmatch(r"encoder_norm/(\w+)", rest):
        return f"{tower}/transformer/norm/{match[1]}", None
    match = re.fullmatch(r"encoderblock_(\d+)/(.+)/(\w+)", rest)
    return f"{tower}/transformer/blocks/{_BLOCK[match[2]]}/{match[3]}", int(match[1])


def to_ours(official):
    """{"image/cls": array, ...} from {official name: array}; the layers of a block stacked in order."""
    found = {}
    for name, value in official.items():
        key, layer = our_name(name)
        found.setdefault(key, {})[layer] = np.asarray(value)
    return {
        key: layers[None] if None in layers else np.stack([layers[i] for i in range(len(layers))])
        for key, layers in found.items()
    }


def nest(flat):
    """{"a/b": x} as {"a": {"b": x}}."""
    tree = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree, prefix=""):
    """{"a": {"b": x}} as {"a/b": x}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, name + "/") if isinstance(value, dict) else {name: value})
    return flat
