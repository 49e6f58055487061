"""The record that every kind of source yields, its limits, and the check that makes one usable.

A record is {"key": str, "epoch": int, "image": bytes, "texts": list[str], "caption": int, "label": int | None}, or
{"key", "epoch", "bad": KIND} if it cannot be used. "caption" is the place that the texts come from in the source's
`caption_names`, -1 if there are none.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

Record = dict[str, Any]
Pick = tuple[int, int]  # index of a shard or record, epoch

CHUNK = 64  # records handed from thread to thread at once
END = -1  # in place of an offset: the shard has no more records
# Extensions of what `transforms.FORMATS` decodes, the one list of them.
IMAGES = tuple("jpg jpeg png webp gif avif bmp tif tiff jfif jpe ppm pgm pbm pnm apng mpo".split())
MAX_IMAGE, MAX_TEXT, MAX_CHUNK = 2**25, 2**20, 2**24  # bytes; a chunk ends with the record that reaches its limit


class BadRecord(ValueError):
    """A record that cannot be used; the message is the kind under which it is counted."""


def sample(image: Any, captions: Iterable[Any], label: int | None = None) -> Record:
    """Checks the content of a record, and returns what its key and epoch are merged with.

    Each of `captions` is a string, bytes, or a list of them, which may be written as JSON; the first one that is not
    blank is used.
    """
    if not image or not isinstance(image, bytes):
        return {"bad": "no image"}
    try:
        found = ((i, texts) for i, caption in enumerate(captions) if (texts := _texts(caption)))
        place, texts = next(found, (-1, []))
    except UnicodeError:
        return {"bad": "caption is not UTF-8"}
    if len(image) > MAX_IMAGE or any(len(text) > MAX_TEXT for text in texts):
        return {"bad": "too large"}
    return {"image": image, "texts": texts, "caption": place, "label": label}


def held(record: Record) -> int:
    """Counts the bytes that a record holds, or held before a worker took them ("size")."""
    if "size" in record:
        return record["size"]
    return len(record["key"]) + len(record.get("image", b"")) + sum(map(len, record.get("texts", ())))


def take(records: Iterator[Record], count: int) -> list[Record]:
    """Takes the next `count` records, or fewer that hold `MAX_CHUNK` bytes."""
    return [record for record, _ in take_chunk(((record, 0) for record in records), count)]


def take_chunk(reader: Iterator[tuple[Record, int]], count: int = CHUNK) -> list[tuple[Record, int]]:
    """Takes the next records, each with the offset after it; the one that reaches `MAX_CHUNK` bytes is the last."""
    chunk, size = [], 0
    for record, offset in itertools.islice(reader, count):
        chunk.append((record, offset))
        size += held(record)
        if size >= MAX_CHUNK and offset != END:  # records without offsets are read as a whole
            break
    return chunk


def is_last(chunk: list[tuple[Record, int]]) -> bool:
    """Tells whether a chunk is its reader's last, as far as it shows: an empty one may follow it."""
    full = len(chunk) == CHUNK or sum(held(record) for record, _ in chunk) >= MAX_CHUNK
    return not full or chunk[-1][1] == END


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
