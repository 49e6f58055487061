"""Masks: how many patches and tokens, which ones, and that the towers see exactly those."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import run_steps
from PIL import Image

from benchmarks import image_tower_cost
from flip_jax import config_check, inference, masking, models, sharding
from flip_jax.config import ImageConfig, MeshConfig
from flip_jax.evaluators import snapshot
from flip_jax.masking import gather, patchify
from flip_jax.models.flip import FLIP
from flip_jax.models.vit import resize_positions

KEY = jax.random.key(5)
# By name, because a strategy that somebody adds may break the rules that these keep.
OURS = ("random", "grid", "block", "centred", "cluster")
OURS_OF_TEXT = ("random", "prioritised", "truncate", "block", "frequency")


def positions(strategy, patches_or_tokens, keep, key=KEY):
    return np.asarray(jax.jit(strategy, static_argnums=2)(key, patches_or_tokens, keep))


def images(rows, side):
    """Patches [rows, side**2, 12] uint8 of noise."""
    return np.random.default_rng(0).integers(0, 256, (rows, side**2, 12), np.uint8)


def captions(rows, length):
    """Tokens [rows, length] with 1 to `length` real ones, some frequent and some rare."""
    rng = np.random.default_rng(1)
    tokens = np.minimum(rng.zipf(1.5, (rows, length)), 60).astype(np.int32)
    tokens[np.arange(length)[None] >= rng.integers(1, length + 1, rows)[:, None]] = 0
    return tokens


@pytest.mark.parametrize("patches, ratio, keep", [(196, 0.5, 98), (196, 0.75, 49), (256, 0.5, 128), (49, 0.75, 12)])
def test_the_number_of_visible_patches_is_rounded_down(patches, ratio, keep):
    side = int(patches**0.5)
    assert ImageConfig(image_size=16 * side, mask_ratio=ratio).visible_patches == keep


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("side, keep", [(4, 8), (6, 9), (14, 49)])
def test_image_strategies_keep_distinct_patches_exactly_as_many_as_asked(name, side, keep):
    ids = positions(masking.STRATEGIES[name], images(64, side), keep)
    assert (ids.shape, ids.dtype) == ((64, keep), np.int32)
    assert all(len(set(row)) == keep for row in ids)
    assert ids.min() >= 0 and ids.max() < side**2
    assert len({tuple(sorted(row)) for row in ids}) > 1


@pytest.mark.parametrize("name", OURS_OF_TEXT)
@pytest.mark.parametrize("length, keep", [(32, 16), (16, 4), (8, 8)])
def test_text_strategies_keep_distinct_tokens_in_the_order_of_the_text(name, length, keep):
    ids = positions(masking.TEXT_STRATEGIES[name], captions(64, length), keep)
    assert (ids.shape, ids.dtype) == ((64, keep), np.int32)
    assert np.all(np.diff(ids, axis=1) > 0)
    assert ids.min() >= 0 and ids.max() < length


def test_random_keeps_each_patch_equally_often():
    ids = positions(masking.random, np.zeros((4000, 16, 3), np.uint8), 4)
    share = np.bincount(ids.ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.03)  # 4 standard deviations


@pytest.mark.parametrize("keep", [4, 8, 12])
def test_grid_keeps_the_same_patches_of_every_two_by_two(keep):
    offsets = set()
    for row in positions(masking.grid, images(64, 4), keep):
        kept = np.zeros(16, bool)
        kept[row] = True
        windows = kept.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
        assert np.all(windows == windows[0])
        offsets.add(tuple(windows[0]))
    # One kept (or removed) in any of four places; of two, those of a diagonal.
    diagonals = {(True, False, False, True), (False, True, True, False)}
    assert offsets == diagonals if keep == 8 else len(offsets) == 4


def test_block_keeps_one_rectangle_but_for_the_patches_too_many():
    heights, rows, columns = set(), set(), set()
    for ids in positions(masking.block, images(200, 14), 49):
        row, column = np.divmod(ids, 14)
        height, width = np.ptp(row) + 1, np.ptp(column) + 1
        assert height * width - 49 < height  # less than a column was trimmed
        assert 0.3 / 1.3 <= height / width <= 1.3 / 0.3  # up to the rounding
        heights.add(height)
        rows.add(row.min())
        columns.add(column.max())
    assert len(heights) > 5 and {0} < rows and {13} < columns


def test_centred_keeps_patches_as_often_as_weighted_draws_without_replacement():
    """Against NumPy's own draws, each patch within 5 standard deviations."""
    ids = positions(masking.centred, images(8000, 4), 6)
    share = np.bincount(ids.ravel(), minlength=16) / 8000
    centre = np.array([-0.75, -0.25, 0.25, 0.75])  # of the patches, the image being from -1 to 1
    weight = np.exp(-(centre[:, None] ** 2 + centre[None] ** 2) / (2 * 0.8**2)).ravel()
    rng = np.random.default_rng(0)
    drawn = [rng.choice(16, 6, replace=False, p=weight / weight.sum()) for _ in range(8000)]
    expected = np.bincount(np.ravel(drawn), minlength=16) / 8000
    assert expected[5] / expected[0] > 1.5  # centre and corner differ
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(2 * 0.25 / 8000))


def test_cluster_removes_what_looks_alike():
    """Half the patches are shades of one pattern, half of its negative; one anchor of 16 takes its half along."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=12)
    sign = np.stack([rng.permutation(np.repeat([-1, 1], 8)) for _ in range(64)])
    contrast = rng.uniform(20, 40, (64, 16))
    patches = 128 + (sign * contrast)[:, :, None] * pattern + rng.normal(size=(64, 16, 12))
    ids = positions(masking.cluster, np.clip(patches, 0, 255).astype(np.uint8), 8)
    kept = np.take_along_axis(sign, ids, axis=1)
    assert np.all(kept == kept[:, :1])
    assert set(kept[:, 0]) == {-1, 1}


def test_cluster_takes_patches_that_are_all_the_same_at_random():
    ids = positions(masking.cluster, np.full((2000, 16, 12), 255, np.uint8), 4)
    np.testing.assert_allclose(np.bincount(ids.ravel(), minlength=16) / 2000, 0.25, atol=0.04)  # 4 standard deviations


def test_random_text_strategies_agree_with_numpy_given_the_noise():
    tokens = captions(64, 16)
    uniform, exponential = (np.asarray(draw(KEY, (64, 16))) for draw in (jax.random.uniform, jax.random.exponential))
    pad = tokens == 0
    count = np.vectorize(dict(zip(*np.unique(tokens, return_counts=True), strict=True)).get)(tokens)
    scores = {
        "random": uniform,
        "prioritised": np.where(pad, np.inf, uniform),
        "frequency": np.where(pad, np.inf, exponential * np.sqrt(count)),
    }
    for name, score in scores.items():
        expected = np.sort(np.argsort(score, axis=1, kind="stable")[:, :6], axis=1)
        np.testing.assert_array_equal(positions(masking.TEXT_STRATEGIES[name], tokens, 6), expected, name)


@pytest.mark.parametrize("name", ["prioritised", "frequency", "truncate", "block"])
def test_padding_goes_first(name):
    tokens = captions(200, 16)
    ids = positions(masking.TEXT_STRATEGIES[name], tokens, 6)
    kept = np.sum(np.take_along_axis(tokens, ids, axis=1) != 0, axis=1)
    np.testing.assert_array_equal(kept, np.minimum(np.sum(tokens != 0, axis=1), 6))


def test_block_of_text_starts_anywhere_within_the_real_tokens():
    tokens = np.tile(np.array([[1] * 9 + [0] * 7]), (3000, 1)).astype(np.int32)
    ids = positions(masking.token_block, tokens, 4)
    assert np.all(np.diff(ids, axis=1) == 1)
    np.testing.assert_allclose(np.bincount(ids[:, 0], minlength=6) / 3000, 1 / 6, atol=0.03)  # 4 standard deviations


def test_frequency_keeps_rare_tokens_by_the_square_root_of_their_share():
    """Word 1 occurs 4,000 times, each other word 40 times: of two words the rare one stays 10 times out of 11."""
    tokens = np.stack([np.ones(4000), 2 + np.arange(4000) % 100], axis=1).astype(np.int32)
    share = np.mean(positions(masking.frequency, tokens, 1) == 1)
    assert share == pytest.approx(10 / 11, abs=4 * np.sqrt(10 / 121 / 4000))


@pytest.mark.parametrize("name", OURS)
def test_image_masks_do_not_depend_on_the_layout_of_devices(name):
    same_on_any_layout(masking.STRATEGIES[name], images(16, 6), 9)


@pytest.mark.parametrize("name", OURS_OF_TEXT)
def test_text_masks_do_not_depend_on_the_layout_of_devices(name):
    same_on_any_layout(masking.TEXT_STRATEGIES[name], captions(16, 16), 8)


def same_on_any_layout(strategy, rows, keep):
    ids = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        ids.append(positions(strategy, jax.device_put(rows, sharding.batch_sharding(mesh)), keep))
    np.testing.assert_array_equal(*ids)


@pytest.mark.slow
def test_masked_training_does_not_depend_on_the_layout_of_devices():
    """With word counts over the global batch."""
    model = helpers.model_with(image_mask="block", text_mask="frequency", text_mask_ratio=0.5)
    losses = [
        run_steps(n, MeshConfig(), steps=2, config=dataclasses.replace(helpers.CONFIG, model=model))[0] for n in (1, 8)
    ]
    np.testing.assert_allclose(*losses, rtol=helpers.LOSS)


def test_masking_text_does_not_change_which_patches_stay():
    image, text = helpers.batch(4)
    whole, masked = (masking.see(helpers.model_with(text_mask_ratio=ratio), KEY, image, text) for ratio in (0.0, 0.5))
    np.testing.assert_array_equal(whole.position_BxK, masked.position_BxK)
    np.testing.assert_array_equal(whole.patch_BxKxP, masked.patch_BxKxP)
    assert whole.token_position_BxK is None and masked.token_position_BxK.shape == (4, 4)


def test_the_towers_are_given_the_visible_part_alone():
    """A changed pixel outside of the visible patches, or a changed token that is dropped, changes nothing they get."""
    model = helpers.model_with(text_mask="truncate", text_mask_ratio=0.5)
    image, text = helpers.batch(4)
    view = masking.see(model, KEY, image, text)
    patches = np.asarray(patchify(image, 8))
    np.testing.assert_array_equal(
        view.patch_BxKxP, np.take_along_axis(patches, np.asarray(view.position_BxK)[:, :, None], 1)
    )
    hidden = np.setdiff1d(np.arange(16), view.position_BxK[0])[0]
    row, column = divmod(hidden, 4)
    image[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
    text[:, 4:] = 1
    for ours, theirs in zip(view, masking.see(model, KEY, image, text), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_image_is_drawn_from_its_visible_patches():
    image = helpers.batch(1)[0]
    patches, positions = masking.see_image(helpers.MODEL.image, KEY, image)
    drawn = snapshot.unpatchify(np.asarray(patches[0]), np.asarray(positions[0]), 4)
    for place in range(16):
        row, column = (8 * x for x in divmod(place, 4))
        expected = image[0, row : row + 8, column : column + 8] if place in positions[0] else snapshot.GREY
        assert np.all(drawn[row : row + 8, column : column + 8] == expected)
    resized = helpers.model_with(image_mask="resize", image_mask_ratio=0.75).image
    patches, positions = masking.see_image(resized, KEY, image)
    np.testing.assert_array_equal(
        snapshot.unpatchify(np.asarray(patches[0]), positions, 4), masking.resize(image, 16)[0]
    )


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_masked_text_equals_the_unmasked_tower_on_the_same_tokens(pool):
    """A tower whose whole text is the kept tokens, given their positions, computes the same embedding."""
    model = FLIP(helpers.model_with(text_pool=pool, text_mask_padding=True), nnx.Rngs(0))
    text = helpers.batch(3)[1]
    keep = jnp.array([[0, 3, 6], [1, 2, 7], [0, 1, 2]])
    masked = model.encode_text(np.take_along_axis(text, np.asarray(keep), 1), keep)
    small = FLIP(helpers.model_with(text_pool=pool, text_mask_padding=True, text_context_length=3), nnx.Rngs(0))
    small.text.token_embed[...] = model.text.token_embed[...]
    small.text.transformer, small.text_projection = model.text.transformer, model.text_projection
    for row in range(3):
        small.text.pos_embed[...] = model.text.pos_embed[...][:, keep[row]]
        alone = small.encode_text(text[row, keep[row]][None])
        np.testing.assert_allclose(masked[row], alone[0], atol=helpers.EMBEDDING)


def test_resizing_equals_encoding_an_image_resized_elsewhere():
    """Images and position table resized by Pillow, the table in a model of that size."""
    model = FLIP(helpers.model_with(image_mask="resize", image_mask_ratio=0.75), nnx.Rngs(0))
    image, text = helpers.batch(2)
    view = masking.see(model.config, KEY, image, text)
    assert (view.position_BxK, view.token_position_BxK) == (None, None)
    ours = model.encode_pairs(view)[0]

    def by_pillow(x, side):
        planes = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in x]
        return np.stack(planes, axis=-1)

    smaller = np.stack([by_pillow(x.transpose(2, 0, 1).astype(np.float32), 16) for x in image])
    smaller = np.clip(np.round(smaller), 0, 255).astype(np.uint8)
    assert np.abs(masking.resize(image, 16).astype(int) - smaller).max() <= 1
    table = np.asarray(model.image.pos_embed[0])
    by_channel = by_pillow(table[1:].reshape(4, 4, -1).transpose(2, 0, 1), 2).reshape(1, 4, -1)
    np.testing.assert_allclose(resize_positions(table[None], 2)[:, 1:], by_channel, atol=helpers.EMBEDDING)
    small = FLIP(helpers.model_with(image_image_size=16), nnx.Rngs(0))
    small.image.pos_embed[...] = jnp.concatenate([table[None, :1], by_channel], axis=1)
    # A few of 768 pixels are rounded the other way, each by 1 of 255.
    np.testing.assert_allclose(ours, small.encode_image(smaller), atol=5e-3)


def test_masked_text_is_counted_as_the_shorter_text_that_it_is():
    masked, short = (
        models.flops_per_sample(dataclasses.replace(helpers.CONFIG, model=helpers.model_with(**changes)))
        for changes in ({"text_mask_ratio": 0.5}, {"text_context_length": 4})
    )
    assert masked == short


def test_views_that_do_not_divide_the_image_cover_it_completely():
    views = np.asarray(inference._views(KEY, images(5, 3), 4))  # 9 patches
    assert views.shape == (3, 5, 4)
    for row in views.transpose(1, 0, 2):
        assert set(row.ravel()) == set(range(9)) and all(len(set(view)) == 4 for view in row)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "image",
            {"mask": "grid", "mask_ratio": 0.6},
            "mask=grid removes 0.25, 0.5 or 0.75 .* image_size 224 and mask_ratio 0.5",
        ),
        (
            "image",
            {"mask": "grid", "mask_ratio": 0.75, "patch_size": 32},
            "7 x 7 patches: .* image_size 256 and mask_ratio 0.75",
        ),
        (
            "image",
            {"mask": "resize", "mask_ratio": 0.5},
            r"leaves 98 of 14 x 14 .* 0.5842 \(9 x 9\) or 0.4872 \(10 x 10\)",
        ),
        (
            "image",
            {"mask": "centered"},
            "config.model.image.mask must be one of random, grid, block, centred, cluster, resize",
        ),
        (
            "text",
            {"mask": "syntax"},
            "config.model.text.mask must be one of random, prioritised, truncate, block, frequency",
        ),
        ("text", {"mask_ratio": 1.0}, r"config.model.text.mask_ratio must be in \[0, 1\), got 1.0"),
        ("text", {"mask_ratio": 0.99}, "config.model.text.mask_ratio 0.99 leaves no token"),
        ("text", {"mask_ratio": 0.5, "pool": "last"}, "pool 'last' reads the token that ends a caption"),
    ],
)
def test_masks_that_make_no_sense_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        config_check.from_config_dict({"model": {name: settings}})


@pytest.mark.parametrize("ratio", [0.5842, 0.4872])
def test_a_ratio_that_the_refusal_names_is_accepted(ratio):
    config_check.from_config_dict({"model": {"image": {"mask": "resize", "mask_ratio": ratio}}})


def test_masked_tower_equals_the_unmasked_tower_on_the_same_patches():
    """A model whose whole image is the four kept patches, given their positions, computes the same embedding."""
    model = FLIP(helpers.model_with(), nnx.Rngs(0))
    patches = patchify(jnp.asarray(helpers.batch(4)[0]), 8)
    keep = jnp.array([[3, 0, 9, 15], [1, 2, 3, 4], [15, 14, 13, 12], [0, 5, 10, 15]])
    masked = model.encode_patches(gather(patches, keep), keep)
    small = FLIP(helpers.model_with(image_image_size=16), nnx.Rngs(0))  # 2 x 2 patches
    table = model.image.pos_embed[0]
    for row in range(4):
        small.image.pos_embed[...] = jnp.concatenate([table[:1], table[1:][keep[row]]])[None]
        alone = small.encode_patches(patches[row, keep[row]][None])
        np.testing.assert_allclose(masked[row], alone[0], atol=helpers.EMBEDDING)


def test_masking_saves_its_share_of_the_compute_by_the_compilers_count(load_recipe):
    """L/16 with one layer, which costs what each of its layers does; the paper's table 1a: 0.52 and 0.28 with text."""
    model = load_recipe("flip_l16").model
    costs = []
    for ratio in (0.0, 0.5, 0.75):
        image = dataclasses.replace(model.image, depth=1, mask_ratio=ratio)
        costs.append(image_tower_cost.tower_flops(dataclasses.replace(model, image=image)))
    assert costs[1] / costs[0] <= 0.53
    assert costs[2] / costs[0] <= 0.29


def test_order_of_the_kept_patches_does_not_matter():
    model = FLIP(helpers.model_with(), nnx.Rngs(0))
    patches = patchify(jnp.asarray(helpers.batch(2)[0]), 8)
    keep = jnp.array([[3, 0, 9, 15], [1, 2, 3, 4]])
    forwards, backwards = (model.encode_patches(gather(patches, x), x) for x in (keep, keep[:, ::-1]))
    np.testing.assert_allclose(forwards, backwards, atol=helpers.EMBEDDING)


def test_no_masking_shuffles_nothing():
    image = helpers.batch(2)[0]
    patches, positions = masking.see_image(helpers.model_with(image_mask_ratio=0.0).image, KEY, image)
    assert positions is None
    np.testing.assert_array_equal(patches, patchify(image, 8))


def test_patches_are_in_row_order_each_row_column_channel():
    image = np.arange(4 * 6 * 3, dtype=np.float32).reshape(1, 4, 6, 3)
    patches = patchify(jnp.asarray(image), 2)
    np.testing.assert_array_equal(patches[0, 4], image[0, 2:4, 2:4].ravel())
