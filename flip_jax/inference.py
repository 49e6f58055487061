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

from flip_jax import masking, models, saved_config, saved_step, sharding, weights
from flip_jax.config import Config, MeshConfig
from flip_jax.data import rare_images, transforms
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.flip import FLIP, normalise
from flip_jax.runtime import UserError


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

    def encode_image(self, images: np.ndarray | Image.Image | Sequence[Image.Image], mask: str = "intact") -> jax.Array:
        """Returns normalised embeddings [B, embed_dim] of PIL images of any size, or of uint8 images [B, S, S, 3].

        One PIL image counts as a list of one. `mask` says how much of an image is seen, as in `config.EvalConfig`.
        With several processes each gives its own rows, and the result is the global array.

        Raises:
          UserError: arrays of another type or shape, an image that cannot be used, or something else than images.
        """
        images = self._pixels(images)
        # A model that each process has loaded for itself is on a mesh of its own.
        shards = sharding.batch_shards(self.mesh) // len({device.process_index for device in self.mesh.devices.flat})
        padding = -len(images) % shards
        rows = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        (array,) = sharding.to_devices(self.mesh, rows)
        embedded = self._image(self.params, array, mask=mask)
        return embedded[: len(images)] if padding else embedded

    def _pixels(self, images: Any) -> np.ndarray:
        """Returns images as the towers take them, or raises UserError with the remedy."""
        size = self.config.model.image.image_size
        wanted = f"uint8 [B, {size}, {size}, 3] or PIL images, which are cropped and resized to that"
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, list | tuple) and all(isinstance(image, Image.Image) for image in images):
            pixels = np.zeros((len(images), size, size, 3), np.uint8)
            for i, image in enumerate(images):
                try:
                    pixels[i] = rare_images.eval_image(image, size, self.config.data)
                except transforms.BadImage as error:
                    raise UserError(f"image {i}, of mode {image.mode}, cannot be used: {error}") from None
            return pixels
        if not hasattr(images, "shape") or not hasattr(images, "__array__"):
            given = f"{type(images).__name__} of {type(images[0]).__name__}" if isinstance(images, list | tuple) else ""
            raise UserError(
                f"images must be {wanted}; got {given or type(images).__name__}. Open files with PIL.Image.open, and "
                "join arrays with numpy.stack"
            )
        array = np.asarray(images)
        if array.dtype == np.uint8 and array.shape[1:] == (size, size, 3):
            return array
        remedy = "give PIL images, PIL.Image.fromarray(array)"
        if array.dtype != np.uint8:
            remedy = "values are 0 to 255, and the model normalises them itself: give the image before any scaling"
        elif array.shape == (size, size, 3):
            remedy = "add the batch axis, array[None]"
        elif array.ndim == 4 and array.shape[1] == 3:
            remedy = "channels come last, array.transpose(0, 2, 3, 1)"
        raise UserError(f"images must be {wanted}; got {array.dtype} {list(array.shape)}: {remedy}")

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Returns normalised embeddings [B, embed_dim] of strings; with several processes each gives all of them.

        One string counts as a list of one. UserError for a classifier, or for what is no string.
        """
        if self.tokenizer is None:
            raise UserError("a fine-tuned classifier reads no text: use the model that it started from")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"texts must be strings, got {type(wrong[0]).__name__} {str(wrong[0])[:50]!r}")
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
    views_VxBxK = _views(jax.random.key(seed), patch_BxLxP, config.visible_patches)
    views_VxBxK = views_VxBxK[: {"masked": 1, "ensemble": None}[mask]]

    def encode(position_BxK):
        return model.encode_patches(masking.gather(patch_BxLxP, position_BxK), position_BxK)

    return normalise(jnp.mean(jax.lax.map(encode, views_VxBxK), axis=0))


def load(path: str | os.PathLike, devices: list[jax.Device] | None = None) -> Encoder:
    """Loads a run's newest checkpoint, a step, a portable folder or hf://ORG/NAME[@REVISION] onto `devices`.

    None are all devices of this process.

    Raises:
      UserError: there is no complete checkpoint, or its place cannot be read.
    """
    try:
        step = saved_step.newest(path)
    except (OSError, ImportError) as error:  # the system refuses, or the client of an object store is missing
        raise UserError(f"{os.fspath(path)} cannot be read: {error}; check the path and its credentials") from None
    if step.is_file():
        from flip_jax.formats import timm

        raise timm.alone(path)
    config = saved_config.read(step)
    mesh = sharding.make_mesh(MeshConfig(), devices or jax.local_devices())
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))
    tokenizer, entries = saved_step.tokenizer(step), config.model.text.vocab_size
    if tokenizer and tokenizer.vocab_size > entries:
        raise UserError(
            f"{step}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, above config.model.text.vocab_size "
            f"{entries}: the checkpoint is damaged; use another step"
        )
    params = weights.read_params(step, sharding.place(abstract, mesh))
    with jax.set_mesh(mesh):
        return Encoder(graphdef, params, tokenizer, config, weights.read_class_names(step))


def _views(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Draws random subsets [V, B, keep] that together cover all patches; only the last may repeat some.

    The noise depends on the key and the image itself only, so that evaluation depends on neither batch nor devices.
    """
    count = patch_BxLxP.shape[1]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.sum(patch_BxLxP.astype(jnp.uint32), axis=(1, 2)))
    order_BxL = masking.smallest(jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys_B), count)
    return jnp.stack([order_BxL[:, min(i, count - keep) :][:, :keep] for i in range(0, count, keep)])
