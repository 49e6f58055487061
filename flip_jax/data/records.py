"""The record that every kind of source yields, its limits, and the chunks in which records are handed on.

A record is {"key": str, "epoch": int, "image": bytes, "texts": list[str], "caption": int, "label": int | None}, or
{"key", "epoch", "bad": KIND} if it cannot be used. "caption" is the place that the texts come from in the source's
`caption_names`, -1 if there are none.
"""

import itertools
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
Pick = tuple[int, int]  # index of a shard or record, epoch

CHUNK = 64  # records handed from thread to thread at once
END = -1  # in place of an offset: the shard has no more records
# Extensions of what `transforms.FORMATS` decodes, the one list of them.
IMAGES = tuple("jpg jpeg png webp gif avif bmp tif tiff jfif jpe ppm pgm pbm pnm apng mpo".split())
MAX_IMAGE, MAX_TEXT, MAX_CHUNK = 2**25, 2**20, 2**24  # bytes; a chunk ends with the record that reaches its limit


class BadRecord(ValueError):
    """A record that cannot be used; the message is the kind under which it is counted."""


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
