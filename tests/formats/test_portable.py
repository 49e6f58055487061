"""The portable folder: written by `flip convert`, read by `flip_jax.load`, refused where it is damaged."""

import json
import shutil
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
import yaml
from etils import epath
from helpers import MODEL, make_encoder, save
from safetensors.numpy import load_file, save_file

import flip_jax
from flip_jax import manifest, runtime, saved_step, weights
from flip_jax.formats import portable, tensors, tokenizer_files
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip
from flip_jax.tools import card, convert


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and its model."""
    encoder, folder = make_encoder(), tmp_path_factory.mktemp("runs") / "fox"
    save(encoder, folder / "checkpoints" / "3")
    return folder, encoder


@pytest.fixture
def out(run, tmp_path):
    """A portable folder, for the test to damage."""
    assert flip.main(["convert", "export", str(run[0]), str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def same(left, right):
    left, right = (portable.flat(jax.tree.map(np.asarray, tree)) for tree in (left, right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def test_a_run_is_exported_loaded_and_exported_again_bit_by_bit(run, out, tmp_path):
    folder, encoder = run
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "card.json",
    }
    loaded = flip_jax.load(out)
    same(loaded.params, encoder.params)
    assert loaded.config == encoder.config and loaded.class_names is None
    assert loaded.tokenizer.to_json() == encoder.tokenizer.to_json()
    head, _, body = (out / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["library_name"] == "flip_jax" and "# out" in body and "160" not in head
    assert json.loads((out / "card.json").read_text())["step"] == 3
    # Other libraries read the same ids, which need no Python of ours.
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = theirs.encode("A Red picture 12").ids
    assert ids == encoder.tokenizer(["A Red picture 12"], 8)[0][: len(ids)].tolist()

    assert flip.main(["convert", "import", str(out), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    again, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", out))
    assert again == first


def test_weights_may_be_bf16_and_in_several_files(run, tmp_path):
    _, encoder = run
    assert flip.main(["convert", "export", str(run[0]), str(tmp_path / "half"), "--dtype=bfloat16"]) == 0
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), encoder.params)
    same(flip_jax.load(tmp_path / "half").params, rounded)

    (tmp_path / "parts").mkdir()
    portable.write(tmp_path / "parts", encoder.params, encoder.config, encoder.tokenizer, shard=50_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(encoder.params))
    for name in files:
        arrays = load_file(tmp_path / "parts" / name)
        assert sum(x.nbytes for x in arrays.values()) <= 50_000 or len(arrays) == 1
        assert all(index["weight_map"][array] == name for array in arrays)
    same(flip_jax.load(tmp_path / "parts").params, encoder.params)
    (tmp_path / "parts" / files[1]).unlink()
    with pytest.raises(UserError, match=f"has no {files[1]}, which its model.safetensors.index.json names"):
        flip_jax.load(tmp_path / "parts")


def test_a_run_starts_from_a_portable_folder(run, out):
    _, encoder = run
    step = saved_step.newest(str(out))
    weights.check_start(encoder.config, step)
    assert weights.with_model_of(encoder.config, step).model.image == MODEL.image
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), encoder.params)
    same(weights.read_params(step, abstract, MODEL), encoder.params)


def test_nothing_is_left_of_a_conversion_that_fails(run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("no card today")

    monkeypatch.setattr(card, "write", refuse)
    assert flip.main(["convert", "export", str(run[0]), str(tmp_path / "out")]) == 1
    assert "no card today" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert flip.main(["convert", "export", str(run[0]), str(tmp_path / "out")]) == 1
    assert "already exists; use another folder" in capsys.readouterr().err
    assert (
        flip.main(["convert", "export", str(run[0]), str(tmp_path / "x"), "--format=open_clip", "--dtype=bfloat16"])
        == 1
    )
    assert "--format=open_clip writes float32" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_nothing_either(tmp_path):
    with convert.new_folder(str(tmp_path / "out")) as folder:
        (folder / "model.safetensors").touch()
        for function in runtime.at_end:  # all that is called before the program ends there
            function()
        assert not list(tmp_path.iterdir())
        folder.mkdir()


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_weight(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["image.cls"] = arrays["image.cls"][..., :3]
    arrays["image.more"] = arrays.pop("logit_scale")
    save_file(arrays, folder / "model.safetensors")


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def point_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    places = {"weight_map": {"logit_scale": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def make_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE = {
    "other weights": (
        rename_weight,
        r"(?s)image.cls: checkpoint \(1, 1, 3\), model \(1, 1, 32\).*logit_scale: checkpoint None",
    ),
    "cut short": (cut, "model.safetensors: .*download it again"),
    "elsewhere": (point_elsewhere, r"names '\.\./secret.safetensors'; only safetensors files of its own folder"),
    "pickle": (make_pickle, "has no model.safetensors, only pytorch_model.bin: files of PyTorch can run code"),
    "no settings": (lambda f: edit(f / "config.json", lambda c: c.pop("config")), 'no settings under "config"'),
    "setting": (
        lambda f: edit(f / "config.json", lambda c: c["config"].update({"model.embed_dim": "x"})),
        "config.model.embed_dim must be int",
    ),
    "architecture": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="siglip2")),
        "nearest that is read",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "must be a model's settings, JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "of timm": (
        lambda f: (f / "config.json").write_text('{"architecture": "vit_base_patch16_224"}'),
        "the nearest that is read is timm's ViT, as config.init_from=FILE.safetensors",
    ),
    "open_clip's without weights": (
        lambda f: (f / "config.json").rename(f / "open_clip_config.json"),
        "has no open_clip_model.safetensors. Save the model with open_clip",
    ),
    "nothing": (lambda f: (f / "config.json").unlink(), "holds no checkpoint: expected a workdir"),
    "nowhere": (shutil.rmtree, r"holds no checkpoint \(there is no such file or folder\): expected a workdir"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_the_reason(out, name):
    damage, message = DAMAGE[name]
    damage(out)
    with pytest.raises(UserError, match=message) as refused:
        flip_jax.load(out)
    assert "above exception" not in "".join(traceback.format_exception(refused.value))  # one message


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="not finite: image.x"):
        portable.write(tmp_path, {"image": {"x": np.array([np.nan])}}, None, None)
    assert not list(tmp_path.iterdir())
    tensors.save(tmp_path / "a.safetensors", {"x": np.array(1), "y": np.array(np.inf, np.float32)})
    file = tensors.Tensors([tmp_path / "a.safetensors"])
    assert file.shapes() == {"x": (), "y": ()}
    with pytest.raises(UserError, match="x is of type I64; only F64"):
        file.read("x")
    with pytest.raises(UserError, match="not finite: y"):
        file.read("y")
    with pytest.raises(UserError, match="both hold x"):
        tensors.Tensors([tmp_path / "a.safetensors"] * 2)


def test_a_folder_without_a_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json: write one.*--vocab"):
        tokenizer_files.read(tmp_path, MODEL.text)


def test_the_average_of_the_weights_is_exported_where_there_is_one(run, tmp_path):
    _, encoder = run
    step = tmp_path / "run" / "checkpoints" / "1"
    save(encoder, step)
    average = jax.tree.map(lambda x: 2 * x, encoder.params)
    shutil.rmtree(step / "state")
    (step / "manifest.json").unlink()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(step / "state", {"params": encoder.params, "ema": average})
    manifest.write(epath.Path(step))
    assert flip.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    same(flip_jax.load(tmp_path / "out").params, average)
