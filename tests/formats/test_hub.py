"""hf://ORG/NAME: models of a stand-in for the hub, in every format, and what the hub refuses."""

import json
import shutil
import subprocess
import sys
import traceback

import jax
import numpy as np
import pytest
from helpers import FIXTURES, REPO, environment, make_encoder
from hub_stand_in import Hub
from huggingface_hub import constants

import flip_jax
from flip_jax import saved_step, weights
from flip_jax.formats import portable, tokenizer_files
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each format."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("flip", "flip_other", "open_clip"):
        (root / name).mkdir()
    for seed, name in enumerate(("flip", "flip_other")):
        encoder = make_encoder(seed=seed)
        portable.write(root / name, encoder.params, encoder.config, encoder.tokenizer, shard=100_000)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / f"open_clip_{name}", root / "open_clip" / f"open_clip_{name}")
    shutil.copy(FIXTURES / "open_clip_config.json", root / "open_clip" / "open_clip_config.json")
    clip = FIXTURES / "transformers" / "clip_largest"
    shutil.copy(clip / "tokenizer.json", root / "open_clip" / "tokenizer.json")
    return root


@pytest.fixture
def hub(folders, monkeypatch, tmp_path):
    """The stand-in, with an empty cache."""
    hub = Hub()
    hub.add_folder("org/flip", folders / "flip_other")
    hub.add_folder("org/flip", folders / "flip", "v1")
    hub.add_folder("org/clip", folders / "open_clip")
    hub.add_folder("org/siglip", FIXTURES / "transformers" / "siglip")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield hub
    hub.close()


def weights_of(encoder):
    return portable.flat(jax.tree.map(np.asarray, encoder.params))


def test_a_model_is_loaded_by_its_name_and_revision_and_kept(hub):
    for path, seed in (("hf://org/flip@v1", 0), ("hf://org/flip", 1)):
        loaded, truth = weights_of(flip_jax.load(path)), weights_of(make_encoder(seed=seed))
        for name, value in truth.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    first = [line for line in hub.requests if line.startswith("GET /org/flip/resolve")]
    flip_jax.load("hf://org/flip")
    assert [line for line in hub.requests if line.startswith("GET /org/flip/resolve")] == first
    # What a run starts from.
    step, encoder = saved_step.newest("hf://org/flip"), make_encoder(seed=1)
    weights.check_start(encoder.config, step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), encoder.params)
    started = weights.read_params(step, abstract, encoder.config.model)
    np.testing.assert_array_equal(started["image"]["cls"], encoder.params["image"]["cls"])


def test_models_of_open_clip_and_transformers_are_loaded(hub):
    clip = flip_jax.load("hf://org/clip")
    assert clip.config.model.activation == "quick_gelu" and clip.tokenizer.vocab_size == 914
    recorded = np.load(FIXTURES / "open_clip_outputs.npz")
    np.testing.assert_allclose(clip.encode_image(recorded["image"]), recorded["z_image"], atol=1e-5)
    siglip = flip_jax.load("hf://org/siglip@main")
    assert (siglip.config.model.image.pool, siglip.config.model.text.pool) == ("map", "final")
    asked = "".join(hub.requests)
    assert "README" not in asked and "outputs.npz" not in asked  # only what is needed


def test_the_command_line_takes_the_same_string(hub, tmp_path):
    """In a process of its own, which finds the stand-in by HF_ENDPOINT, and again without the network."""
    command = [sys.executable, "-m", "flip_jax", "convert", "import", "hf://org/clip"]
    env = environment() | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for out, changes in (("a", {}), ("b", {"HF_HUB_OFFLINE": "1"})):
        done = subprocess.run(
            [*command, str(tmp_path / out)], cwd=REPO, env=env | changes, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert "converted from hf://org/clip" in (tmp_path / "a" / "README.md").read_text().replace("\\", "")


def without(folder, *names, **more):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}
    return files | {name.replace("_bin", ".bin"): data for name, data in more.items()}


def test_what_the_hub_does_not_give_is_refused_with_the_remedy(hub, folders, tmp_path):
    siglip = FIXTURES / "transformers" / "siglip"
    hub.add_folder("org/gated", siglip)
    hub.gated.add("org/gated")
    hub.add_folder("org/private", siglip)
    hub.private.add("org/private")
    hub.add("org/pickles", without(siglip, "model.safetensors", pytorch_model_bin=b"x"))
    hub.add("org/bare", {"pytorch_model.bin": b"x", "README.md": b"x"})
    config = json.loads((siglip / "config.json").read_text()) | {"model_type": "siglip2"}
    hub.add("org/naflex", without(siglip) | {"config.json": json.dumps(config).encode()})
    index = {"weight_map": {"a": "../../../secret.safetensors"}}
    hub.add(
        "org/escape",
        without(siglip, "model.safetensors") | {"model.safetensors.index.json": json.dumps(index).encode()},
    )
    for path, message in {
        "hf://org/none": "there is no such repository, or it is private: check the name.* hf auth login",
        "hf://org/private": "there is no such repository, or it is private",
        "hf://org/gated": f"is gated: accept its conditions at {hub.url}/org/gated",
        "hf://org/flip@v9": "has no revision 'v9'; give a branch, a tag or a commit",
        "hf://org/pickles": "has no model.safetensors, only pytorch_model.bin: files of PyTorch can run code",
        "hf://org/bare": "has neither config.json nor open_clip_config.json.*only pytorch_model.bin",
        "hf://org/naflex": r"model_type 'siglip2' are unknown here; the nearest that is read is siglip \(SigLIP 2",
        "hf://org/escape": "secret.safetensors'; only safetensors files of its own folder are read",
        "hf://org": "does not name a model of the hub; write hf://ORG/NAME or",
        "hf://../x": "does not name a model of the hub",
        "hf://org/x@../../y": "does not name a model of the hub",
        "hf://datasets/org/x": "that is a place for data",
    }.items():
        with pytest.raises(UserError, match=message) as refused:
            flip_jax.load(path)
        assert "above exception" not in "".join(traceback.format_exception(refused.value))  # one message
        assert flip.main(["convert", "import", path, str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_download_that_breaks_is_refused_and_complete_the_next_time(hub, tmp_path):
    hub.short.add("model.safetensors")
    with pytest.raises(UserError, match="hf://org/siglip: the download failed .*run the same command again"):
        flip_jax.load("hf://org/siglip")
    hub.short.clear()
    assert flip_jax.load("hf://org/siglip").config.model.loss == "sigmoid"


def test_without_the_network_the_cache_serves(hub, monkeypatch):
    flip_jax.load("hf://org/flip@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert flip_jax.load("hf://org/flip@v1").config.seed == 3
    with pytest.raises(UserError, match="cannot be reached, and the model is not complete in the cache"):
        flip_jax.load("hf://org/clip")


def test_a_card_is_not_written_to_the_hub(hub, capsys):
    assert flip.main(["card", "--model=hf://org/flip"]) == 1
    assert "is not on this machine: flip convert import hf://org/flip FOLDER" in capsys.readouterr().err
    assert tokenizer_files.TOKENIZER == "tokenizer.json"
