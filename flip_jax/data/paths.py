"""Paths of shards: brace ranges, globs, local files and remote ones."""

import functools
import glob
import io
import os
import re
from typing import BinaryIO

import fsspec

BUFFER = 2**18  # bytes
BLOCK = 2**23  # bytes that are asked of a remote store at once
MAX_RANGE = 10**7
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_remote(path: str) -> bool:
    """Whether fsspec reads it (gs://, s3://, http://, ...)."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """A buffered binary file that can be sought. OSError, or what the remote store's client raises."""
    if not is_remote(path):
        return open(path, "rb", buffering=BUFFER)
    filesystem, name = fsspec.url_to_fs(path)
    return io.BufferedReader(filesystem.open(name, "rb", block_size=BLOCK, cache_type="readahead"), BUFFER)


def expand(pattern: str) -> list[str]:
    """The paths of a pattern with {00000..00127}, {a,b} and globs, in the order of the braces.

    Local ones are there; remote ones that need no glob are not looked up. ValueError if there are none, or not all.
    """
    # One listing a folder: asking for each file takes minutes where a bucket is mounted.
    present = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    found, missing = [], []
    for part in _expand_braces(pattern):
        if is_remote(part):
            paths = _remote(part)
        elif glob.has_magic(part):
            paths = sorted(glob.glob(part))
        else:
            paths = [part] if os.path.basename(part) in present(os.path.dirname(part) or ".") else []
        found += paths or [part]
        missing += [] if paths else [part]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} shards are not there, first {missing[0]!r}; a pattern is local or remote "
            "paths with {00000..00127}, {a,b} or globs"
        )
    return found


def _remote(part):
    try:
        protocol = part.partition("://")[0].rpartition("::")[2]
        fsspec.get_filesystem_class(protocol)
        # Signed URLs have a question mark, and fsspec does not take that for a glob either.
        if not re.search("[*[]" if protocol.startswith("http") else "[*?[]", part):
            return [part]
        filesystem, name = fsspec.url_to_fs(part)
        return sorted(map(filesystem.unstrip_protocol, filesystem.glob(name)))
    except Exception as error:  # clients of remote stores have errors of their own kinds
        raise ValueError(f"{part!r} cannot be listed: {error}") from error


def _expand_braces(pattern):
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, items = match.groups()
    if items is None:
        if not 0 <= int(last) - int(first) < MAX_RANGE:
            raise ValueError(f"{match[0]} must go up, and hold at most {MAX_RANGE:,} numbers")
        width = max(len(number) if number[0] == "0" and len(number) > 1 else 0 for number in (first, last))
        items = ",".join(f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    head, tails = pattern[: match.start()], _expand_braces(pattern[match.end() :])
    return [head + item + tail for item in items.split(",") for tail in tails]
