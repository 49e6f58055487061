"""Paths of shards: brace ranges, globs, local and remote files."""

import functools
import glob
import io
import os
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import fsspec

from flip_jax.runtime import UserError

BUFFER = 2**18  # bytes
BLOCK = 2**23  # bytes requested from a remote store at once
MAX_RANGE = 10**7  # numbers in one pair of braces
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_remote(path: str) -> bool:
    """Tells whether fsspec reads it (gs://, s3://, http://, ...)."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Opens a buffered, seekable binary file. Opening it and reading from it raise no errors but OSError."""
    if not is_remote(path):
        return open(path, "rb", buffering=BUFFER)
    filesystem, name = _ask_store(fsspec.url_to_fs, path)
    file = _ask_store(filesystem.open, name, "rb", block_size=BLOCK, cache_type="readahead")
    return io.BufferedReader(_RemoteFile(file), BUFFER)


class _RemoteFile(io.RawIOBase):
    """Reads a file of a remote store, and raises every failure of the store as an OSError."""

    def __init__(self, file):
        self._file = file

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        data = _ask_store(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset, whence=io.SEEK_SET):
        return _ask_store(self._file.seek, offset, whence)

    def tell(self):
        return self._file.tell()

    def close(self):
        self._file.close()
        super().close()


def _ask_store(call: Callable[..., Any], *arguments, **keywords):
    """Calls a remote store's client. Each client has its own kinds of errors; from here on they are OSErrors."""
    try:
        return call(*arguments, **keywords)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def expand(pattern: str) -> list[str]:
    """Lists the paths of a pattern with {00000..00127}, {a,b} and globs, in the order of the braces.

    Local files are checked to exist; remote ones that need no glob are not looked up. UserError if any is missing, or
    the pattern is a folder.
    """
    if not is_remote(pattern) and os.path.isdir(pattern):
        raise UserError(f"{pattern!r} is a folder; a pattern names files, such as {pattern.rstrip('/')}/*.tar")
    # One listing per folder: a lookup per file takes minutes on a mounted bucket.
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
        raise UserError(
            f"{len(missing)} of {len(found)} shards are missing, first {missing[0]!r}; a pattern is local or remote "
            "paths with {00000..00127}, {a,b} or globs"
        )
    return found


def _remote(part):
    """Lists the files that match a remote path; without a glob it is the path itself, which is not looked up."""
    protocol = part.partition("://")[0].rpartition("::")[2]
    try:
        _ask_store(fsspec.get_filesystem_class, protocol)
        # Signed URLs have a question mark, and fsspec does not take that for a glob either.
        if not re.search("[*[]" if protocol.startswith("http") else "[*?[]", part):
            return [part]
        filesystem, name = _ask_store(fsspec.url_to_fs, part)
        return sorted(map(filesystem.unstrip_protocol, _ask_store(filesystem.glob, name)))
    except OSError as error:
        raise UserError(f"{part!r} cannot be listed: {error}") from error


def _expand_braces(pattern):
    """Expands the first pair of braces, and recursively those after it."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, items = match.groups()
    if items is None:
        if not 0 <= int(last) - int(first) < MAX_RANGE:
            raise UserError(f"{match[0]} must go up, and hold at most {MAX_RANGE:,} numbers")
        width = max(len(number) if number[0] == "0" and len(number) > 1 else 0 for number in (first, last))
        items = ",".join(f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    head, tails = pattern[: match.start()], _expand_braces(pattern[match.end() :])
    return [head + item + tail for item in items.split(",") for tail in tails]
