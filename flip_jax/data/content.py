"""The content of a record: the check that makes it usable, captions, JSON and tf.train.Example."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from flip_jax.data.records import MAX_IMAGE, MAX_TEXT, Record


def sample(image: Any, captions: Iterable[Any], label: int | None = None, weights: Sequence[float] = ()) -> Record:
    """Checks the content of a record, and returns what its key and epoch are merged with.

    Each of `captions` is a string, bytes, or a list of them, which may be written as JSON; the first one that is not
    blank is used, or, with `weights`, all of them.
    """
    if not image or not isinstance(image, bytes):
        return {"bad": "no image"}
    try:
        found = ((i, texts) for i, caption in enumerate(captions) if (texts := _texts(caption)))
        several = list(found) if weights else []
        place, texts = several[0] if several else next(found, (-1, []))
    except UnicodeError:
        return {"bad": "caption is not UTF-8"}
    record = {"image": image, "texts": texts, "caption": place, "label": label}
    if several:
        from flip_jax.data import caption_mix

        record |= caption_mix.joined(several, weights)
    if len(image) > MAX_IMAGE or any(len(text) > MAX_TEXT for text in record["texts"]):
        return {"bad": "too large"}
    return record


def _texts(value):
    """Lists the captions in a string, bytes or a list of them, without blank ones. UnicodeError if one is not UTF-8."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str | bytes)]
    # Text from JSON may hold lone surrogates, which cannot be encoded.
    encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
    listed = (text for data in encoded for text in _json_list(data.decode()))
    return [text for text in listed if text.strip()]


def _json_list(text):
    """Lists the strings in a JSON list of strings; any other text is one caption."""
    if text.lstrip()[:1] == "[" and text.rstrip()[-1:] == "]":
        try:
            texts = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        if all(isinstance(item, str) for item in texts):
            return [item.encode(errors="replace").decode() for item in texts]  # JSON may hold lone surrogates
    return [text]


def json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object; {} for anything else."""
    try:
        found = json.loads(data.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def example(data: bytes) -> dict[str, list[Any]] | None:
    """Parses a serialised tf.train.Example to lists of bytes or integers by name; None if it is not an Example."""
    from tensorflow_datasets.proto import tf_example_pb2  # slow to import, and not every source needs it

    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError:
        return None
    return {name: list(value.bytes_list.value or value.int64_list.value) for name, value in features.items()}


def example_key(fields: dict[str, list[Any]], default: int) -> str:
    """Returns the key of an example, or else its number."""
    key = next(iter(fields.get("key", ())), default)
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
