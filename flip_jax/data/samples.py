"""A record becomes a sample: an image of the model's size, and the text or the label that it is paired with."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from flip_jax.config import Config
from flip_jax.data import transforms
from flip_jax.data.records import BadRecord, Record
from flip_jax.data.tokenizer import Tokenizer


class Target(NamedTuple):
    """The part of a record that an image is paired with in training."""

    name: str  # its key in a batch
    choices: Callable[[Record], list]  # what may be drawn as the target of a record; BadRecord if there is nothing
    encode: Callable[[list], np.ndarray]  # the targets that were drawn, as an array with one row each


def make_target(config: Config, tokenizer: Tokenizer | None) -> Target:
    """Decides what an image is paired with; nothing else asks whether a classifier is trained."""
    classes = config.finetune.classes

    def captions(record):
        if not record["texts"]:
            raise BadRecord("no text")
        return record["texts"]

    def labels(record):
        if record["label"] is None:
            raise BadRecord("no label")
        if not 0 <= record["label"] < classes:
            raise BadRecord("label below 0" if record["label"] < 0 else f"label above {classes - 1}")
        return [record["label"]]

    if classes:
        return Target("label", labels, functools.partial(np.array, dtype=np.int32))
    assert tokenizer
    return Target("text", captions, functools.partial(tokenizer, length=config.model.text.context_length))


def prepare(records: Iterable[Record], config: Config, target: Target) -> list[Any]:
    """Returns (image, target) of each record, or the kind of a bad one."""
    samples, drawn = [], []
    for record in records:
        try:
            if "bad" in record:
                raise BadRecord(record["bad"])
            choices = target.choices(record)
            rng = transforms.generator(config.seed, record["epoch"], record["key"])
            chances = record.get("chances") if target.name == "text" else None
            choice = rng.choices(choices, chances)[0] if chances else rng.choice(choices)
            samples.append(transforms.decode(record["image"], config.model.image.image_size, config.data, rng))
            drawn.append(choice)
        except BadRecord as error:
            samples.append(str(error))
    encoded = iter(target.encode(drawn))  # all at once; bad records have no row
    return [sample if isinstance(sample, str) else (sample, next(encoded)) for sample in samples]
