"""`flip convert` from and to open_clip: a recorded model, and our models evaluated as open_clip would."""

import copy
import dataclasses
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpy_towers
import pytest
from flax import nnx
from helpers import REPO
from safetensors.numpy import load_file, save_file

import flip_jax
from flip_jax import config_check, optim, weights
from flip_jax.data import vocabulary
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import names, open_clip, open_clip_settings
from flip_jax.models import vit
from flip_jax.models.flip import FLIP
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip

FIXTURES = REPO / "tests" / "fixtures"
WEIGHTS, SETTINGS = FIXTURES / "open_clip_model.safetensors", FIXTURES / "open_clip_config.json"
BYTE_PAIRS = FIXTURES / "clip_bpe.txt"
CONTENT = json.loads(SETTINGS.read_text())
BLOCKS = ("visual.transformer", "transformer")
WORD_PIECE = {"[PAD]": 0, "[UNK]": 1, "a": 2, "fox": 3}


def noisy(settings, seed=0):
    """Return a model without special values among its parameters, and the parameters."""
    rng = np.random.default_rng(seed)
    abstract = names.abstract_params(settings)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), abstract)
    params["image"]["pos_embed"] += vit.sincos_2d(4, settings.image.width)
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: FLIP(settings, nnx.Rngs(0))))[0], params), params


def test_the_numpy_towers_agree_with_open_clip():
    recorded, weights = np.load(FIXTURES / "open_clip_outputs.npz"), load_file(WEIGHTS)
    np.testing.assert_allclose(
        numpy_towers.embed_image(CONTENT, weights, recorded["image"]), recorded["z_image"], atol=1e-6
    )
    np.testing.assert_allclose(
        numpy_towers.embed_text(CONTENT, weights, recorded["text"]), recorded["z_text"], atol=1e-6
    )


def test_an_imported_model_gives_the_recorded_embeddings_and_is_exported_unchanged(tmp_path, capsys):
    recorded = np.load(FIXTURES / "open_clip_outputs.npz")
    files = [f"--open_clip_config={SETTINGS}", f"--vocab={BYTE_PAIRS}"]
    assert flip.main(["convert", "import", str(WEIGHTS), str(tmp_path / "ours"), *files]) == 0
    assert f"converted from the open_clip model {WEIGHTS}" in (tmp_path / "ours" / "README.md").read_text()
    encoder = flip_jax.load(tmp_path / "ours")
    np.testing.assert_allclose(encoder.encode_image(recorded["image"]), recorded["z_image"], atol=1e-5)
    model = nnx.merge(nnx.split(nnx.eval_shape(lambda: FLIP(encoder.config.model, nnx.Rngs(0))))[0], encoder.params)
    np.testing.assert_allclose(model.encode_text(jnp.asarray(recorded["text"])), recorded["z_text"], atol=1e-5)
    tokens = encoder.tokenizer(["the sting"], 12)
    np.testing.assert_allclose(
        encoder.encode_text(["the sting"]), numpy_towers.embed_text(CONTENT, load_file(WEIGHTS), tokens), atol=1e-5
    )

    export = ["convert", "export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format=open_clip"]
    assert flip.main(export) == 0
    assert "these 914: give it token ids" in capsys.readouterr().out
    assert json.loads((tmp_path / "theirs" / "card.json").read_text())["library"] == "open_clip"
    before, after = load_file(WEIGHTS), load_file(tmp_path / "theirs" / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    modes = {path.stat().st_mode for path in (tmp_path / "theirs").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}  # as readable as any other new file
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    exported = json.loads((tmp_path / "theirs" / "open_clip_config.json").read_text())
    assert exported["model_cfg"].items() >= {k: v for k, v in CONTENT["model_cfg"].items() if "cfg" not in k}.items()
    for tower in ("vision_cfg", "text_cfg"):
        assert exported["model_cfg"][tower].items() >= CONTENT["model_cfg"][tower].items()
    assert open_clip_settings.model_settings(exported, "") == encoder.config.model
    assert flip.main(export) == 1
    assert "already exists; use another folder" in capsys.readouterr().err


MIXED = {"image_pool": "patches", "image_pre_norm": True, "image_positions": "learned", "loss": "sigmoid"}


@pytest.mark.parametrize("changes", [{}, MIXED | {"activation": "gelu", "image_pixel_stats": "inception"}])
def test_flip_itself_is_exported_exactly(tmp_path, changes):
    """The official options: cls in the mean, a bias of patches, eps 1e-6, first-token text, WordPiece."""
    settings = helpers.model_with(**changes)
    model, params = noisy(settings)
    (tmp_path / "out").mkdir()
    open_clip.export_model(tmp_path / "out", settings, params, Tokenizer(WORD_PIECE))
    content = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    weights = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    image, text = helpers.batch(4)
    theirs = numpy_towers.embed_image(content, weights, image)
    np.testing.assert_allclose(theirs[:, : settings.embed_dim], model.encode_image(image), atol=1e-5)
    assert not np.any(np.round(theirs[:, settings.embed_dim :], 12))
    theirs = numpy_towers.embed_text(content, weights, text)
    np.testing.assert_allclose(theirs[:, : settings.embed_dim], model.encode_text(text), atol=1e-5)
    assert content["model_cfg"]["embed_dim"] == weights["text_projection"].shape[1] == weights["visual.proj"].shape[1]
    pieces = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert pieces["model"]["vocab"] == WORD_PIECE


def test_a_model_of_another_architecture_goes_out_and_in_again(tmp_path):
    """MLPs of other widths than 4 x, as ViT-g-14 and ViT-bigG-14 have them; the mean of the patches, exact GELU."""
    settings = helpers.model_with(
        image_pool="patches",
        image_pre_norm=True,
        image_patch_bias=False,
        image_positions="learned",
        image_mask_ratio=0.0,
        image_mlp_width=139,
        text_mlp_width=75,
        text_vocab_size=914,
        text_causal=True,
        text_pool="last",
        activation="gelu",
    )
    model, params = noisy(settings)
    params["logit_scale"] = jnp.abs(params["logit_scale"])  # an export would clip a negative one
    tokenizer = vocabulary.read(BYTE_PAIRS)
    open_clip.export_model(tmp_path, settings, params, tokenizer)
    files = [tmp_path / name for name in ("open_clip_model.safetensors", "open_clip_config.json")]
    content, weights = json.loads(files[1].read_text()), load_file(files[0])
    widths = [int(content["model_cfg"][tower]["mlp_ratio"] * 32) for tower in ("vision_cfg", "text_cfg")]
    assert widths == [139, 75] == [weights[f"{name}.resblocks.0.mlp.c_fc.bias"].size for name in BLOCKS]
    back, again = open_clip.import_model(*files)
    assert back == settings
    for ours, truth in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, truth)
    image, text = helpers.batch(3)[0], tokenizer(["the sting", "a", "over and over"], 8)
    np.testing.assert_allclose(model.encode_image(image), numpy_towers.embed_image(content, weights, image), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(text), numpy_towers.embed_text(content, weights, text), atol=1e-5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"text_pool": "mean"}, "never the mean"),
        ({"text_mask_padding": True}, "no padding mask"),
        ({"text_pool": "last", "text_causal": True}, "with the highest id"),
        (
            {"image_pool": "map", "text_pool": "final", "projection": "text"},
            "image.pool 'map', config.model.text.pool 'final', config.model.projection 'text': .*SigLIP's parts",
        ),
    ],
)
def test_models_that_open_clip_cannot_express_are_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        open_clip_settings.open_clip_settings(helpers.model_with(**changes), Tokenizer(WORD_PIECE))


@pytest.mark.parametrize(
    "group, key, value, reason",
    [
        ("vision_cfg", "layers", [3, 4, 6, 3], "one integer"),
        ("vision_cfg", "timm_model_name", "vit_base", "only None can"),
        ("vision_cfg", "mlp_ratio", float("nan"), "mlp_ratio nan .* a unit or more"),
        ("text_cfg", "mlp_ratio", -4, "mlp_ratio -4 .* a unit or more"),
        ("vision_cfg", "width", 10**400, "only numbers up to 2"),
        ("vision_cfg", "attentional_pool", True, "only False can"),
        ("vision_cfg", "pool_type", "none", "only 'tok' and 'avg' can"),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}, "the same in both"),
        ("vision_cfg", "act_kwargs", {"approximate": "tanh"}, "'approximate' of GELU"),
        ("vision_cfg", "width", "wide", "open_clip.json: vision_cfg: width must be like 768"),
        ("vision_cfg", "head_width", 0, "a positive integer"),
        ("vision_cfg", "pool_type", [], "pool_type must be like 'tok'"),
        ("vision_cfg", "act_kwargs", 3, "'approximate' of GELU"),
        ("vision_cfg", "norm_kwargs", {"eps": [1]}, "the same in both"),
        ("text_cfg", "heads", 3, "does not divide"),
        ("vision_cfg", "new", 1, "it is unknown"),
        ("text_cfg", "pool_type", "last", "only 'argmax'"),
        ("text_cfg", "hf_model_name", "roberta-base", "only None can"),
        ("text_cfg", "hf_tokenizer_name", "bert", "only None can"),
        ("text_cfg", "embed_cls", True, "only False can"),
        (None, "multimodal_cfg", {}, "it is unknown"),
        (None, "vision_cfg", 3, "must be a group of settings"),
    ],
)
def test_open_clip_models_that_cannot_be_expressed_here_are_refused(group, key, value, reason):
    content = copy.deepcopy(CONTENT)
    (content["model_cfg"][group] if group else content["model_cfg"])[key] = value
    with pytest.raises(UserError, match=reason):
        open_clip_settings.model_settings(content, "open_clip.json")


@pytest.mark.parametrize(
    "preprocessing",
    ["square", {"mean": 0}, {"mean": [0, 0, 0]}, {"resize_mode": "squash"}, {"interpolation": "nearest"}],
)
def test_unknown_preprocessing_is_refused(preprocessing):
    with pytest.raises(UserError, match="preprocess_cfg .* cannot be expressed"):
        open_clip_settings.model_settings(CONTENT | {"preprocess_cfg": preprocessing}, "open_clip.json")


def test_weights_of_another_model_are_refused_with_both_shapes(tmp_path):
    weights = load_file(WEIGHTS)
    del weights["visual.proj"]
    weights["ln_final.bias"], weights["more"] = np.zeros(17, np.float32), np.zeros(1, np.float32)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as refused:
        open_clip.import_model(tmp_path / "x.safetensors", SETTINGS)
    for line in (
        "visual.proj: file absent, settings (32, 24)",
        "ln_final.bias: file (17,), settings (16,)",
        "more: file (1,), settings absent",
    ):
        assert line in str(refused.value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    whole = WEIGHTS.read_bytes()
    for content in (b"", whole[:-1], b"\xff" * 8 + whole[8:], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="x.safetensors: "):
            open_clip.import_model(path, SETTINGS)
    with pytest.raises(UserError, match="absent.safetensors: "):
        open_clip.import_model(tmp_path / "absent.safetensors", SETTINGS)
    weights = load_file(WEIGHTS)
    for value, reason in (
        (np.float32(np.nan), "not finite: logit_scale"),
        (np.int64(1), "logit_scale is of type I64"),
    ):
        save_file(weights | {"logit_scale": np.array(value)}, path)
        with pytest.raises(UserError, match=reason):
            open_clip.import_model(path, SETTINGS)
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json"):
            open_clip.import_model(WEIGHTS, tmp_path / "x.json")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_constants_and_other_precisions_are_read(tmp_path, prefix):
    weights = load_file(WEIGHTS)
    wrapped = {prefix + name: value.astype(np.float64) for name, value in weights.items()}
    save_file(wrapped | {f"{prefix}attn_mask": np.zeros((12, 12))}, tmp_path / "x.safetensors")
    for ours, truth in zip(
        jax.tree.leaves(open_clip.import_model(tmp_path / "x.safetensors", SETTINGS)),
        jax.tree.leaves(open_clip.import_model(WEIGHTS, SETTINGS)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, truth)


def test_an_activation_that_is_not_stated_is_asked_for(tmp_path):
    model_cfg = {key: value for key, value in CONTENT["model_cfg"].items() if key != "quick_gelu"}
    silent, openai = tmp_path / "silent.json", tmp_path / "openai.safetensors"
    silent.write_text(json.dumps({"model_cfg": model_cfg}))
    save_file(load_file(WEIGHTS) | {"input_resolution": np.array(32)}, openai)
    with pytest.raises(UserError, match="silent.json does not say quick_gelu.* give --activation=quick_gelu"):
        open_clip.import_model(WEIGHTS, silent)
    with pytest.raises(UserError, match="OpenAI trained with QuickGELU, but .*silent.json does not say so"):
        open_clip.import_model(openai, silent)
    for activation in ("gelu", "quick_gelu"):
        assert open_clip.import_model(openai, silent, activation)[0].activation == activation
    with pytest.raises(UserError, match="quick_gelu True, which --activation=gelu contradicts"):
        open_clip.import_model(WEIGHTS, SETTINGS, "gelu")


def test_files_of_other_libraries_are_recognised(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        UserError, match="pytorch_model.bin is a file of PyTorch.* Save the model with open_clip: `python"
    ):
        open_clip.import_model(tmp_path / "pytorch_model.bin", SETTINGS)
    save_file({"text_model.embeddings.token_embedding.weight": np.zeros(1)}, tmp_path / "hf.safetensors")
    with pytest.raises(UserError, match="hf.safetensors has the names of Hugging Face's transformers"):
        open_clip.import_model(tmp_path / "hf.safetensors", SETTINGS)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="config.json is a configuration of Hugging Face's transformers"):
        open_clip.import_model(WEIGHTS, tmp_path / "config.json")


def test_learned_positions_are_trained_resized_and_not_decayed():
    settings = helpers.model_with(image_positions="learned", image_pre_norm=True, text_causal=True, text_pool="last")
    model, params = noisy(settings)
    graphdef = nnx.split(model)[0]
    image, text = helpers.batch(2)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return jnp.sum(model.encode_image(image) ** 3) + jnp.sum(model.encode_text(text) ** 3)

    by_position = jax.jit(jax.grad(loss))(params)["image"]["pos_embed"]
    assert np.all(np.any(by_position != 0, axis=2))
    decayed = optim.decay_mask(params)["image"]
    assert not (decayed["pos_embed"] or decayed["pre_norm"]["scale"] or decayed["pre_norm"]["bias"])
    larger = dataclasses.replace(settings.image, image_size=64)
    resized = weights.resize_weight(larger, "pos_embed", params["image"]["pos_embed"])
    assert resized.shape == (1, 65, 32)
    np.testing.assert_array_equal(resized[0, 0], params["image"]["pos_embed"][0, 0])
    np.testing.assert_allclose(resized[0, 1:].mean(0), params["image"]["pos_embed"][0, 1:].mean(0), atol=0.02)


@pytest.mark.parametrize("text", [{"pool": "first"}, {"pool": "last", "mask_padding": True}])
def test_causal_attention_needs_a_pool_that_sees(text):
    with pytest.raises(UserError, match="text.causal: no token sees the padding behind it"):
        config_check.from_config_dict({"model": {"text": {"causal": True} | text}})


def test_the_commands_of_earlier_versions_still_work(tmp_path, capsys):
    files = [f"--open_clip_config={SETTINGS}", f"--vocab={BYTE_PAIRS}"]
    assert flip.main(["convert", "open-clip-import", str(WEIGHTS), str(tmp_path / "ours"), *files]) == 0
    assert flip.main(["convert", "open-clip-export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    assert (tmp_path / "theirs" / "open_clip_config.json").is_file()
    assert flip.main(["convert", "import", str(WEIGHTS), str(tmp_path / "more")]) == 1
    assert "give --open_clip_config and --vocab, or name the folder" in capsys.readouterr().err
