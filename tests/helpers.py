"""What several test files share: a tiny model, images and shards, runs on the command line, known encoders."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import jax
import numpy as np
from etils import epath
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from pyarrow import parquet
from xla_options import DEVICES

import flip_jax
from flip_jax import config_check, manifest, sharding, train_step
from flip_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
)
from flip_jax.data import sources, transforms
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.inference import Encoder
from flip_jax.models.flip import FLIP
from flip_jax.tools import embed

REPO = pathlib.Path(__file__).parent.parent
FIXTURES = REPO / "tests" / "fixtures"

# A model and a batch small enough to compile in seconds, for tests of everything that is not their size.
MODEL = ModelConfig(
    image=ImageConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4, mask_ratio=0.5),
    text=TextConfig(vocab_size=64, context_length=8, width=32, depth=2, heads=4),
    embed_dim=16,
    dtype="float32",
)
CONFIG = Config(
    seed=3,
    global_batch_size=16,
    total_samples=160,
    warmup_samples=32,
    model=MODEL,
    optim=OptimConfig(base_learning_rate=2e-4 * 16),
)


def batch(rows=16, seed=0):
    """Random pictures [rows, 32, 32, 3] uint8 and tokens [rows, 8] int32 with padding."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (rows, 32, 32, 3), np.uint8)
    text = rng.integers(1, 64, (rows, 8)).astype(np.int32)
    text[np.arange(8)[None] >= rng.integers(1, 9, rows)[:, None]] = 0
    return image, text


def model_with(**changes):
    """`MODEL` with changed image ("image_KEY"), text ("text_KEY") or own settings."""
    image = {key.removeprefix("image_"): changes.pop(key) for key in list(changes) if key.startswith("image_")}
    text = {key.removeprefix("text_"): changes.pop(key) for key in list(changes) if key.startswith("text_")}
    return dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, **image),
        text=dataclasses.replace(MODEL.text, **text),
        **changes,
    )


def arguments(shards, workdir, **changes):
    """The command line of a run of 24 steps of 32 samples with a tiny model."""
    settings = {
        "data.train": f"webdataset:{shards}/{{00000..00001}}.tar",
        "data.shuffle_window": 50,
        "data.workers": 0,
        "model.image.image_size": 32,
        "model.image.patch_size": 8,
        "model.image.mask_ratio": 0.5,
        **{
            f"model.{tower}.{key}": v
            for tower in ("image", "text")
            for key, v in (("width", 32), ("depth", 2), ("heads", 4))
        },
        "model.embed_dim": 16,
        "model.text.vocab_size": 100,
        "model.text.context_length": 8,
        "model.dtype": "float32",
        "optim.base_learning_rate": 0.01,
        "global_batch_size": 32,
        "total_samples": 768,
        "warmup_samples": 128,
        "checkpoint.every_steps": 5,
        "log.every_steps": 4,
        **changes,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "main.py", "--config=configs/flip_b16.py", f"--workdir={workdir}", *flags]


def environment(devices=1):
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{DEVICES}{devices}"}


def run_command(command, check=True, **env):
    done = subprocess.run(command, cwd=REPO, env=environment(**env), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def final_params(workdir, step=24):
    return flip_jax.load(workdir / "checkpoints" / str(step)).params


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def leaves(tree):
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [np.asarray(tree)]


def run_steps(devices, mesh_settings, steps=3, config=CONFIG):
    """Losses and the final state of some steps of training."""
    mesh = sharding.make_mesh(mesh_settings, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = train_step.make_program(dataclasses.replace(config, mesh=mesh_settings), mesh)
        state, seen = program.init(), []
        # Noise on every array, so that none is zero and a relative difference means something.
        state = state._replace(params=jax.tree.map(with_noise, state.params, program.state.params))
        for step in range(steps):
            state, report = program.step(state, *sharding.to_devices(mesh, *batch(seed=step)))
            seen.append(float(report["loss"]))
    return seen, state


def with_noise(value, like):
    noise = np.random.default_rng(value.size).normal(scale=0.02, size=value.shape).astype(np.float32)
    return jax.device_put(np.asarray(value) + noise, like.sharding)


def png(seed=0, size=(12, 10)):
    """An encoded picture of random pixels."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or TarInfo without data."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def samples(count, start=0):
    """Members of samples "00000".. with a PNG, a caption and a class."""
    for i in range(start, start + count):
        yield from ((f"{i:05}.png", png(i)), (f"{i:05}.txt", f"picture {i}".encode()), (f"{i:05}.cls", b"%d" % (i % 7)))


def records(kind, path, **data):
    """Read all records of a source in order."""
    source = sources.open_source(f"{kind}:{path}", DataConfig(**data))
    return list(sources.in_order(source, iter(range(len(source)))))


def summary(found):
    """Key, captions and kind of damage of each record."""
    return [(r["key"], r.get("texts"), r.get("bad")) for r in found]


# Tolerances for values that two f32 programs sum in another order. Rounding is 6e-8, and the towers of these tests sum
# at most 192 terms: at worst 192 x 6e-8 = 1e-5 of an embedding, whose entries are below 1, typically sqrt(192) x 6e-8
# = 1e-6. A logit is 1 / 0.07 times a cosine, which makes 2e-5 of losses near 4. Parameters move by less.
EMBEDDING = 1e-5  # absolute
LOSS = 1e-5  # relative, of losses and of parameters after a few steps

BATCH = 8
WORDS = ("[PAD]", "[UNK]", "picture", "a", "red", *"0123456789", *(f"##{i}" for i in range(10)))


def make_encoder(devices=1, seed=0, words=WORDS, factor=1.0):
    """A model with random weights, times a factor; without words it has no tokenizer, like a classifier."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(FLIP(MODEL, nnx.Rngs(seed)))
        params = jax.device_put(
            nnx.to_pure_dict(params), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        )
        params = jax.tree.map(lambda x: x * factor, params)
        tokenizer = Tokenizer({word: i for i, word in enumerate(words)}) if words else None
        return Encoder(graphdef, params, tokenizer, CONFIG)


def write_embeddings(encoder, source, out, texts=False, **changes):
    """Write an index as the command does, in this process; return its index.json."""
    data = encoder.config.data
    settings = {"rows_per_part": 10, "batch_size": BATCH, **changes}
    opened = embed.open_source(source, data, texts)
    return embed.write_index(encoder, "a model", opened, data, out, name=source, texts=texts, **settings)


def embedded_rows(folder):
    """Read all rows of an index, in order, with pyarrow alone."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def save(encoder, step):
    """A step's folder as a run leaves it, as far as it is needed to load the model."""
    import orbax.checkpoint as ocp

    for item, content in (("config", config_check.flatten(encoder.config)), ("tokenizer", encoder.tokenizer.to_json())):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(step / item, content)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(step / "state", {"params": encoder.params})
    manifest.write(epath.Path(step))


def command(tool, **options):
    options = [
        f"--{name}={value}"
        for name, values in options.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    return subprocess.run(
        [sys.executable, "-m", "flip_jax", tool, *options],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
    )


SIZE = 16


def eval_config(*tasks, batch_size=16, tfds_dir="", **settings):
    model = ModelConfig(image=ImageConfig(image_size=SIZE, patch_size=8))
    data = DataConfig(tfds_dir=str(tfds_dir), threads=2)
    return Config(model=model, data=data, eval=EvalConfig(tasks=tasks, batch_size=batch_size, **settings))


def picture(number):
    """A picture that `Known` knows again."""
    out = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number % 256, number // 256, 0)).save(out, "PNG")
    return out.getvalue()


class Known:
    """An encoder that gives picture number i and text number i the embeddings that a test says."""

    def __init__(self, image_NxE, texts, devices=8):
        self.image_NxE, self.texts = image_NxE.astype(np.float32), texts
        self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])

    def encode_image(self, images, mask):
        numbers = images[:, 0, 0, :2] @ np.array([1, 256])
        (array,) = sharding.to_devices(self.mesh, self.image_NxE[numbers])
        return array

    def encode_text(self, texts):
        width = self.image_NxE.shape[1]
        return np.stack([self.texts.get(text, np.zeros(width)) for text in texts]).astype(np.float32)


def recorded_parameters(name):
    """Arrays recorded from the official code under its names: params, grads_step0 or params_after_step2."""
    arrays = {}
    for tower in ("image", "text"):
        with np.load(FIXTURES / "official" / f"{name}_{tower}.npz") as file:
            arrays |= file
    return arrays


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def write_samples(path, samples):
    """Samples {extension: bytes}, named by their place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, parts in enumerate(samples):
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"s{i:05}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def reference_ranks(image_NxE, text_MxE, owner_M):
    """Ranks by the whole matrix of scores, in float64; ties count against the model."""
    scores = image_NxE.astype(np.float64) @ text_MxE.astype(np.float64).T
    own = owner_M[None] == np.arange(len(image_NxE))[:, None]
    best_N = np.where(own, scores, -np.inf).max(axis=1)
    rank_N = np.sum(~own & (scores >= best_N[:, None] - 1e-6), axis=1)
    right_M = scores[owner_M, np.arange(len(owner_M))]
    rank_M = np.sum(~own & (scores >= right_M - 1e-6), axis=0)
    return np.where(own.any(axis=1), rank_N, -1), rank_M


class Features:
    """An encoder that gives picture number i the features that a test says."""

    def __init__(self, feature_NxD, devices=8):
        self.feature_NxD = feature_NxD.astype(np.float32)
        self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])

    def features(self, images):
        return self.feature_NxD[images[:, 0, 0, :2] @ np.array([1, 256])]


def clusters(rows, width=6, classes=3, noise=1.0, seed=0):
    """Labels, and features around a point for each class."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(classes, width))
    label = rng.integers(0, classes, rows)
    label[:classes] = np.arange(classes)
    return centre[label] + noise * rng.normal(size=(rows, width)), label.astype(np.int32)


NAMES, TEMPLATE = ["red 1", "picture 2", "a 3"], "a {} picture"


def cosines(encoder, contents, texts):
    images = np.stack([transforms.decode(content, 32, DataConfig()) for content in contents])
    return np.asarray(encoder.encode_image(images)) @ encoder.encode_text(texts).T


class Bucket(MemoryFileSystem):
    """Takes names that begin with gs://."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://"))


def assert_same_training(ours, reference):
    """Losses and parameters of two results of `run_steps` agree up to rounding."""
    np.testing.assert_allclose(ours[0], reference[0], rtol=LOSS)
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(x[1].params) for x in (ours, reference)), strict=True)
    for (path, value), (_, expected) in pairs:
        # The gradient of a key bias is mathematically zero: Adam turns its rounding noise into full-size updates.
        if jax.tree_util.keystr(path[-2:], simple=True, separator=".") != "key.bias":
            difference = np.linalg.norm(np.asarray(value) - np.asarray(expected))
            assert difference <= LOSS * np.linalg.norm(expected), jax.tree_util.keystr(path)


# Four steps of 16 samples on small images, two of 24 on whole ones, and four of 8 with a fresh optimizer.
STAGES = (
    "64:model.image.image_size=16;"
    "48:global_batch_size=24,model.image.mask_ratio=0,model.text.mask_ratio=0.5,warmup_samples=0,"
    "optim.schedule=constant;"
    "32:global_batch_size=8,optim.base_learning_rate=1e-3,optim.state=fresh,data.crop_area=(0.9,1.0),warmup_samples=8"
)
STEPS, BOUNDARIES = 10, (4, 6)
