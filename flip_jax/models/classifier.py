"""The image tower as a classifier, and its training: `python main.py --config=configs/finetune_l16.py`.

The recipe is that of MAE (arXiv 2111.06377, appendix A.1), whose fine-tuning the FLIP paper follows: a rate that falls
by a factor from each layer to the one before it, smoothed labels, mixup (arXiv 1710.09412) and CutMix (arXiv
1905.04899). The loop, checkpoints and input are those of pre-training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flip_jax.models.vit as vit
from flip_jax.config import Config, FinetuneConfig
from flip_jax.masking import patchify


class Classifier(nnx.Module):
    """The image tower, and a linear head on its pooled output that starts at 0. The sizes of the tower are FLIP's."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config.model
        self.image = vit.VisionTransformer(config.model, rngs)
        self.head = nnx.Linear(
            config.model.image.width,
            config.finetune.classes,
            kernel_init=nnx.initializers.zeros,
            dtype=jnp.float32,
            rngs=rngs,
            kernel_metadata={"axes": ("embed", None)},
            bias_metadata={"axes": ("norm",)},
        )

    def features(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Returns the pooled f32 tower output [B, width] of uint8 images."""
        return self.image(patchify(image_BxHxWx3, self.config.image.patch_size))

    def encode_image(self, image_BxHxWx3: jax.Array) -> jax.Array:
        """Returns the f32 scores [B, classes] of uint8 images, which a classifier has instead of embeddings."""
        return self.head(self.features(image_BxHxWx3))


def make_loss_and_grads(
    graphdef: nnx.GraphDef, config: FinetuneConfig
) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """loss_and_grads(params, image uint8 [B, H, W, 3], label int32 [B], key, frozen) over the global batch."""

    def loss(params, frozen, image_BxHxWx3, target_BxC):
        model: Classifier = nnx.merge(graphdef, params | frozen)
        return jnp.mean(optax.softmax_cross_entropy(model.encode_image(image_BxHxWx3), target_BxC))

    def loss_and_grads(params, image, label, key, frozen=None):
        target = optax.smooth_labels(jax.nn.one_hot(label, config.classes), config.label_smoothing)
        image, target = mix(key, image, target, config.mixup, config.cutmix)
        return jax.value_and_grad(loss)(params, frozen or {}, image, target)

    return loss_and_grads


def mix(
    key: jax.Array, image_BxHxWx3: jax.Array, target_BxC: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Pictures, uint8, and targets, each mixed with those at the other end of the batch.

    Mixup adds them, CutMix puts a rectangle of one on the other; the share of the first is drawn from Beta(a, a) for
    the whole batch, `mixup` and `cutmix` being that a, and 0 means never. With both, each is used on half of the steps.
    """
    if not mixup and not cutmix:
        return image_BxHxWx3, target_BxC
    kind_key, share_key, place_key = jax.random.split(key, 3)
    cut = jax.random.bernoulli(kind_key, 0.5 if mixup and cutmix else float(cutmix > 0))
    a = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
    share = jax.random.beta(share_key, a, a)
    inside_HxW = rectangle(place_key, image_BxHxWx3.shape[1:3], 1 - share)
    # The rectangle may have been cut off at the border.
    share = jnp.where(cut, 1 - jnp.mean(inside_HxW), share)
    weight_HxW = jnp.where(cut, 1.0 - inside_HxW, share)[None, :, :, None]
    mixed = weight_HxW * image_BxHxWx3 + (1 - weight_HxW) * image_BxHxWx3[::-1]
    # Rounded again, so that the tower normalises them as it does all images.
    return jnp.round(mixed).astype(jnp.uint8), share * target_BxC + (1 - share) * target_BxC[::-1]


def rectangle(key: jax.Array, size: tuple[int, int], area: jax.Array) -> jax.Array:
    """Draws a mask [H, W], true within a rectangle of the image's shape, this share of its area and a random centre."""

    def within(key, length):
        half, centre = jnp.sqrt(area) * length / 2, jax.random.uniform(key, maxval=length)
        place = jnp.arange(length) + 0.5
        return (place > centre - half) & (place < centre + half)

    rows_H, columns_W = (within(k, n) for k, n in zip(jax.random.split(key), size, strict=True))
    return rows_H[:, None] & columns_W[None]
