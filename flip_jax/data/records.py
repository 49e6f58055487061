"""What all kinds of sources share: a record, its limits, and what makes one usable.

A record is {"key": str, "epoch": int, "image": bytes, "texts": list[str], "label": int | None}, or {"key", "epoch",
"bad": KIND} if it cannot be used.
"""

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError

Record = dict[str, Any]
Pick = tuple[int, int]  # index of a shard or record, epoch

CHUNK = 64  # records that go from thread to thread together
END = -1  # in place of an offset: the shard has no more
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif")
MAX_IMAGE, MAX_TEXT = 2**28, 2**20  # bytes


def sample(image: Any, captions: Iterable[Any], label: int | None = None) -> Record:
    """The rest of a record: of the captions (a string, bytes, or several) the first that are not empty."""
    image = image.get("bytes") if isinstance(image, dict) else image
    if not image or not isinstance(image, bytes):
        return {"bad": "no image"}
    try:
        texts = next(filter(None, map(_texts, captions)), [])
    except UnicodeError:
        return {"bad": "caption is not UTF-8"}
    if len(image) > MAX_IMAGE or any(len(text) > MAX_TEXT for text in texts):
        return {"bad": "too large"}
    return {"image": image, "texts": texts, "label": label}


def _texts(value):
    """The captions of a string, bytes or a list of them, but blank ones. UnicodeError if one is not UTF-8."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str | bytes)]
    # Text from JSON may hold halves of characters, which cannot be encoded.
    encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return [text.decode() for text in encoded if text.strip()]


def example(data):
    """The features of a serialised tf.train.Example by name, lists of bytes or of integers; None if it is none."""
    from tensorflow_datasets.proto import tf_example_pb2  # slow to import, and not every source needs it

    try:
        features = tf_example_pb2.Example.FromString(data).features.feature
    except DecodeError:
        return None
    return {name: list(value.bytes_list.value or value.int64_list.value) for name, value in features.items()}


def example_key(fields, default):
    """The key of an example, or its place."""
    key = next(iter(fields.get("key", ())), default)
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)
