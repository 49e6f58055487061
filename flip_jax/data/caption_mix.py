"""Captions drawn from several keys: `config.data.captions` written "WEIGHT*KEY", as in "0.5*caption,0.5*synthetic"."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from flip_jax.config import DataConfig
from flip_jax.runtime import UserError

KINDS = ("webdataset", "tfrecord", "parquet")  # sources that read several keys of a record


@dataclasses.dataclass(frozen=True)
class Mixed(DataConfig):
    """Settings whose `captions` are the keys alone, with the weight of each."""

    weights: tuple[float, ...] = ()


def split(data: DataConfig) -> Mixed:
    """Separates weights and keys; a weight of 0 leaves its key out.

    Raises:
      UserError: not every key has a weight, one is no number of at least 0, or all are 0.
    """
    pairs = []
    for entry in data.captions:
        weight, star, key = (part.strip() for part in entry.partition("*"))
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (star and key and 0 <= value < math.inf):
            raise UserError(
                f"config.data.captions: {entry!r} must be WEIGHT*KEY with a weight of at least 0, as all of them where "
                "one is; write 0.5*caption,0.5*synthetic, or no weights to read the first key that is found"
            )
        pairs.append((value, key))
    if not any(weight for weight, _ in pairs):
        raise UserError(f"config.data.captions {','.join(data.captions)}: all weights are 0; give one of them more")
    weights, keys = zip(*(pair for pair in pairs if pair[0]), strict=True)
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(DataConfig)}
    return Mixed(**values | {"captions": keys}, weights=weights)


def opened(kind: str, data: DataConfig, training: bool) -> Mixed:
    """Returns the settings for a source; only training draws, all else reads the first key that is found.

    Raises:
      UserError: the training data are of a kind that reads the captions of one key alone.
    """
    if not training:
        return dataclasses.replace(split(data), weights=())
    if kind not in KINDS:
        raise UserError(
            f"config.data.captions {','.join(data.captions)}: weights need config.data.train to be of kind "
            f"{', '.join(KINDS)}, got {kind}; name one key without a weight"
        )
    return split(data)


def joined(found: Sequence[tuple[int, list[str]]], weights: Sequence[float]) -> dict[str, Any]:
    """Joins the texts of all keys that a record has, with the chance of each: its key's share, divided among them."""
    whole = sum(weights[place] for place, _ in found)
    chances = [weights[place] / whole / len(texts) for place, texts in found for _ in texts]
    return {"texts": [text for _, texts in found for text in texts], "chances": chances}
