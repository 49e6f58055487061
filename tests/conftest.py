"""Eight CPU devices for every test, implicit rank promotion an error, and the fixtures that several files share."""

import importlib
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

from flip_jax import config as config_lib

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = pathlib.Path(__file__).parent.parent
SHARED = REPO.parent / "shared"


@pytest.fixture
def recorded():
    """Folder of inputs, weights and outputs recorded from the official code; the test is skipped where it is absent."""
    folder = SHARED / "reference" / "fixtures"
    if not folder.is_dir():
        pytest.skip("the recordings of the official code are not here")
    return folder


@pytest.fixture
def load_recipe():
    """A function: a recipe's name, and an argument string as on the command line, to its checked `Config`."""

    def load(name, arg=""):
        return config_lib.from_config_dict(importlib.import_module(f"configs.{name}").get_config(arg))

    return load
