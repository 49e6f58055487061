"""An encoder on masked images, as the paper's table 1d evaluates them."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from flip_jax import config_check, inference, saved_step, sharding
from flip_jax.config import MeshConfig
from flip_jax.inference import Encoder
from flip_jax.masking import gather, patchify
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError


@pytest.fixture(scope="module")
def encoder():
    """Trained, as it were, on 4 of 16 patches; on four devices."""
    config = dataclasses.replace(helpers.CONFIG, model=helpers.model_with(image_mask_ratio=0.7))
    graphdef, params = nnx.split(FLIP(config.model, nnx.Rngs(0)))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:4])):
        return Encoder(graphdef, params, None, config)


def test_masked_and_ensemble_embeddings_are_those_of_views_that_cover_the_image(encoder):
    image = helpers.batch(8)[0]
    patches = patchify(jnp.asarray(image), 8)
    views = np.asarray(inference._views(jax.random.key(encoder.config.seed), patches, 4))
    assert views.shape == (4, 8, 4)
    np.testing.assert_array_equal(np.sort(views.transpose(1, 0, 2).reshape(8, 16)), np.tile(np.arange(16), (8, 1)))
    assert len({tuple(row) for row in views[0]}) == 8  # each image has its own
    model = FLIP(encoder.config.model, nnx.Rngs(0))
    one, *others = (np.asarray(model.encode_patches(gather(patches, keep), keep)) for keep in views)
    np.testing.assert_allclose(encoder.encode_image(image, "masked"), one, atol=helpers.EMBEDDING)
    mean = np.mean([one, *others], axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode_image(image, "ensemble"), mean, atol=helpers.EMBEDDING)


@pytest.mark.parametrize("mask", ["masked", "ensemble"])
def test_a_masked_embedding_is_the_same_in_any_batch(encoder, mask):
    image = helpers.batch(8)[0]
    together = np.asarray(encoder.encode_image(image, mask))
    np.testing.assert_allclose(encoder.encode_image(image[5:6], mask), together[5:6], atol=helpers.EMBEDDING)
    assert np.abs(together - encoder.encode_image(image)).max() > 1e-3


@pytest.mark.parametrize("image", [{"mask_ratio": 0.0}, {"mask": "block"}])
def test_masked_inference_needs_a_model_that_was_masked_at_random(image):
    with pytest.raises(ValueError, match="config.eval.mask 'ensemble' masks at random as training does: it needs"):
        config_check.from_config_dict({"model": {"image": image}, "eval": {"mask": "ensemble"}})


def test_other_weights_leave_the_encoder_as_it_is(encoder):
    image = helpers.batch(4)[0]
    before = np.asarray(encoder.encode_image(image))
    other = encoder.with_params(jax.tree.map(lambda x: x + 0.1, encoder.params))
    assert np.abs(np.asarray(other.encode_image(image)) - before).max() > 1e-3
    np.testing.assert_array_equal(encoder.encode_image(image), before)


def test_pil_images_are_cropped_and_arrays_must_be_what_the_model_takes(encoder):
    image = helpers.batch(2)[0]
    truth = np.asarray(encoder.encode_image(image))
    one = Image.fromarray(image[0])
    np.testing.assert_allclose(encoder.encode_image(one), truth[:1], atol=helpers.EMBEDDING)
    both = encoder.encode_image([one, Image.fromarray(image[1])])
    np.testing.assert_allclose(both, truth, atol=helpers.EMBEDDING)
    np.testing.assert_allclose(encoder.encode_image(jnp.asarray(image)), truth, atol=helpers.EMBEDDING)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 32, 32, 3), np.float32), r"got float32 \[2, 32, 32, 3\]: values are 0 to 255"),
        (np.zeros((32, 32, 3), np.uint8), r"got uint8 \[32, 32, 3\]: add the batch axis, array\[None\]"),
        (np.zeros((2, 3, 32, 32), np.uint8), "channels come last"),
        (np.zeros((2, 48, 48, 3), np.uint8), r"uint8 \[B, 32, 32, 3\] or PIL images.* give PIL images"),
        ("cat.png", "got str. Open files with PIL.Image.open"),
        (["cat.png"], "got list of str. Open files with"),
        ([np.zeros((32, 32, 3), np.uint8)], "got list of ndarray.* numpy.stack"),
        (Image.fromarray(np.full((9, 9), 7.0, np.float32)), "image 0, of mode F, cannot be used: float image outside"),
    ],
)
def test_other_images_are_refused_with_the_remedy(encoder, images, message):
    with pytest.raises(UserError, match=message):
        encoder.encode_image(images)


def test_one_string_is_one_text_and_a_classifier_reads_none(encoder):
    two_towers = helpers.make_encoder()
    found = two_towers.encode_text("picture 1")
    np.testing.assert_array_equal(found, two_towers.encode_text(["picture 1"]))
    assert found.shape == (1, 16)
    with pytest.raises(UserError, match="texts must be strings, got int '3'"):
        two_towers.encode_text(["a", 3])
    with pytest.raises(UserError, match="a fine-tuned classifier reads no text"):
        encoder.encode_text("picture 1")  # it has no tokenizer


def test_a_model_that_cannot_be_reached_is_one_line(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(saved_step, "newest", refuse)
    with pytest.raises(UserError, match="gs://bucket/run cannot be read: .*Permission denied.*credentials"):
        inference.load("gs://bucket/run")
