"""transformers' CLIPModel and SiglipModel: recorded models in, and out again bit by bit."""

import copy
import json
import shutil

import helpers
import jax
import numpy as np
import pytest
import tokenizers
from helpers import FIXTURES, make_encoder
from safetensors.numpy import load_file

import flip_jax
from flip_jax.config import Config
from flip_jax.data.clip_tokenizer import ClipTokenizer
from flip_jax.formats import portable, transformers_settings
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip

NAMES = ("clip_largest", "clip_eos", "siglip", "siglip2")
FOLDER = FIXTURES / "transformers"


@pytest.mark.parametrize("name", NAMES)
def test_recorded_embeddings_are_given_and_the_model_is_exported_unchanged(name, tmp_path, capsys):
    """1e-5: the tolerance of `helpers.EMBEDDING`; text goes through the folder's own tokenizer.json."""
    recorded, folder = np.load(FOLDER / name / "outputs.npz"), FOLDER / name
    encoder = flip_jax.load(folder)
    z_image, z_text = encoder.encode_image(recorded["image"]), encoder.encode_text(recorded["texts"].tolist())
    np.testing.assert_allclose(z_image, recorded["z_image"], atol=1e-5)
    np.testing.assert_allclose(z_text, recorded["z_text"], atol=1e-5)
    bias = np.asarray(encoder.params.get("logit_bias", 0.0))
    logits = encoder.scale() * np.asarray(z_image) @ z_text.T + bias
    np.testing.assert_allclose(logits, recorded["logits"], rtol=1e-4, atol=1e-4)
    tokens = encoder.tokenizer(recorded["texts"].tolist(), encoder.config.model.text.context_length)
    if name.startswith("siglip"):
        np.testing.assert_array_equal(tokens, recorded["ids"])
    else:  # CLIP's padding is never read, and 0 here
        end = encoder.tokenizer.vocab_size - 1
        before = np.cumsum(recorded["ids"] == end, axis=1) - (recorded["ids"] == end) == 0
        np.testing.assert_array_equal(tokens, np.where(before, recorded["ids"], 0))

    assert flip.main(["convert", "import", str(folder), str(tmp_path / "ours")]) == 0
    assert flip.main(["convert", "export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format=transformers"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].shape == value.shape, key
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again = flip_jax.load(tmp_path / "out")
    assert again.config.model == encoder.config.model
    for left, right in zip(*map(jax.tree.leaves, (again.params, encoder.params)), strict=True):
        np.testing.assert_array_equal(left, right)
    texts = recorded["texts"].tolist()
    np.testing.assert_array_equal(again.tokenizer(texts, 12), encoder.tokenizer(texts, 12))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text, row in zip(texts, encoder.tokenizer(texts, 200), strict=True):
        ids = theirs.encode(text).ids
        assert ids == row[: len(ids)].tolist()


def settings(name):
    return json.loads((FOLDER / name / "config.json").read_text())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("siglip", {"model_type": "siglip2"}, r"the nearest that is read is siglip \(SigLIP 2"),
        ("clip_eos", {"model_type": "clop"}, "the nearest that is read is clip"),
        ("clip_eos", {"model_type": None}, "model_type None are unknown"),
        ("clip_eos", {"model_type": []}, r"model_type \[\] are unknown"),
        ("clip_eos", {"vision_config": {"layer_norm_eps": 10**400}}, "only numbers up to 2"),
        ("clip_eos", {"model_type": "chinese_clip"}, "nearest that is read is clip"),
        ("clip_eos", {"vision_config": {"num_channels": 4}}, "num_channels 4 cannot be expressed"),
        (
            "clip_eos",
            {"vision_config": {"hidden_act": "relu"}},
            "vision_config.hidden_act 'relu' .* only gelu_pytorch_tanh",
        ),
        ("clip_eos", {"text_config": {"hidden_act": "quick_gelu"}}, "hidden_act .* only the same in both towers"),
        ("clip_eos", {"text_config": {"layer_norm_eps": 0.5}}, "layer_norm_eps .* only the same in both towers"),
        ("clip_eos", {"text_config": {"hidden_size": "wide"}}, "text_config.hidden_size 'wide'"),
        ("clip_eos", {"text_config": {"num_attention_heads": 3}}, "does not divide by its heads 3"),
        ("clip_eos", {"text_config": [1]}, "text_config .* only groups of settings can"),
        ("siglip", {"vision_config": {"vision_use_head": False}}, "only a tower with its head"),
        ("siglip", {"text_config": {"projection_size": 31}}, "only the width of the image tower"),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused(name, change, message, tmp_path):
    content = copy.deepcopy(settings(name))
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        transformers_settings.model_settings(content, tmp_path)


def test_the_settings_of_released_models_are_read(tmp_path):
    """As OpenAI's B/32 and Google's so400m say them, most of it by default."""
    large = transformers_settings.model_settings(
        {"model_type": "clip", "text_config_dict": {"eos_token_id": 2}}, tmp_path
    )
    assert (large.image.width, large.image.patch_size, large.text.width, large.embed_dim) == (768, 32, 512, 512)
    assert (large.activation, large.norm_eps, large.image.mlp_width) == ("quick_gelu", 1e-5, 0)
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    content = {
        "model_type": "siglip",
        "text_config": tower,
        "vision_config": tower | {"patch_size": 14, "image_size": 378},
    }
    so400m = transformers_settings.model_settings(content, tmp_path)
    assert (so400m.image.mlp_width, so400m.embed_dim, so400m.text.context_length) == (4304, 1152, 64)
    assert (so400m.image.pixel_stats, so400m.activation, so400m.projection) == ("inception", "gelu_tanh", "text")


def test_pixels_of_unknown_statistics_are_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    with pytest.raises(UserError, match="image_mean and image_std .* cannot be expressed"):
        transformers_settings.model_settings(settings("clip_eos"), tmp_path)


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(tmp_path):
    shutil.copytree(FOLDER / "clip_eos", tmp_path / "clip")
    content = settings("clip_eos")
    content["text_config"]["eos_token_id"] = 5
    (tmp_path / "clip" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="CLIPModel pools the token of id 5 .* ends a text by 913"):
        flip_jax.load(tmp_path / "clip")


def test_names_and_shapes_that_differ_are_listed(tmp_path):
    shutil.copytree(FOLDER / "siglip", tmp_path / "siglip")
    content = settings("siglip")
    content["vision_config"]["intermediate_size"] = 100
    content["vision_config"]["num_hidden_layers"] = 1
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        flip_jax.load(tmp_path / "siglip")
    for line in (
        "vision_model.head.mlp.fc1.weight: file (128, 32), settings (100, 32)",
        "vision_model.encoder.layers.1.layer_norm1.bias: file (32,), settings absent",
    ):
        assert line in str(refused.value)


CLIP = {"image_pool": "cls", "image_pre_norm": True, "text_causal": True, "text_pool": "last"}


@pytest.mark.parametrize(
    "changes, reasons",
    [
        ({}, ["config.model.image.pool 'mean', not 'cls'", "config.model.text.causal False, not True", "clip_layout"]),
        (CLIP, ["a tokenizer without a token that ends each text"]),
        (CLIP | {"loss": "sigmoid"}, ["CLIPModel cannot express", "config.model.loss 'sigmoid', not 'info_nce'"]),
        (
            {"image_pool": "map", "text_pool": "final", "loss": "sigmoid"},
            ["SiglipModel cannot", "projection 'both', not 'text'"],
        ),
    ],
)
def test_what_transformers_cannot_express_is_refused_with_all_reasons(changes, reasons):
    with pytest.raises(UserError) as refused:
        transformers_settings.transformers_settings(helpers.model_with(**changes), None)
    for reason in reasons:
        assert reason in str(refused.value)


def test_flip_itself_is_refused_on_the_command_line(tmp_path, capsys):
    helpers.save(make_encoder(), tmp_path / "checkpoints" / "1")
    assert flip.main(["convert", "export", str(tmp_path), str(tmp_path / "out"), "--format=transformers"]) == 1
    assert "cannot express this model: config.model.image.pre_norm False" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_variant_is_expressible_with_clips_tokenizer():
    from configs import flip_b16
    from flip_jax import config_check

    config = config_check.from_config_dict(flip_b16.get_config("clip_layout"))
    assert config.model.image.mask_ratio == 0.5  # still FLIP
    content = transformers_settings.transformers_settings(config.model, 49_407)
    assert content["model_type"] == "clip" and content["vision_config"]["hidden_act"] == "gelu_pytorch_tanh"
    back = transformers_settings.model_settings(content, FOLDER)
    assert back.text.pool == "last" and back.image.pre_norm and isinstance(Config(model=back), Config)


def test_fixed_positions_and_a_bias_of_patches_are_folded(tmp_path):
    """FLIP's positions and bias in a CLIP layout: the same embeddings by transformers' names."""
    model = helpers.model_with(**CLIP)
    merges = [line.split() for line in (FIXTURES / "clip_bpe.txt").read_text("utf-8").splitlines()[1:20]]
    tokenizer = ClipTokenizer(merges)
    import dataclasses

    from flax import nnx

    from flip_jax.formats import transformers_models
    from flip_jax.models.flip import FLIP

    model = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab_size=tokenizer.vocab_size))
    ours = FLIP(model, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.split(ours)[1])
    params["image"]["patch_bias"] += 0.1
    (tmp_path / "out").mkdir()
    transformers_models.export_model(tmp_path / "out", model, params, tokenizer)
    graphdef = nnx.split(ours)[0]
    image, _ = helpers.batch(2)
    truth = nnx.merge(graphdef, params).encode_image(image)
    loaded = flip_jax.load(tmp_path / "out")
    assert loaded.config.model.image.positions == "learned" and not loaded.config.model.image.patch_bias
    np.testing.assert_allclose(loaded.encode_image(image), truth, atol=1e-5)
    assert portable.flat(loaded.params).keys() == {name for name in portable.flat(params) if "patch_bias" not in name}
