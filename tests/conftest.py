"""Eight CPU devices for every test, implicit rank promotion an error, and the fixtures that several files share."""

# ruff: noqa: E402

import importlib
import io
import logging
import os
import tarfile
import tempfile

from xla_options import COMPILE_FAST, DEVICES

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST} {DEVICES}8"
# And the same programs again and again: what one test or process compiles, the others load.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that starts them
    COMPILED = tempfile.TemporaryDirectory(prefix="flip_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import numpy as np
import pytest
from helpers import FIXTURES, run_steps
from PIL import Image

from flip_jax import config_check
from flip_jax.config import MeshConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (245, 245, 245)}
SHAPES = ("square", "frame")


@pytest.fixture(autouse=True)
def log_level():
    """Sets the root logger's level back, which commands that a test or fixture calls set for their whole process."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture
def recorded():
    """Folder of inputs, weights and outputs recorded from the official code."""
    return FIXTURES / "official"


@pytest.fixture
def load_recipe():
    """A function: a recipe's name, and an argument string as on the command line, to its checked `Config`."""

    def load(name, arg=""):
        return config_check.from_config_dict(importlib.import_module(f"configs.{name}").get_config(arg))

    return load


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two tars of 64 pictures each: coloured squares and frames with captions that name both, and class numbers."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(64):
                label = (shard * 64 + i) % len(classes)
                colour, shape = classes[label]
                pixels = rng.integers(0, 60, (40, 40, 3)).astype(np.uint8)
                pixels[8:32, 8:32] = COLOURS[colour]
                if shape == "frame":
                    pixels[14:26, 14:26] = 0
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                for ext, data in (
                    ("png", png.getvalue()),
                    ("txt", f"a {colour} {shape}".encode()),
                    ("cls", str(label).encode()),
                ):
                    info = tarfile.TarInfo(f"{shard}{i:03}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "classes.txt").write_text("".join(f"{colour} {shape}\n" for colour, shape in classes))
    return folder


@pytest.fixture(scope="session")
def alone():
    """Losses and final state of three steps on one device, which every other layout must give, too."""
    return run_steps(1, MeshConfig())
