"""Both towers as ONNX files, for any batch size, which ONNX Runtime runs without JAX or this package.

The graphs are written here operator by operator: jax2onnx 0.17, which could trace them, asks for an older Orbax.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, tensors, tokenizer_files
from flip_jax.masking import PAD
from flip_jax.models.vit import PIXEL_STATS
from flip_jax.runtime import UserError

IMAGE, TEXT = "image.onnx", "text.onnx"
OPSET, IR_VERSION = 20, 9
LARGE = 2**30  # bytes of weights, above which they are a file of their own: a graph holds at most 2 GiB
MASKED = -1e9  # added to scores that do not count
Params = Mapping[str, Any]


class _Graph:
    """Operators and constants in the order in which they are added; a value is its name."""

    def __init__(self):
        import onnx  # an extra

        self._onnx, self.nodes, self.constants = onnx, [], []

    def __call__(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """Adds an operator, whose inputs are values or arrays, and returns its only output."""
        given = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(operator, given, [name], name, **attributes))
        return name

    def constant(self, array: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def norm(self, x: str, layer: Params, eps: float) -> str:
        return self("LayerNormalization", x, layer["scale"], layer["bias"], axis=-1, epsilon=eps)

    def dense(self, x: str, layer: Params) -> str:
        x = self("MatMul", x, layer["kernel"])
        return self("Add", x, layer["bias"]) if "bias" in layer else x

    def activate(self, x: str, kind: str) -> str:
        if kind == "quick_gelu":
            return self("Mul", x, self("Sigmoid", self("Mul", x, np.float32(1.702))))
        return self("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def heads(self, x: str, layer: Params, heads: int) -> str:
        """Projects [B, T, D] and splits it: [B, heads, T, D / heads]."""
        width = layer["kernel"].shape[1]
        split = self("Reshape", self.dense(x, layer), np.array([0, 0, heads, width // heads]))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def attend(self, query: str, tokens: str, layer: Params, heads: int, mask: str | None) -> str:
        """Attends from the values `query` to `tokens`; a mask is added to the scores."""
        width = layer["query"]["kernel"].shape[0]
        q, k, v = (self.heads(x, layer[n], heads) for x, n in ((query, "query"), (tokens, "key"), (tokens, "value")))
        q = self("Mul", q, np.float32((width // heads) ** -0.5))
        scores = self("MatMul", q, self("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self("Add", scores, mask) if mask else scores
        x = self("Transpose", self("MatMul", self("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return self.dense(self("Reshape", x, np.array([0, 0, width])), layer["out"])

    def mlp(self, x: str, layer: Params, kind: str) -> str:
        return self.dense(self.activate(self.dense(x, layer["mlp1"]), kind), layer["mlp2"])

    def transformer(
        self, x: str, params: Params, tower: ImageConfig | TextConfig, model: ModelConfig, mask: str | None = None
    ) -> str:
        for block in names.layers(params["blocks"]):
            y = self.norm(x, block["norm1"], model.norm_eps)
            x = self("Add", x, self.attend(y, y, block, tower.heads, mask))
            x = self("Add", x, self.mlp(self.norm(x, block["norm2"], model.norm_eps), block, model.activation))
        return self.norm(x, params["norm"], model.norm_eps)

    def repeated(self, array: np.ndarray, like: str) -> str:
        """Repeats an array [1, ...] for each row of the batch of another value."""
        rows = self("Shape", like, start=0, end=1)
        return self("Expand", array, self("Concat", rows, np.array(array.shape[1:], np.int64), axis=0))

    def unit(self, x: str) -> str:
        length = self("ReduceL2", x, np.array([1]), keepdims=1)
        return self("Div", x, self("Add", length, np.float32(1e-8)))

    def save(self, path: pathlib.Path, given: tuple[str, Any, list], output: str, width: int) -> None:
        """Checks the graph and writes it with one input, (name, type, shape), and the output `embedding`."""
        make, types = self._onnx.helper, self._onnx.TensorProto
        name, dtype, shape = given
        self.nodes.append(make.make_node("Identity", [output], ["embedding"], "embedding"))
        inputs = [make.make_tensor_value_info(name, make.np_dtype_to_tensor_dtype(np.dtype(dtype)), ["batch", *shape])]
        outputs = [make.make_tensor_value_info("embedding", types.FLOAT, ["batch", width])]
        graph = make.make_graph(self.nodes, path.stem, inputs, outputs, self.constants)
        opsets = [make.make_opsetid("", OPSET)]
        proto = make.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="flip_jax")
        large = sum(len(constant.raw_data) for constant in self.constants) > LARGE
        self._onnx.save_model(proto, path, save_as_external_data=large, location=f"{path.name}.data")
        self._onnx.checker.check_model(path)


def _image(graph: _Graph, model: ModelConfig, params: Params) -> str:
    """Adds the image tower, of the input `image`: uint8 pixels [batch, size, size, 3]."""
    tower, weights = model.image, params["image"]
    mean, std = (255 * np.array(x, np.float32) for x in PIXEL_STATS[tower.pixel_stats])
    x = graph("Div", graph("Sub", graph("Cast", "image", to=1), mean), std)
    kernel = weights["patch_kernel"].transpose(3, 2, 0, 1)
    size = tower.patch_size
    patches = graph("Conv", graph("Transpose", x, perm=[0, 3, 1, 2]), kernel, strides=[size, size])
    x = graph("Transpose", graph("Reshape", patches, np.array([0, tower.width, -1])), perm=[0, 2, 1])
    if "cls" in weights:
        x = graph("Concat", graph.repeated(weights["cls"], x), x, axis=1)
    table = np.asarray(names.fold_positions(model, weights)["pos_embed"])  # a bias of patches included
    x = graph("Add", x, table)
    if "pre_norm" in weights:
        x = graph.norm(x, weights["pre_norm"], model.norm_eps)
    x = graph.transformer(x, weights["transformer"], tower, model)
    if tower.pool == "map":
        head = weights["map_head"]
        x = graph.attend(graph.repeated(head["probe"], x), x, head, tower.heads, None)
        x = graph("Add", x, graph.mlp(graph.norm(x, head["norm"], model.norm_eps), head, model.activation))
    if tower.pool in ("cls", "map"):
        pooled = graph("Gather", x, np.array(0), axis=1)
    else:
        if tower.pool == "patches":
            x = graph("Slice", x, np.array([1]), np.array([table.shape[1]]), np.array([1]))
        pooled = graph("ReduceMean", x, np.array([1]), keepdims=0)
    projection = params.get("image_projection")
    return graph.unit(graph.dense(pooled, projection) if projection else pooled)


def _text(graph: _Graph, model: ModelConfig, params: Params) -> str:
    """Adds the text tower, of the input `text`: int32 token ids [batch, context_length]."""
    tower, weights = model.text, params["text"]
    length = tower.context_length
    x = graph("Add", graph("Gather", weights["token_embed"], "text", axis=0), weights["pos_embed"])
    real = graph("Cast", graph("Not", graph("Equal", "text", np.array(PAD, np.int32))), to=1)  # 1.0 or 0.0
    mask = None
    if tower.causal:
        mask = graph.constant(np.where(np.tri(length), 0, MASKED).astype(np.float32)[None, None])
    elif tower.mask_padding:
        hidden = graph("Mul", graph("Sub", np.float32(1), real), np.float32(MASKED))
        mask = graph("Unsqueeze", hidden, np.array([1, 2]))
    x = graph.transformer(x, weights["transformer"], tower, model, mask)
    if tower.pool in ("first", "final"):
        pooled = graph("Gather", x, np.array(0 if tower.pool == "first" else length - 1), axis=1)
    else:
        share = real
        if tower.pool == "last":
            place = np.arange(length, dtype=np.float32)[None]
            last = graph("ReduceMax", graph("Mul", real, place), np.array([1]), keepdims=1)
            share = graph("Cast", graph("Equal", place, last), to=1)
        total = graph("Max", graph("ReduceSum", share, np.array([1]), keepdims=1), np.float32(1))
        share = graph("Unsqueeze", graph("Div", share, total), np.array([1]))
        pooled = graph("Squeeze", graph("MatMul", share, x), np.array([1]))
    return graph.unit(graph.dense(pooled, params["text_projection"]))


def export_model(folder: pathlib.Path, model: ModelConfig, params: Params, tokenizer: Tokenizer) -> list[str]:
    """Writes image.onnx, text.onnx, tokenizer.json, and config.json with what a program needs to know.

    Returns notes for the user.

    Raises:
      UserError: the extra `onnx` is missing, or the weights are not finite.
    """
    try:
        image, text = _Graph(), _Graph()
    except ImportError:
        raise UserError('--format=onnx needs the package onnx: pip install -e ".[onnx]"') from None
    params = _arrays(params)
    size, length = model.image.image_size, model.text.context_length
    image.save(folder / IMAGE, ("image", np.uint8, [size, size, 3]), _image(image, model, params), model.embed_dim)
    text.save(folder / TEXT, ("text", np.int32, [length]), _text(text, model, params), model.embed_dim)
    scale = names.clipped_scale(model, params["logit_scale"])
    settings = {
        "model_type": "flip_jax_onnx",
        "image_size": size,
        "context_length": length,
        "embed_dim": model.embed_dim,
        "padding_id": tokenizer.to_json().get("fill", PAD),
        "end_id": tokenizer_files.end_of(tokenizer),
        "logit_scale": float(np.exp(np.asarray(scale)[0])),
        "logit_bias": float(params["logit_bias"][0]) if "logit_bias" in params else 0.0,
    }
    tensors.write_json(folder / "config.json", settings)
    tokenizer_files.write(folder, tokenizer, model.text)
    return ["image.onnx takes uint8 pixels of square images, text.onnx token ids; both give normalised embeddings"]


def _arrays(tree: Any) -> Any:
    """Returns nested dicts of f32 arrays on the host; UserError if one is not finite."""
    if hasattr(tree, "items"):
        return {name: _arrays(part) for name, part in tree.items()}
    array = np.asarray(tree, np.float32)
    names.check_finite({"a parameter": array})
    return array
