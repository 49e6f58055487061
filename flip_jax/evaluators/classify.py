"""Accuracy of a fine-tuned classifier. Labels are matched by name with the classes that were trained."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import sharding
from flip_jax.config import Config
from flip_jax.evaluators import datasets, needs, zeroshot
from flip_jax.evaluators.datasets import Dataset
from flip_jax.inference import Encoder
from flip_jax.runtime import UserError, say

NEEDS = (needs.classifier, needs.labels)


def run(encoder: Encoder, dataset: Dataset, config: Config) -> Iterator[tuple[str, float]]:
    """Yields the accuracies over the whole test split, the data set's own metric first."""
    dataset = datasets.with_classifier_names(dataset, encoder.class_names, config)
    classes = config.finetune.classes
    hits = np.zeros((3, classes), np.int64)
    count = jax.jit(zeroshot.count_scores, out_shardings=NamedSharding(encoder.mesh, PartitionSpec()))
    for batch in datasets.labelled(dataset, config):
        label, real = sharding.to_devices(encoder.mesh, batch["label"], batch["mask"])
        hits += jax.device_get(count(encoder.encode_image(batch["image"]), label, real))
    if not hits[2].sum():
        raise UserError(f"none of the images of {dataset.test!r} can be used: {dataset.seen.skipped_text()}")
    dataset.note_classes(hits[2])
    values = zeroshot.accuracies(hits, dataset.metric)
    say(f"{datasets.shortened(dataset.name)}: top-1 {values['top1']:.2f} % top-5 {values['top5']:.2f} %")
    yield from values.items()
