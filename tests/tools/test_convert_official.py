"""`flip convert official`: recorded checkpoints, converted and evaluated independently in NumPy."""

import dataclasses
import gzip
import shutil
import tarfile

import numpy as np
import numpy_towers
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from helpers import recorded_parameters

import flip_jax
from flip_jax.config import ImageConfig, ModelConfig, TextConfig
from flip_jax.models.vit import sincos_2d
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip
from flip_jax.tools.compat import official

SETTINGS = ModelConfig(
    image=ImageConfig(image_size=64, patch_size=16, width=64, depth=3, heads=4, mask_ratio=0.5),
    text=TextConfig(vocab_size=1001, width=48, depth=2, heads=4),
    embed_dim=32,
    dtype="float32",
)
RECIPE = f"""
import dataclasses
from ml_collections import ConfigDict
from flip_jax.config import Config, DecoderConfig, ImageConfig, ModelConfig, TextConfig

def get_config():
    return ConfigDict(dataclasses.asdict(Config(model={SETTINGS!r})))
"""
STATS = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


@pytest.fixture
def checkpoint(recorded, tmp_path):
    """The recorded checkpoint after three steps, unpacked for the test to damage."""
    return unpack(recorded, tmp_path / "checkpoint_3", "gcs", "one_chunk")


def unpack(recorded, folder, index, arrays):
    """Put a recorded index and arrays together as the official code wrote them."""
    for tower in ("image", "text"):
        with tarfile.open(recorded / f"arrays_{arrays}_{tower}.tar.gz") as tar:
            tar.extractall(folder, filter="data")
    (folder / "checkpoint").write_bytes(gzip.decompress((recorded / f"checkpoint_{index}.gz").read_bytes()))
    return folder


def tower(arrays, name, depth):
    """Rename a tower's official weights for `numpy_towers.blocks`."""
    weights = {}
    for i in range(depth):
        block, ours = f"{name}/Transformer/encoderblock_{i:02}", f"x.resblocks.{i}"
        for theirs, norm in (("LayerNorm_0", "ln_1"), ("LayerNorm_1", "ln_2")):
            weights[f"{ours}.{norm}.weight"] = arrays[f"{block}/{theirs}/scale"]
            weights[f"{ours}.{norm}.bias"] = arrays[f"{block}/{theirs}/bias"]
        attention = f"{block}/MultiHeadDotProductAttention_0"
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        weights[f"{ours}.attn.in_proj_weight"] = np.concatenate([arrays[f"{part}/kernel"].T for part in parts])
        weights[f"{ours}.attn.in_proj_bias"] = np.concatenate([arrays[f"{part}/bias"] for part in parts])
        mlp = f"{block}/MlpBlock_0/Dense"
        for theirs, layer in (
            (f"{attention}/out", "attn.out_proj"),
            (f"{mlp}_0", "mlp.c_fc"),
            (f"{mlp}_1", "mlp.c_proj"),
        ):
            weights[f"{ours}.{layer}.weight"] = arrays[f"{theirs}/kernel"].T
            weights[f"{ours}.{layer}.bias"] = arrays[f"{theirs}/bias"]
    weights["norm.weight"] = arrays[f"{name}/Transformer/encoder_norm/scale"]
    weights["norm.bias"] = arrays[f"{name}/Transformer/encoder_norm/bias"]
    return weights


def encode(x, arrays, name, depth):
    weights = tower(arrays, name, depth)
    act = numpy_towers.gelu({"cfg": {"act_kwargs": {"approximate": "tanh"}}}, "cfg")
    x = numpy_towers.blocks(x, weights, "x", depth, 4, act, 1e-6, False)
    return numpy_towers.layer_norm(x, weights, "norm", 1e-6)


def test_a_converted_checkpoint_encodes_as_its_weights_say(recorded, checkpoint, tmp_path, capsys):
    vocab = tmp_path / "vocab.txt"
    pieces = (recorded / "vocab_bert_base.txt").read_text(encoding="utf-8").split("\n")[:1000]
    vocab.write_text("\n".join([*pieces[:990], *"abcdefghij"]) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)

    def convert(out, vocab):
        options = [f"--config={recipe}", f"--config.data.vocab={vocab}"]
        return flip.main(["convert", "official", str(checkpoint), str(tmp_path / out), *options])

    assert convert("out", vocab) == 0
    encoder = flip_jax.load(tmp_path / "out")

    arrays = {name: array.astype(np.float64) for name, array in recorded_parameters("params_after_step2").items()}
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    patches = ((image / 255 - STATS[0]) / STATS[1]).reshape(3, 4, 16, 4, 16, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(3, 16, 768) @ arrays["img_encoder/embedding/kernel"].reshape(768, 64)
    x += arrays["img_encoder/embedding/bias"] + arrays["img_encoder/posembed_encoder/pos_embedding"][:, 1:]
    x = np.concatenate([np.broadcast_to(arrays["img_encoder/cls"], (3, 1, 64)), x], axis=1)
    z_image = numpy_towers.unit(encode(x, arrays, "img_encoder", 3).mean(1) @ arrays["img_mlp1/kernel"])
    np.testing.assert_allclose(encoder.encode_image(image), z_image, atol=1e-5)

    texts = ["a b, c", "", "[CLS] é"]
    tokens = encoder.tokenizer(texts, 32)
    x = arrays["txt_encoder/token_embedding/embedding"][tokens] + arrays["txt_encoder/posembed_encoder/pos_embedding"]
    z_text = numpy_towers.unit(encode(x, arrays, "txt_encoder", 2)[:, 0] @ arrays["txt_mlp1/kernel"])
    np.testing.assert_allclose(encoder.encode_text(texts), z_text, atol=1e-5)

    capsys.readouterr()
    assert convert("other", "") == 1
    assert "needs --config.data.vocab" in capsys.readouterr().err
    assert convert("other", recorded / "vocab_bert_base.txt") == 1
    assert "30522 entries, but the model's text.vocab_size is only 1001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "arrays"),
    [("gcs", "one_chunk"), ("filedriver", "one_chunk"), ("flatten_params", "one_chunk"), ("multichunk", "multichunk")],
)
def test_every_way_of_writing_gives_the_same_weights(recorded, tmp_path, index, arrays):
    folder = unpack(recorded, tmp_path / "checkpoint_3", index, arrays)
    ours = flatten_dict(official.load(folder, SETTINGS), sep="/")
    theirs = official.to_ours(recorded_parameters("params_after_step2"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_differences_are_listed_with_both_sides(checkpoint):
    image = dataclasses.replace(SETTINGS.image, depth=2)
    with pytest.raises(UserError, match=r"encoderblock_02/LayerNorm_0/bias: checkpoint \(64,\), config\.model None"):
        official.load(checkpoint, dataclasses.replace(SETTINGS, image=image))
    image = dataclasses.replace(SETTINGS.image, depth=4)
    with pytest.raises(UserError, match=r"encoderblock_03/LayerNorm_0/bias: checkpoint None, config\.model \(64,\)"):
        official.load(checkpoint, dataclasses.replace(SETTINGS, image=image))
    with pytest.raises(UserError, match=r"img_mlp1/kernel: checkpoint \(64, 32\), config\.model \(64, 16\)"):
        official.load(checkpoint, dataclasses.replace(SETTINGS, embed_dim=16))
    with pytest.raises(UserError, match=r"logit_bias: checkpoint None, config\.model \(1,\)"):
        official.load(checkpoint, dataclasses.replace(SETTINGS, loss="sigmoid"))
    with pytest.raises(UserError, match="unknown parameters, not FLIP's: img_encoder/more"):
        official.to_ours({"img_encoder/more": 0})


def test_positions_of_another_size_are_recomputed(checkpoint):
    image = dataclasses.replace(SETTINGS.image, image_size=96)
    params = official.load(checkpoint, dataclasses.replace(SETTINGS, image=image))
    np.testing.assert_array_equal(params["image"]["pos_embed"], sincos_2d(6, 64))


def first_chunk(checkpoint, name="target.img_encoder.cls"):
    return next(path for path in (checkpoint / name).iterdir() if path.name != ".zarray")


def edit_index(checkpoint, change):
    path = checkpoint / "checkpoint"
    content = serialization.msgpack_restore(path.read_bytes())
    change(content["optimizer"]["target"]["img_encoder"])
    path.write_bytes(serialization.msgpack_serialize(content))


def away(checkpoint):
    shutil.move(checkpoint / "target.img_encoder.cls", checkpoint.parent / "elsewhere")
    (checkpoint / "target.img_encoder.cls").symlink_to(checkpoint.parent / "elsewhere")


DAMAGE = {
    "no index": (lambda c: (c / "checkpoint").unlink(), "has no file 'checkpoint'"),
    "index cut": (lambda c: (c / "checkpoint").write_bytes((c / "checkpoint").read_bytes()[:-9]), "damaged or no t5x"),
    "index empty": (lambda c: (c / "checkpoint").write_bytes(b""), "damaged or no t5x"),
    "index other": (lambda c: (c / "checkpoint").write_bytes(b"\x93\x01\x02\x03"), "damaged or no t5x"),
    "no chunk": (lambda c: first_chunk(c).unlink(), "img_encoder/cls has missing or damaged chunks"),
    "chunk cut": (lambda c: first_chunk(c).write_bytes(first_chunk(c).read_bytes()[:20]), "missing or damaged chunks"),
    "no zarray": (lambda c: (c / "target.img_encoder.cls" / ".zarray").unlink(), "must be in the folder"),
    "no array": (lambda c: shutil.rmtree(c / "target.img_encoder.cls"), "must be in the folder"),
    "bad zarray": (lambda c: (c / "target.img_encoder.cls" / ".zarray").write_text("{"), r"\.zarray is damaged"),
    "symlink out": (away, "must be in the folder"),
    "path out": (
        lambda c: edit_index(c, lambda tree: tree["cls"]["kvstore"].update(path="../../elsewhere/")),
        r"img_encoder/cls must be a float32 zarr in target\.img_encoder\.cls",
    ),
    "another driver": (lambda c: edit_index(c, lambda tree: tree["cls"].update(driver="n5")), "must be a float32 zarr"),
    "another shape": (
        lambda c: edit_index(c, lambda tree: tree["cls"]["metadata"].update(shape=[1, 1, 32])),
        r"\.zarray says float32 \(1, 1, 64\), 'checkpoint' float32 \(1, 1, 32\)",
    ),
    "no shape": (lambda c: edit_index(c, lambda tree: tree["cls"].pop("metadata")), "specification of .* is damaged"),
    "not a number": (
        lambda c: edit_index(c, lambda tree: tree.update(cls=np.full((1, 1, 64), np.nan, np.float32))),
        "img_encoder/cls holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(checkpoint, name):
    damage, message = DAMAGE[name]
    damage(checkpoint)
    with pytest.raises(UserError, match=message):
        official.load(checkpoint, SETTINGS)
