"""Reads the rows of a Parquet file in bounded memory, whatever the file says.

A file of a few kilobytes may hold one value of 100 MB that all of its rows share, or a list of a billion captions.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow
import pyarrow.compute as pc
from pyarrow import parquet, types

from flip_jax.data.shards import Damaged

ROWS = 16  # at once: a batch has a copy of a shared value for each; more are no faster
HELD = 2**27  # bytes of a batch or of a dictionary
RATIO = 32  # images do not compress so far, and texts that do are few
MAX_VALUES = 2**24  # that one row may have in a column of lists
OBJECT = 100  # bytes that Python takes for a value


def read(
    file: BinaryIO, table: parquet.ParquetFile, columns: list[str], offset: int
) -> Iterator[dict[str, Any] | None]:
    """Yields the rows from `offset` on; None for one that would take more than `HELD` bytes.

    Raises:
      Damaged: a row group cannot be read within the limits.
    """
    longest = _longest_lists(table.metadata, columns)
    if longest:
        # As indices, whose values are counted before they are copied.
        paths = sorted(longest)
        table = parquet.ParquetFile(file, metadata=table.metadata, read_dictionary=paths, buffer_size=2**20)
    skip = offset
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if skip >= count:  # a whole row group is skipped without reading it
            skip -= count
            continue
        rows = _rows_at_once(file, table.metadata, group, columns)
        for batch in table.iter_batches(rows, [group], columns, use_threads=False):
            wanted = batch.slice(min(skip, batch.num_rows))
            skip = max(0, skip - batch.num_rows)
            if not longest or _dense_bytes(wanted.to_struct_array()) <= HELD:
                yield from wanted.to_pylist()
                continue
            for row in (wanted.slice(i, 1) for i in range(len(wanted))):
                yield row.to_pylist()[0] if _dense_bytes(row.to_struct_array()) <= HELD else None


def _chunks(metadata, group, columns):
    """Yields the chunks of these columns, or of their fields, in a row group."""
    row_group = metadata.row_group(group)
    for i in range(metadata.num_columns):
        chunk = row_group.column(i)
        if chunk.path_in_schema.partition(".")[0] in columns:
            yield chunk


def _longest_lists(metadata, columns):
    """Returns the paths of the columns of lists. Damaged if one of them has too many values for one row."""
    found = set()
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for chunk in _chunks(metadata, group, columns):
            if chunk.num_values > rows:  # every row has at least one
                found.add(chunk.path_in_schema)
            if chunk.num_values - rows > MAX_VALUES:
                raise Damaged(
                    "row group too large",
                    f"column {chunk.path_in_schema} has {chunk.num_values:,} values in {rows:,} rows, at most "
                    f"{MAX_VALUES:,} more than rows are read; write smaller row groups",
                )
    return found


def _rows_at_once(file, metadata, group, columns):
    """Returns how many rows of a row group may be read at once; Damaged if even one could take too much."""
    rows = ROWS
    for chunk in _chunks(metadata, group, columns):
        size, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
        shared = _dictionary_bytes(file, chunk) if size > HELD // ROWS else 0
        if shared > HELD or (size > HELD and size > RATIO * stored):
            raise Damaged(
                "row group too large",
                f"column {chunk.path_in_schema} of row group {group} unpacks from {stored:,} to {size:,} bytes; "
                f"at most {HELD:,} are read, or {RATIO} times what is stored; write smaller row groups",
            )
        rows = min(rows, max(1, HELD // max(1, shared)))
    return rows


def _dictionary_bytes(file, chunk):
    """Returns the size of a chunk's dictionary, which bounds that of each value, from the head of its page; 0 if none.

    The head begins with three numbers in Thrift's compact form: the kind of page, its size, and its compressed size.
    """
    if not chunk.has_dictionary_page:
        return 0
    file.seek(chunk.dictionary_page_offset)
    numbers, at, head = [], 0, file.read(24)
    for _ in range(2):
        at, value, shift = at + 1, 0, 0  # behind the mark of a number
        while at < len(head):
            value, shift, at = value | (head[at] & 127) << shift, shift + 7, at + 1
            if head[at - 1] < 128:
                break
        numbers.append(value >> 1)
    return numbers[1] if head[:1] == b"\x15" else chunk.total_uncompressed_size


def _dense_bytes(array: pyarrow.Array) -> int:
    """Returns about how many bytes an array takes as Python objects."""
    kind = array.type
    if types.is_struct(kind):
        return sum(map(_dense_bytes, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return OBJECT * len(array) + _dense_bytes(array.flatten())
    if types.is_dictionary(kind) and not types.is_primitive(kind.value_type):
        return OBJECT * len(array) + (pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    return OBJECT * len(array) + array.nbytes
