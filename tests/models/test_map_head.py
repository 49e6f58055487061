"""SigLIP's layout in training: the MAP head over masked patches, a projection of the text alone, the last position."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flip_jax import config_check, masking, sharding, weights
from flip_jax.config import DecoderConfig, MeshConfig
from flip_jax.models import vit
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError

SIGLIP = helpers.model_with(
    image_pool="map", text_pool="final", image_mlp_width=48, projection="text", loss="sigmoid", embed_dim=32
)


def test_every_parameter_learns_and_the_order_of_patches_does_not_matter():
    graphdef, params = nnx.split(FLIP(SIGLIP, nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    assert "cls" not in params["image"] and "image_projection" not in params
    assert params["image"]["pos_embed"].shape == (1, 16, 32)
    np.testing.assert_array_equal(params["image"]["pos_embed"], vit.sincos_2d(4, 32)[:, 1:])
    image, text = helpers.batch(8)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        view = masking.see(SIGLIP, jax.random.key(0), image, text)

        def loss(params):
            model = nnx.merge(graphdef, params)
            image_BxE, text_BxE, _ = model.encode_pairs(view)
            return model.compare(image_BxE, text_BxE), image_BxE

        (_, encoded), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # A key's bias adds the same to all scores of a row; fixed positions do not learn.
        assert np.any(grad != 0) != (name in ("image.pos_embed",)) or "key.bias" in name, name
    model = nnx.merge(graphdef, params)
    other = model.encode_patches(view.patch_BxKxP[:, ::-1], view.position_BxK[:, ::-1])
    np.testing.assert_allclose(other, encoded, atol=helpers.EMBEDDING)


def test_a_step_is_the_same_on_several_devices():
    config = dataclasses.replace(helpers.CONFIG, model=SIGLIP)
    (one,), _ = helpers.run_steps(1, MeshConfig(), steps=1, config=config)
    (several,), _ = helpers.run_steps(8, MeshConfig(fsdp=2, tensor=2), steps=1, config=config)
    np.testing.assert_allclose(several, one, rtol=helpers.LOSS)


def test_positions_are_resized_with_and_without_cls():
    table = jnp.arange(16.0).reshape(1, 16, 1)
    alone = vit.resize_positions(table, 8)
    assert alone.shape == (1, 64, 1)
    np.testing.assert_array_equal(vit.resize_positions(jnp.pad(table, [(0, 0), (1, 0), (0, 0)]), 8)[:, 1:], alone)
    larger = dataclasses.replace(SIGLIP.image, image_size=48)
    np.testing.assert_array_equal(weights.resize_weight(larger, "pos_embed", table), vit.sincos_2d(6, 32)[:, 1:])


def test_the_scale_of_a_sigmoid_loss_has_no_bounds():
    for loss, scale in (("sigmoid", 117.3), ("info_nce", 100.0)):
        model = FLIP(helpers.model_with(loss=loss), nnx.Rngs(0))
        model.logit_scale[...] = jnp.log(jnp.array([117.3]))
        np.testing.assert_allclose(model.scale(), scale, rtol=1e-5)


@pytest.mark.parametrize(
    "model, message",
    [
        (dataclasses.replace(SIGLIP, embed_dim=16), "projection 'text' leaves images as wide as their tower"),
        (
            dataclasses.replace(SIGLIP, decoder=DecoderConfig(weight=1.0, width=16, depth=1, heads=2)),
            "decoder needs the cls token",
        ),
        (dataclasses.replace(SIGLIP, text=dataclasses.replace(SIGLIP.text, mask_ratio=0.5)), "pool 'final' reads"),
        (dataclasses.replace(SIGLIP, projection="none"), "model.projection must be one of both, text"),
        (helpers.model_with(image_mlp_width=-1), "mlp_width must be at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, message):
    with pytest.raises(UserError, match=message):
        config_check.from_config_dict({"model": dataclasses.asdict(model)})
