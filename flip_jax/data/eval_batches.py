"""The batches of an evaluation: a source once, in order, each process its rows."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from flip_jax.config import Config
from flip_jax.data import pipeline, sources, transforms


def eval_dataset(source: str, config: Config, *, with_text: bool = False) -> Iterator[dict[str, Any]]:
    """Reads a source once, in order: this process's rows of batches of config.eval.batch_size.

    Each is {"image": uint8 [b, S, S, 3], "label": int32 [b], -1 for none, "keys": list[str], "mask": bool [b], "bad":
    list[str]} and, with text, "texts": the captions of each row. `mask` is False for an image that cannot be used, of
    which "bad" has the kind, and for the rows that pad the last batch (key ""). All processes get the same number of
    batches.

    Raises:
      UserError: the source cannot be read, or the batch does not divide by the number of processes.
    """
    rows = pipeline.share("config.eval.batch_size", config.eval.batch_size, jax.process_count())
    return _eval_batches(sources.open_source(source, config.data), rows, config, with_text)


def _eval_batches(source, rows, config, with_text):
    size, padding = config.model.image.image_size, {"key": ""}
    black = np.zeros((size, size, 3), np.uint8)

    def decode(record):
        try:
            return transforms.decode(record["image"], size, config.data) if "image" in record else record.get("bad", "")
        except transforms.BadImage as error:
            return str(error)

    records = sources.in_order(source, iter(range(len(source))))
    with ThreadPoolExecutor(pipeline.threads(config), "flip_jax-eval") as pool:
        # Every process reads all records and takes its share by position, so that all see the same number of batches.
        while chunk := list(itertools.islice(records, rows * jax.process_count())):
            chunk = chunk[jax.process_index() :: jax.process_count()]
            chunk += [padding] * (rows - len(chunk))
            images = list(pool.map(decode, chunk))
            labels = [record.get("label") for record in chunk]
            batch = {
                "image": np.stack([black if isinstance(image, str) else image for image in images]),
                "label": np.array([-1 if label is None else label for label in labels], np.int32),
                "keys": [record["key"] for record in chunk],
                "mask": np.array([not isinstance(image, str) for image in images]),
                "bad": [image if isinstance(image, str) else "" for image in images],
            }
            yield batch | ({"texts": [_captions(source, record) for record in chunk]} if with_text else {})


def _captions(source, record):
    """Lists the captions of a record that is evaluated; CLIP_benchmark writes one on each line of a tar's text file."""
    texts = record.get("texts", [])
    if sources.caption_name(source, record) != sources.TEXT_FILE:
        return texts
    return [line for text in texts for line in text.splitlines() if line.strip()]
