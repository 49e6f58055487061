"""Masks: which patches and tokens of a batch a training step encodes.

`see` decides once per step, for the whole batch and before microbatches are split; the towers get what is left and
never see the rest.

A strategy is one function and its name in `STRATEGIES` or `TEXT_STRATEGIES`. It returns int32 positions [B, keep], each
row without repeats, and draws noise that depends on the key and the row in the global batch only, so that masks do not
depend on how the batch is split over devices.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax import sharding
from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.runtime import UserError

PAD = 0
SIGMA = 0.8  # of `centred`, in half sides of the image: the widest that GLIP's authors show
BLOCK_ASPECT = 0.3  # sides of `block` are within this ratio and its inverse (BEiT)
ANCHORS = 0.05  # share of the patches that `cluster` draws as anchors (2405.08815: less than 5 %)


def smallest(noise: jax.Array, keep: int) -> jax.Array:
    """Returns the positions [B, keep] of the smallest values of each row of `noise` [B, L], in rising order."""
    return jnp.argsort(noise, axis=1)[:, :keep]


def random(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Keeps a uniformly random subset. Paper, section 3."""
    return smallest(jax.random.uniform(key, patch_BxLxP.shape[:2]), keep)


def grid(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Keeps the same 1, 2 (a chequerboard) or 3 patches of every 2 x 2, at a random offset. CLIPA, 2305.07017; MAE."""
    row_L, column_L = _rows_and_columns(patch_BxLxP)
    shift_Bx2 = jax.random.randint(key, (len(patch_BxLxP), 2), 0, 2)
    row_BxL, column_BxL = ((x[None] + shift_Bx2[:, i, None]) % 2 for i, x in enumerate((row_L, column_L)))
    order_BxL = 2 * (row_BxL ^ column_BxL) + row_BxL  # the ordered dither of 2 x 2: 0 2 over 3 1
    return smallest(order_BxL, keep)


def block(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Keeps one rectangle of random shape and place, as in CLIPA, 2305.07017 (MAE's blocks are removed instead).

    The rectangle has the fewest whole columns that hold `keep` patches at the drawn height; surplus patches are removed
    at random.
    """
    size, side = patch_BxLxP.shape[:2], math.isqrt(patch_BxLxP.shape[1])
    shape_key, place_key, trim_key = jax.random.split(key, 3)
    aspect_Bx1 = jnp.exp(jax.random.uniform(shape_key, (size[0], 1), minval=-1) * -math.log(BLOCK_ASPECT))
    height_Bx1 = jnp.clip(jnp.round(jnp.sqrt(keep * aspect_Bx1)), math.ceil(keep / side), side)
    width_Bx1 = jnp.ceil(keep / height_Bx1)
    spare_Bx2 = side - jnp.concatenate([height_Bx1, width_Bx1], axis=1)
    start_Bx2 = jnp.floor(jax.random.uniform(place_key, spare_Bx2.shape) * (spare_Bx2 + 1))
    row_BxL, column_BxL = (x[None] - start_Bx2[:, i, None] for i, x in enumerate(_rows_and_columns(patch_BxLxP)))
    inside_BxL = (0 <= row_BxL) & (row_BxL < height_Bx1) & (0 <= column_BxL) & (column_BxL < width_Bx1)
    return smallest(jnp.where(inside_BxL, jax.random.uniform(trim_key, size), jnp.inf), keep)


def centred(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Draws patches one by one with weights that are a Gaussian around the image's centre. GLIP, 2403.15837."""
    half = math.isqrt(patch_BxLxP.shape[1]) / 2
    row_L, column_L = ((x + 0.5) / half - 1 for x in _rows_and_columns(patch_BxLxP))
    weight_L = np.exp(-(row_L**2 + column_L**2) / (2 * SIGMA**2))
    return _weighted(key, patch_BxLxP.shape[:2], 1 / weight_L[None], keep)


def cluster(key: jax.Array, patch_BxLxP: jax.Array, keep: int) -> jax.Array:
    """Removes random anchors and the patches whose pixels are most like one of them (cosine). 2405.08815.

    The paper removes what is nearer than a threshold; an exact count sets the threshold of each image. Pixels are
    centred on the image's mean, or all of a bright image would be one cluster. Every second row of pixels is enough.
    """
    anchor_key, tie_key = jax.random.split(key)
    size, row = patch_BxLxP.shape[:2], 3 * math.isqrt(patch_BxLxP.shape[2] // 3)
    x = patch_BxLxP.reshape(*size, -1, row)[:, :, ::2].reshape(*size, -1).astype(jnp.float32)
    x -= jnp.mean(x, axis=(1, 2), keepdims=True)
    x *= jax.lax.rsqrt(jnp.sum(x * x, axis=2, keepdims=True) + 1e-6)
    anchors_BxA = jax.random.randint(anchor_key, (size[0], max(1, round(ANCHORS * size[1]))), 0, size[1])
    anchor_BxAxP = jnp.take_along_axis(x, anchors_BxA[:, :, None], axis=1)
    likeness_BxL = jnp.max(jnp.einsum("blp,bap->bla", x, anchor_BxAxP), axis=2)
    return smallest(likeness_BxL + 1e-3 * jax.random.uniform(tie_key, size), keep)  # equal patches in random order


def resize(image_BxHxWx3: jax.Array, side: int) -> jax.Array:
    """Shrinks the whole image to `side` pixels instead. Antialiased bicubic. RECLIP, 2304.06028; CLIPA."""
    shape = (len(image_BxHxWx3), side, side, 3)
    smaller = jax.image.resize(image_BxHxWx3.astype(jnp.float32), shape, "cubic")
    is_uint8 = image_BxHxWx3.dtype == jnp.uint8
    return jnp.clip(jnp.round(smaller), 0, 255).astype(jnp.uint8) if is_uint8 else smaller


def _rows_and_columns(patch_BxLxP: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    side = math.isqrt(patch_BxLxP.shape[1])
    return np.divmod(np.arange(side**2), side)


def _weighted(key: jax.Array, shape: tuple[int, int], slowness: jax.Array, keep: int) -> jax.Array:
    """Draws without replacement, one after the other, each with a chance of 1 / slowness: an exponential race."""
    return smallest(jax.random.exponential(key, shape) * slowness, keep)


def random_tokens(key: jax.Array, token_BxT: jax.Array, keep: int) -> jax.Array:
    """Keeps a uniformly random subset, padding or not. Paper, table 1c."""
    return _in_text_order(jax.random.uniform(key, token_BxT.shape), keep)


def prioritised(key: jax.Array, token_BxT: jax.Array, keep: int) -> jax.Array:
    """Removes padding first, then random real tokens. Paper, table 1c."""
    return _in_text_order(jnp.where(token_BxT == PAD, jnp.inf, jax.random.uniform(key, token_BxT.shape)), keep)


def truncate(key: jax.Array, token_BxT: jax.Array, keep: int) -> jax.Array:
    """Keeps the first tokens. CLIPA, 2305.07017."""
    return jnp.broadcast_to(jnp.arange(keep)[None], (len(token_BxT), keep))


def token_block(key: jax.Array, token_BxT: jax.Array, keep: int) -> jax.Array:
    """Keeps consecutive real tokens from a random one on, or from the first where they are few. CLIPA, 2305.07017."""
    spare_B = jnp.maximum(jnp.sum(token_BxT != PAD, axis=1) - keep, 0)
    start_B = jnp.floor(jax.random.uniform(key, spare_B.shape) * (spare_B + 1)).astype(jnp.int32)
    return start_B[:, None] + jnp.arange(keep)[None]


def frequency(key: jax.Array, token_BxT: jax.Array, keep: int, count_V: np.ndarray | None = None) -> jax.Array:
    """Prefers rare tokens: draws them one by one with weights sqrt(1 / f), padding last. CLIPF, 2412.16148.

    The paper keeps a word of frequency f with probability sqrt(t / f); for an exact count t drops out. It takes f from
    the corpus, as `count_V` does. Without it f is the token's share of the global batch, which needs neither a table
    nor state; ids above 65,535 then share a count with the id 65,536 below.
    """
    if count_V is not None:
        count_BxT = jnp.asarray(count_V)[token_BxT]
    else:
        bucket_BxT = token_BxT & 0xFFFF
        count_BxT = jnp.zeros(1 << 16).at[bucket_BxT].add(1)[bucket_BxT]
    slowness_BxT = jnp.where(token_BxT == PAD, jnp.inf, jnp.sqrt(count_BxT))
    return jnp.sort(_weighted(key, token_BxT.shape, slowness_BxT, keep), axis=1)


def _in_text_order(score_BxT: jax.Array, keep: int) -> jax.Array:
    return jnp.sort(smallest(score_BxT, keep), axis=1)


Strategy = Callable[[jax.Array, jax.Array, int], jax.Array]  # (key, patches uint8 [B, L, P] or tokens [B, T], keep)
STRATEGIES: dict[str, Strategy] = {
    "random": random,
    "grid": grid,
    "block": block,
    "centred": centred,
    "cluster": cluster,
}
TEXT_STRATEGIES: dict[str, Strategy] = {
    "random": random_tokens,
    "prioritised": prioritised,
    "truncate": truncate,
    "block": token_block,
    "frequency": frequency,
}


class View(NamedTuple):
    """The part of B pairs that the towers get. Positions are in the whole image or caption; None: all of it."""

    patch_BxKxP: jax.Array  # the pixels of the visible patches
    position_BxK: jax.Array | None
    token_BxK: jax.Array
    token_position_BxK: jax.Array | None
    all_BxLxP: jax.Array | None = None  # every patch: what the decoder reconstructs


def see(
    config: ModelConfig, key: jax.Array, image_BxHxWx3: jax.Array, token_BxT: jax.Array, microbatches: int = 1
) -> View:
    """Drops what a training step does not see of uint8 images and int32 tokens; `key` is the step's own."""
    patch_BxLxP = _patches(config.image, image_BxHxWx3, microbatches)
    visible_BxKxP, position_BxK = _visible(config.image, key, patch_BxLxP)
    token_BxK, token_position_BxK = see_text(config.text, jax.random.fold_in(key, 1), token_BxT)
    all_BxLxP = patch_BxLxP if config.decoder.weight else None
    return View(visible_BxKxP, position_BxK, token_BxK, token_position_BxK, all_BxLxP)


def see_image(config: ImageConfig, key: jax.Array, image_BxHxWx3: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Drops the masked patches: returns the pixels [B, K, P] of the visible ones and their positions [B, K]."""
    return _visible(config, key, _patches(config, image_BxHxWx3))


def _patches(config, image_BxHxWx3, microbatches=1):
    """All patches that a mask chooses from; for "resize" those of the smaller image, all of which are visible."""
    if config.mask_ratio and config.mask == "resize":
        side = math.isqrt(config.visible_patches) * config.patch_size
        # One part at a time, because resizing needs the pixels in f32.
        image_BxHxWx3 = sharding.in_turn(lambda part: resize(part, side), image_BxHxWx3, microbatches)
    return patchify(image_BxHxWx3, config.patch_size)


def _visible(config, key, patch_BxLxP):
    if config.mask_ratio == 0 or config.mask == "resize":
        return patch_BxLxP, None
    position_BxK = STRATEGIES[config.mask](key, patch_BxLxP, config.visible_patches)
    return gather(patch_BxLxP, position_BxK), position_BxK


def see_text(config: TextConfig, key: jax.Array, token_BxT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Drops the masked tokens: returns the others [B, K] and their positions [B, K], rising."""
    if config.mask_ratio == 0:
        return token_BxT, None
    strategy = TEXT_STRATEGIES[config.mask]
    if config.mask == "frequency" and config.mask_counts:
        from flip_jax.data import token_counts  # few runs need it

        strategy = functools.partial(frequency, count_V=token_counts.per_token(config))
    position_BxK = strategy(key, token_BxT, config.visible_tokens)
    return jnp.take_along_axis(token_BxT, position_BxK, axis=1), position_BxK


def patchify(image_BxHxWx3: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images into patches in row order, flattened as (row, column, channel): [B, L, patch_size**2 * 3]."""
    batch, height, width, channels = image_BxHxWx3.shape
    rows, columns = height // patch_size, width // patch_size
    x = image_BxHxWx3.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size**2 * channels)


def gather(patch_BxLxP: jax.Array, position_BxK: jax.Array) -> jax.Array:
    """Takes the patches at these positions. As pixels, so that embedding them costs the visible share only."""
    return jnp.take_along_axis(patch_BxLxP, position_BxK[:, :, None], axis=1)


def check(image: ImageConfig, text: TextConfig) -> None:
    """Raises UserError for a ratio that the strategy cannot keep exactly, or a strategy that makes no sense."""
    sizes: dict[str, tuple[ImageConfig | TextConfig, int, str]] = {
        "image": (image, image.visible_patches, "patch"),
        "text": (text, text.visible_tokens, "token"),
    }
    for name, (tower, left, unit) in sizes.items():
        if not 0 <= tower.mask_ratio < 1:
            raise UserError(f"config.model.{name}.mask_ratio must be in [0, 1), got {tower.mask_ratio}")
        if left < 1:
            raise UserError(f"config.model.{name}.mask_ratio {tower.mask_ratio} leaves no {unit}; lower it")
    if text.mask_ratio and text.pool in ("last", "final"):
        raise UserError(
            f"config.model.text.pool {text.pool!r} reads the token that ends a caption, which mask={text.mask} may "
            "remove; set mask_ratio to 0, or pool to 'mean'"
        )
    side, ratio = image.image_size // image.patch_size, image.mask_ratio
    if ratio and image.mask == "grid" and (side % 2 or ratio not in (0.25, 0.5, 0.75)):
        raise UserError(
            f"config.model.image.mask_ratio {ratio} of {side} x {side} patches: mask=grid removes 0.25, 0.5 or 0.75 "
            f"of an even number a side; set image_size {image.patch_size * (side + side % 2)} and "
            f"mask_ratio {min(0.75, max(0.25, round(4 * ratio) / 4))}"
        )
    root = math.isqrt(image.visible_patches)
    if ratio and image.mask == "resize" and root**2 != image.visible_patches:
        # Half a patch more is removed, so that rounding leaves the count as it is.
        near = [f"{1 - (n**2 + 0.5) / side**2:.4f} ({n} x {n})" for n in (root, root + 1) if n < side]
        raise UserError(
            f"config.model.image.mask_ratio {ratio} leaves {image.visible_patches} of {side} x {side} patches, but "
            f"mask=resize needs a square number of them; the nearest mask_ratio: {' or '.join(near)}"
        )
