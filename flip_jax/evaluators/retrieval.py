"""Retrieval between images and their captions, in both directions, as on COCO and Flickr30k: recall at 1, 5 and 10.

Text recall: is any of an image's captions among the K texts nearest to it? Image recall: is a caption's image among the
K images nearest to it? An image may have any number of captions. Ties count against the model: whatever scores within
`TIE` of the right answer ranks before it, so that a model with constant output scores 0.
"""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.evaluators import datasets, needs
from flip_jax.evaluators.datasets import Dataset
from flip_jax.inference import Encoder
from flip_jax.runtime import UserError, say

NEEDS = (needs.text_tower, needs.captions)

AT = (1, 5, 10)
TIE = 1e-6  # cosines that differ by less count as equal, because rounding depends on the device layout
IMAGES, TEXTS = 2048, 8192  # size of a block of scores; the whole images x captions matrix is never held


def count_before(
    image_IxE: jax.Array,
    owner_I: jax.Array,
    best_I: jax.Array,
    text_TxE: jax.Array,
    owner_T: jax.Array,
    own_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Counts wrong captions that rank before an image's best caption, and wrong images before a caption's own image.

    `owner` is the index of the image, -1 for padding; `best` and `own` are the cosines of the right answers. Returns
    int32 [I] and [T].
    """
    cosine_IxT = jnp.einsum("ie,te->it", image_IxE, text_TxE, precision="highest")
    other_IxT = (owner_I[:, None] != owner_T[None]) & (owner_I >= 0)[:, None] & (owner_T >= 0)[None]
    # "Not less" is also True for NaN, so that a model that returns NaN finds nothing.
    before_I = jnp.sum(other_IxT & ~(cosine_IxT < best_I[:, None] - TIE), axis=1)
    before_T = jnp.sum(other_IxT & ~(cosine_IxT < own_T[None] - TIE), axis=0)
    return before_I, before_T


def ranks(
    image_NxE: np.ndarray, text_MxE: np.ndarray, owner_M: np.ndarray, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rank, from 0, of each image's best caption and of each caption's image, int64 [N] and [M].

    `owner_M` is the index of each caption's image. An image without captions gets rank -1 and only serves as a wrong
    answer for captions. All processes pass the same arrays and get the same result.
    """
    own_M = np.concatenate(
        [
            np.einsum("me,me->m", text_MxE[i : i + TEXTS], image_NxE[owner_M[i : i + TEXTS]])
            for i in range(0, len(text_MxE), TEXTS)
        ]
    )
    best_N = np.full(len(image_NxE), -np.inf, np.float32)
    with np.errstate(invalid="ignore"):  # NaN is handled in count_before
        np.maximum.at(best_N, owner_M, own_M)
    rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    count = jax.jit(count_before, out_shardings=whole)
    images = -(-min(IMAGES, len(image_NxE)) // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    texts = min(TEXTS, len(text_MxE))

    def block(array, start, size, fill, layout):
        part = array[start : start + size]
        padded = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (array.ndim - 1), constant_values=fill)
        return jax.make_array_from_callback(padded.shape, layout, lambda index: padded[index])

    before_N, before_M = np.zeros(len(image_NxE), np.int64), np.zeros(len(text_MxE), np.int64)
    index_N = np.arange(len(image_NxE), dtype=np.int32)
    with datasets.Progress("ranks", len(text_MxE), " captions") as bar:
        for t in range(0, len(text_MxE), texts):
            text_block = [
                block(array, t, texts, fill, whole) for array, fill in ((text_MxE, 0), (owner_M, -1), (own_M, 0))
            ]
            for i in range(0, len(image_NxE), images):
                image_block = [
                    block(array, i, images, fill, rows) for array, fill in ((image_NxE, 0), (index_N, -1), (best_N, 0))
                ]
                of_images, of_texts = jax.device_get(count(*image_block, *text_block))
                before_N[i : i + images] += of_images[: len(before_N) - i]
                before_M[t : t + texts] += of_texts[: len(before_M) - t]
            bar.update(texts)
    return np.where(np.bincount(owner_M, minlength=len(image_NxE)) > 0, before_N, -1), before_M


def recalls(rank_N: np.ndarray, rank_M: np.ndarray) -> dict[str, float]:
    """Turns ranks from 0 into recalls in percent, their mean first; images of rank -1 are not queries."""
    queries = {"text": rank_N[rank_N >= 0], "image": rank_M}
    found = {f"{name}_recall@{k}": float(100 * np.mean(rank < k)) for name, rank in queries.items() for k in AT}
    return {"mean_recall": float(np.mean(list(found.values())))} | found


def embed(encoder: Encoder, dataset: Dataset, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeds images f32 [N, E] and captions f32 [M, E]; returns both and the index of each caption's image, int32 [M].

    The result is the same in every process.

    Raises:
      UserError: no usable image has a caption.
    """
    images, captions = [], []
    for batch in datasets.batches(dataset.test, config, with_text=True, seen=dataset.seen):
        embedded = multihost_utils.process_allgather(encoder.encode_image(batch["image"], config.eval.mask), tiled=True)
        own = [texts if real else None for texts, real in zip(batch["texts"], batch["mask"], strict=True)]
        rows = [texts for process in _from_all(own) for texts in process]
        images.append(embedded[[texts is not None for texts in rows]])
        captions += [texts for texts in rows if texts is not None]
    texts = [text for texts in captions for text in texts]
    if not texts:
        raise UserError(f"{dataset.test!r}: none of its {len(captions)} usable images has a caption")
    owner_M = np.repeat(np.arange(len(captions), dtype=np.int32), [len(texts) for texts in captions])
    size = config.eval.batch_size
    padded = texts + [""] * (-len(texts) % size)  # full batches only, so that one shape is compiled
    embedded = []
    with datasets.Progress("captions", len(texts), " texts") as bar:
        for i in range(0, len(padded), size):
            embedded.append(encoder.encode_text(padded[i : i + size]))
            bar.update(size)
    return np.concatenate(images), np.concatenate(embedded)[: len(texts)], owner_M


def _from_all(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def run(encoder: Encoder, dataset: Dataset, config: Config) -> Iterator[tuple[str, float]]:
    """Yields the recalls in percent over the whole test split, their mean first."""
    image_NxE, text_MxE, owner_M = embed(encoder, dataset, config)
    values = recalls(*ranks(image_NxE, text_MxE, owner_M, encoder.mesh))
    r1, r2 = values["text_recall@1"], values["image_recall@1"]
    counts = f"over {len(image_NxE)} images and {len(text_MxE)} captions"
    say(f"{datasets.shortened(dataset.name)}: text recall@1 {r1:.2f} % image recall@1 {r2:.2f} % {counts}")
    yield from values.items()
