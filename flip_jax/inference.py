"""A trained model as people use it: images and strings in, embeddings out."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from PIL import Image

from flip_jax import checkpoint, masking, models, sharding
from flip_jax.config import Config, MeshConfig
from flip_jax.data import transforms
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.flip import FLIP, normalise


class Encoder:
    """Both towers of one model with its weights, tokenizer and config; nothing of it changes later."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        tokenizer: Tokenizer | None,
        config: Config,
        class_names: tuple[str, ...] | None = None,
    ):
        self.params, self.tokenizer, self.config = params, tokenizer, config
        self.class_names = class_names  # of a classifier; () if it was trained on numbers, None if that is unknown
        self.mesh = jax.sharding.get_mesh()
        whole = jax.sharding.NamedSharding(self.mesh, PartitionSpec())

        def encode_image(params, image, mask):
            model: FLIP = nnx.merge(graphdef, params)
            return model.encode_image(image) if mask == "intact" else _encode_views(model, image, mask, config.seed)

        self._image = jax.jit(encode_image, static_argnames="mask")
        self._text = jax.jit(lambda params, text: nnx.merge(graphdef, params).encode_text(text), out_shardings=whole)
        self._scale = jax.jit(lambda params: nnx.merge(graphdef, params).scale(), out_shardings=whole)
        self._features = jax.jit(lambda params, image: nnx.merge(graphdef, params).features(image), out_shardings=whole)

    def with_params(self, params: Any) -> "Encoder":
        """Returns the same model with other weights; the compiled programs are shared."""
        other = copy.copy(self)
        other.params = params
        return other

    def encode_image(self, images: np.ndarray | Sequence[Image.Image], mask: str = "intact") -> jax.Array:
        """Returns normalised embeddings [B, embed_dim] of uint8 images [B, S, S, 3], or of PIL images of any size.

        `mask` says how much of an image is seen, as in `config.EvalConfig`. With several processes each gives its own
        rows, and the result is the global array.
        """
        if not isinstance(images, np.ndarray):
            size = self.config.model.image.image_size
            images = np.stack([transforms.eval_image(image, size, self.config.data) for image in images])
        # A model that each process has loaded for itself is on a mesh of its own.
        shards = sharding.batch_shards(self.mesh) // len({device.process_index for device in self.mesh.devices.flat})
        padding = -len(images) % shards
        rows = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        (array,) = sharding.to_devices(self.mesh, rows)
        embedded = self._image(self.params, array, mask=mask)
        return embedded[: len(images)] if padding else embedded

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Returns normalised embeddings [B, embed_dim] of strings; with several processes each gives all of them."""
        tokens = self.tokenizer(texts, self.config.model.text.context_length)
        padded = np.pad(tokens, [(0, -len(tokens) % sharding.batch_shards(self.mesh)), (0, 0)])
        rows = sharding.batch_sharding(self.mesh)
        array = jax.make_array_from_callback(padded.shape, rows, lambda index: padded[index])
        return np.asarray(self._text(self.params, array))[: len(texts)]

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns f32 features [B, width] for probes, of uint8 images [B, S, S, 3] in evaluation batches.

        With several processes each gives its own rows, and gets those of all, process after process.
        """
        (array,) = sharding.to_devices(self.mesh, images)
        return np.asarray(self._features(self.params, array))

    def scale(self) -> float:
        """Returns the learned factor of the cosines before a softmax."""
        return float(self._scale(self.params))


def _encode_views(model: FLIP, image_BxHxWx3: jax.Array, mask: str, seed: int) -> jax.Array:
    """Averages the embeddings of random parts of an image, of one or of as many as cover it, and normalises."""
    config = model.config.image
    patch_BxLxP = masking.patchify(image_BxHxWx3, config.patch_size)
    views_VxBxK = masking.views(jax.random.key(seed), patch_BxLxP, config.visible_patches)
    views_VxBxK = views_VxBxK[: {"masked": 1, "ensemble": None}[mask]]

    def encode(position_BxK):
        return model.encode_patches(masking.gather(patch_BxLxP, position_BxK), position_BxK)

    return normalise(jnp.mean(jax.lax.map(encode, views_VxBxK), axis=0))


def load(path: str | os.PathLike, devices: list[jax.Device] | None = None) -> Encoder:
    """Loads a workdir's newest checkpoint, or one step's folder, onto `devices` (None: all of this process).

    Raises:
      UserError: there is no complete checkpoint.
    """
    step = checkpoint.newest(path)
    config = checkpoint.read_config(step)
    mesh = sharding.make_mesh(MeshConfig(), devices or jax.local_devices())
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))
    params = checkpoint.read_params(step, sharding.place(abstract, mesh))
    with jax.set_mesh(mesh):
        return Encoder(graphdef, params, checkpoint.read_tokenizer(step), config, checkpoint.read_class_names(step))
