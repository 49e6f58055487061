"""Towers: options that change the arithmetic, and those that must not."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import masking, models, sharding
from flip_jax.config import Config, MeshConfig
from flip_jax.models import transformer
from flip_jax.models.flip import FLIP
from flip_jax.models.vit import sincos_2d


def test_sincos_table_has_the_column_first():
    """Against the formula, entry by entry, in f64."""
    table, width = sincos_2d(3, 8), 8
    assert table.shape == (1, 10, 8)
    np.testing.assert_array_equal(table[0, 0], 0)
    for row in range(3):
        for column in range(3):
            w = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
            expected = [f(x * wk) for x in (column, row) for f in (np.sin, np.cos) for wk in w]
            np.testing.assert_allclose(table[0, 1 + 3 * row + column], expected, atol=1e-6)


def test_position_table_gets_no_gradient():
    graphdef, params = nnx.split(FLIP(helpers.MODEL, nnx.Rngs(0)))
    image, text = helpers.batch(4)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return jnp.sum(model.encode_image(image) * model.encode_text(text))

    grads = nnx.to_pure_dict(jax.grad(loss)(params))
    assert not np.any(grads["image"]["pos_embed"])
    assert np.any(grads["text"]["pos_embed"])


@pytest.mark.parametrize("remat", ["dots", "names", "full"])
def test_recomputing_does_not_change_the_gradients(remat):
    """The saved and the recomputed activations are the same numbers, up to rounding."""
    image, text = helpers.batch(4)
    keep, grads = np.tile(np.arange(0, 16, 2), (4, 1)), []
    patches = masking.gather(masking.patchify(jnp.asarray(image), 8), keep)
    for policy in ("none", remat):
        graphdef, params = nnx.split(FLIP(helpers.model_with(remat=policy), nnx.Rngs(0)))

        def loss(params, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            return jnp.sum(model.encode_patches(patches, keep) * model.encode_text(text))

        grads.append(jax.jit(jax.grad(loss))(params))
    for (path, one), (_, other) in zip(*map(jax.tree_util.tree_leaves_with_path, grads), strict=True):
        # Sums of at most 128 terms: 128 x 6e-8. The gradient of a key bias is zero but for its rounding noise.
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max())


def change_padding(model):
    """Gives the padding token another embedding; noise, because a constant would vanish in the first norm."""
    table = model.text.token_embed[...]
    model.text.token_embed[...] = table.at[0].add(jax.random.normal(jax.random.key(9), table.shape[1:]))


def test_official_text_tower_sees_padding_and_reads_the_first_token():
    model = FLIP(helpers.MODEL, nnx.Rngs(0))
    short = np.array([[5, 6, 0, 0, 0, 0, 0, 0]], np.int32)
    before = model.encode_text(short)
    change_padding(model)
    assert np.abs(before - model.encode_text(short)).max() > 1e-3


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_masked_padding_leaves_no_trace(pool):
    model = FLIP(helpers.model_with(text_mask_padding=True, text_pool=pool), nnx.Rngs(0))
    short = np.array([[5, 6, 0, 0, 0, 0, 0, 0], [0] * 8], np.int32)
    before = model.encode_text(short)
    assert np.isfinite(before).all()  # an empty caption, too
    change_padding(model)
    np.testing.assert_allclose(before[0], model.encode_text(short)[0], atol=1e-6)


def test_bfloat16_stays_near_float32_with_float32_parameters_and_outputs():
    images, text = helpers.batch(4)
    full, half = (FLIP(helpers.model_with(dtype=dtype), nnx.Rngs(0)) for dtype in ("float32", "bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(nnx.split(half)[1])} == {jnp.dtype("float32")}
    for one, other in (
        (full.encode_image(images), half.encode_image(images)),
        (full.encode_text(text), half.encode_text(text)),
    ):
        assert other.dtype == jnp.float32
        # Rounding to bf16 is 4e-3, and 16 roundings in one direction are an angle of 6e-2, of which the cosine is this.
        np.testing.assert_allclose(jnp.sum(one * other, axis=1), 1, atol=2e-3)


def test_embeddings_are_normalised_and_scale_is_held_within_its_bounds():
    model = FLIP(helpers.MODEL, nnx.Rngs(0))
    np.testing.assert_allclose(jnp.linalg.norm(model.encode_image(helpers.batch(4)[0]), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.scale(), 1 / 0.07, rtol=1e-6)
    for stored, scale in ((9.0, 100.0), (-3.0, 1.0)):
        model.logit_scale[...] = jnp.full((1,), stored)
        np.testing.assert_allclose(model.scale(), scale, rtol=1e-5)


def test_counted_flops_agree_with_the_compiler(load_recipe):
    """The forward pass of one unrolled layer each, by XLA's cost analysis; it also counts norms, softmax and GELU."""
    settings = helpers.model_with(image_width=256, text_width=256, image_depth=1, text_depth=1, image_mask_ratio=0.0)
    graphdef, params = nnx.split(FLIP(settings, nnx.Rngs(0)))
    image, text = helpers.batch(8)

    def forward(params):
        model = nnx.merge(graphdef, params)
        return model.encode_image(image), model.encode_text(text)

    counted = jax.jit(forward).lower(params).compile().cost_analysis()["flops"] / 8
    assert 0.85 < models.flops_per_sample(Config(model=settings)) / 3 / counted <= 1.01


def test_a_caption_of_padding_alone_leaves_the_gradients_finite():
    """Random masking may drop all words of a short caption; their mean is then 0, which has no direction."""
    graphdef, params = nnx.split(FLIP(helpers.model_with(text_pool="mean", text_mask_padding=True), nnx.Rngs(0)))
    _, text = helpers.batch(4)
    text[1] = 0

    def total(params):
        embedding = nnx.merge(graphdef, params).encode_text(text)
        return jnp.sum(jnp.sin(embedding)), embedding

    grads, text_BxE = jax.grad(total, has_aux=True)(params)
    np.testing.assert_array_equal(text_BxE[1], 0)
    np.testing.assert_allclose(jnp.linalg.norm(text_BxE[jnp.array([0, 2, 3])], axis=1), 1, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("shards", [1, 4])
def test_attention_in_slices_of_rows_is_attention(mask, shards, monkeypatch):
    """Values and gradients of what v4, v5e and v6e do; a device's 3 or 12 rows are taken one or two at a time."""
    masks = {
        "none": None,
        "padding": jnp.arange(7)[None, None, None] < jnp.arange(1, 13)[:, None, None, None] % 7 + 1,
        "causal": jnp.tril(jnp.ones((1, 1, 7, 7), bool)),
    }

    def loss(qkv, by):
        return jnp.sum(jnp.sin(transformer.attend(*qkv, masks[mask], by)))

    qkv = jax.random.normal(jax.random.key(0), (3, 12, 7, 4, 8))
    expected, whole = jax.value_and_grad(loss)(qkv, "xla")
    monkeypatch.setattr(transformer, "SLICED", ("cpu",))
    monkeypatch.setattr(transformer, "SCORES", 2 * 4 * 7**2)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:shards])):
        qkv = jax.device_put(qkv, NamedSharding(jax.sharding.get_mesh(), PartitionSpec(None, sharding.BATCH)))
        assert "scan" in str(jax.make_jaxpr(loss, static_argnums=1)(qkv, "auto"))
        found, sliced = jax.jit(jax.value_and_grad(loss), static_argnums=1)(qkv, "auto")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)  # a sum of 2,688 terms up to 1, rounded to 6e-8 each
    np.testing.assert_allclose(sliced, whole, rtol=1e-5, atol=5e-6)  # sums over 7 tokens and 8 channels: 56 x 6e-8


@pytest.mark.parametrize("tokens", [6, 7])
def test_attention_by_cudnn_leaves_out_the_token_that_makes_it_even(tokens, monkeypatch):
    """Values and gradients, with XLA's attention in place of cuDNN's."""
    plain = jax.nn.dot_product_attention
    given = []

    def stand_in(*args, implementation, **kwargs):
        given.append((implementation, args[0].shape[1]))
        return plain(*args, **kwargs)

    def loss(qkv, by):
        return jnp.sum(jnp.sin(transformer.attend(*qkv, None, by)))

    qkv = jax.random.normal(jax.random.key(0), (3, 2, tokens, 4, 8))
    expected, by_xla = jax.value_and_grad(loss)(qkv, "xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found, by_cudnn = jax.value_and_grad(loss)(qkv, "cudnn")
    assert given == [("cudnn", tokens + tokens % 2)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)  # a sum of 448 terms up to 1, rounded to 6e-8 each
    np.testing.assert_allclose(by_cudnn, by_xla, rtol=1e-5, atol=5e-6)  # sums over 7 tokens and 8 channels: 56 x 6e-8


def test_cudnn_attention_is_asked_for_on_gpus(load_recipe, monkeypatch):
    """No GPU is needed to lower for one: each layer's attention is one call of cuDNN's, forward and backward."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    sizes = "model.image.width=64,model.image.depth=2,model.image.heads=1,model.image.image_size=64,"
    texts = "model.text.width=64,model.text.depth=2,model.text.heads=1,"
    for mask_padding, calls in (("false", 2), ("true", 1)):  # a tower's layers are one loop
        arg = f"{sizes}{texts}model.attention=cudnn,model.text.mask_padding={mask_padding}"
        settings = load_recipe("flip_b16", arg).model
        graphdef, params = nnx.split(nnx.eval_shape(lambda settings=settings: FLIP(settings, nnx.Rngs(0))))

        def total(params, image, text, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            return jnp.sum(model.encode_image(image)) + jnp.sum(model.encode_text(text))

        image, text = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8), jax.ShapeDtypeStruct((2, 32), jnp.int32)
        lowered = jax.jit(jax.grad(total)).trace(params, image, text).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("@__cudnn$fmhaSoftmax(") == calls
        assert lowered.count("@__cudnn$fmhaSoftmaxBackward(") == calls
