"""Zero-shot classification: an image gets the class whose prompts are nearest to it."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.evaluators import datasets, needs
from flip_jax.evaluators.datasets import Dataset
from flip_jax.inference import Encoder
from flip_jax.runtime import UserError, say

NEEDS = (needs.text_tower, needs.labels, needs.class_names, needs.prompts)


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str], batch_size: int) -> np.ndarray:
    """Returns each class's normalised mean of normalised prompt embeddings, f32 [classes, embed_dim]. Paper, section 4.

    `templates` are prompts with {} for the class name.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    # Full batches only, so that one shape is compiled.
    padded = prompts + [""] * (-len(prompts) % batch_size)
    embedded = []
    with datasets.Progress("class embeddings", len(prompts), " prompts") as bar:
        for i in range(0, len(padded), batch_size):
            embedded.append(encoder.encode_text(padded[i : i + batch_size]))
            bar.update(batch_size)
    means = np.concatenate(embedded)[: len(prompts)].reshape(len(names), len(templates), -1).mean(axis=1)
    return means / (np.linalg.norm(means, axis=1, keepdims=True) + 1e-8)


def summary(top1: float, top5: float, classes: int) -> str:
    """Formats a result as one line for people and scripts."""
    return f"zero-shot top-1 {top1:.2f} % top-5 {top5:.2f} % over {classes} classes"


def count_hits(image_BxE: jax.Array, label_B: jax.Array, real_B: jax.Array, class_CxE: jax.Array) -> jax.Array:
    """Applies `count_scores` to the cosines of images and classes."""
    return count_scores(jnp.einsum("be,ce->bc", image_BxE, class_CxE, precision="highest"), label_B, real_B)


def count_scores(score_BxC: jax.Array, label_B: jax.Array, real_B: jax.Array) -> jax.Array:
    """Counts for each class its top-1 hits, its top-5 hits and its rows, int32 [3, classes].

    Only rows where `real_B` is True count. Of equal scores the first class wins, as with argmax.
    """
    own_Bx1 = jnp.take_along_axis(score_BxC, label_B[:, None], axis=1)
    later_BxC = jnp.arange(score_BxC.shape[1])[None] >= label_B[:, None]
    # Negated comparisons are True for NaN, so that a model that returns NaN has no hits.
    rank_B = jnp.sum(~((score_BxC < own_Bx1) | ((score_BxC == own_Bx1) & later_BxC)), axis=1)
    counted_3xB = jnp.stack([rank_B < 1, rank_B < 5, real_B]) & real_B[None]
    return jnp.zeros((3, score_BxC.shape[1]), jnp.int32).at[:, label_B].add(counted_3xB.astype(jnp.int32))


def accuracies(hits_3xC: np.ndarray, headline: str = "top1") -> dict[str, float]:
    """Turns the counts of `count_scores` into top-1, top-5 and mean per-class top-1 in percent, the headline first.

    Classes without images do not count in the mean.
    """
    top1_C, top5_C, all_C = hits_3xC
    present = all_C > 0
    values = {
        "top1": float(100 * top1_C.sum() / all_C.sum()),
        "top5": float(100 * top5_C.sum() / all_C.sum()),
        "mean_per_class": float(100 * np.mean(top1_C[present] / all_C[present])),
    }
    return {headline: values[headline]} | values


def run(encoder: Encoder, dataset: Dataset, config: Config) -> Iterator[tuple[str, float]]:
    """Yields the accuracies over the whole test split, the data set's own metric first."""
    classes = class_embeddings(encoder, dataset.classes, dataset.templates, config.eval.batch_size)
    count = jax.jit(count_hits, out_shardings=NamedSharding(encoder.mesh, PartitionSpec()))
    hits = np.zeros((3, len(classes)), np.int64)
    for batch in datasets.labelled(dataset, config):
        label, real = sharding.to_devices(encoder.mesh, batch["label"], batch["mask"])
        hits += jax.device_get(count(encoder.encode_image(batch["image"], config.eval.mask), label, real, classes))
    if not hits[2].sum():
        raise UserError(f"none of the images of {dataset.test!r} can be used: {dataset.seen.skipped_text()}")
    dataset.note_classes(hits[2])
    values = accuracies(hits, dataset.metric)
    say(f"{datasets.shortened(dataset.name)}: {summary(values['top1'], values['top5'], len(classes))}")
    yield from values.items()
