"""The reconstruction head of the ablation: what its loss counts, and what it costs when it is off."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flip_jax import masking
from flip_jax.config import DecoderConfig
from flip_jax.models.flip import FLIP

SETTINGS = dataclasses.replace(helpers.MODEL, decoder=DecoderConfig(weight=0.5, width=24, depth=2, heads=2))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return FLIP(SETTINGS, nnx.Rngs(0))


@pytest.fixture(scope="module")
def seen(model):
    """Tokens, positions of the visible patches, and all patches of four pictures."""
    image, text = helpers.batch(4)
    view = masking.see(model.config, KEY, image, text)
    return model.image.tokens(view.patch_BxKxP, view.position_BxK), view.position_BxK, jnp.asarray(view.all_BxLxP)


def test_a_head_that_predicts_zero_has_the_variance_of_the_removed_patches(model, seen):
    tokens, keep, patches = seen
    head = nnx.clone(model.decoder)
    head.predict.kernel[...] = jnp.zeros_like(head.predict.kernel[...])
    values = patches.shape[2]  # of variance 1 with values - 1 degrees of freedom; 192 x 6e-8 = 1e-5
    np.testing.assert_allclose(head(tokens, keep, patches), (values - 1) / values, rtol=1e-5)
    # A constant patch has no variance: it counts where it is removed, and does not where it is visible.
    removed = np.setdiff1d(np.arange(16), keep[0])[0]
    flat = head(tokens, keep, patches.at[0, removed].set(7))
    np.testing.assert_allclose(flat, (values - 1) / values * (4 * 8 - 1) / (4 * 8), rtol=1e-5)
    np.testing.assert_allclose(head(tokens, keep, patches.at[0, keep[0, 0]].set(7)), (values - 1) / values, rtol=1e-5)


def test_tokens_go_to_the_places_they_came_from(model, seen):
    tokens, keep, patches = seen
    backwards = jnp.concatenate([tokens[:, :1], tokens[:, :0:-1]], axis=1)
    loss = model.decoder(tokens, keep, patches)
    np.testing.assert_allclose(model.decoder(backwards, keep[:, ::-1], patches), loss, rtol=1e-5)
    assert abs(model.decoder(backwards, keep, patches) - loss) > 1e-5


def test_its_weight_is_that_of_its_loss_in_training(model, seen):
    image, text = helpers.batch(4)
    *embeddings, added = model.encode_pairs(masking.see(model.config, KEY, image, text))
    np.testing.assert_allclose(added, 0.5 * model.decoder(*seen), rtol=1e-5)
    plain = FLIP(helpers.MODEL, nnx.Rngs(0))
    assert not hasattr(plain, "decoder")
    for ours, theirs in zip(embeddings, plain.encode_pairs(masking.see(plain.config, KEY, image, text)), strict=False):
        np.testing.assert_allclose(ours, theirs, atol=helpers.EMBEDDING)
