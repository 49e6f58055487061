"""Paths of shards and images: brace ranges, globs, local, remote and compressed files."""

import bz2
import dataclasses
import functools
import glob
import gzip
import io
import logging
import lzma
import os
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import fsspec

from flip_jax.config import DataConfig
from flip_jax.data.records import MAX_IMAGE
from flip_jax.runtime import UserError, is_remote

_log = logging.getLogger(__name__)

BUFFER = 2**18  # bytes
BLOCK = 2**23  # bytes requested from a remote store at once
MAX_RANGE = 10**7  # numbers in one pair of braces
PARENT = '".." in a path (allowed for local files by data.allow_parent_paths)'  # the kind of such bad records
URL = "URL in a local table (allowed by data.allow_urls)"
TIMEOUT = 30  # seconds for each request of an image that a table names
UNPACKED, RATIO = 2**30, 256  # bytes that may be unpacked from anything; how much more than the file beyond that
XZ_MEMORY, PROBE = 2**28, 2**10  # bytes that xz may hold, which the start of a file says
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_REMEDIES = {  # what a store's client says, and what helps; the first that matches is added to the message
    r"ImportError|ModuleNotFoundError|Protocol not known": 'install its client, pip install -e ".[remote]"',
    r"[Cc]redential|Forbidden|Unauthorized|Anonymous|Permission|AccessDenied|40[13]": "check that your account may "
    "read it, and how this machine logs in (gs://: gcloud auth application-default login; s3://: aws configure; "
    "hf://: hf auth login)",
    r"[Cc]onnect|[Rr]esolve|[Tt]imeout|[Tt]imed out|DNS|unreachable": "check the address and this machine's network",
}


def open_file(path: str, block: int = BLOCK, timeout: float | None = None) -> BinaryIO:
    """Opens a buffered, seekable binary file; a remote store is asked for `block` bytes at a time.

    `timeout` is for each request by HTTP; the clients of stores have their own.

    Opening it and reading from it raise no errors but OSError.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=BUFFER)
    options = {}
    if timeout and path.startswith("http"):
        import aiohttp

        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(timeout)}}
    filesystem, name = _ask(fsspec.url_to_fs, path, **options)
    file = _ask(filesystem.open, name, "rb", block_size=block, cache_type="readahead")
    return io.BufferedReader(_RemoteFile(file), BUFFER)


def remedy(error: OSError) -> str:
    """Formats an error of a system or a store with what helps against it."""
    text = f"{type(error).__name__}: {error}" if type(error) is not OSError else str(error)
    return text + next((f"; {remedy}" for found, remedy in _REMEDIES.items() if re.search(found, text)), "")


class _RemoteFile(io.RawIOBase):
    """Reads a file of a remote store, and raises every failure of the store as an OSError."""

    def __init__(self, file):
        self._file = file

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        data = _ask(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset, whence=io.SEEK_SET):
        return _ask(self._file.seek, offset, whence)

    def tell(self):
        return self._file.tell()

    def close(self):
        self._file.close()
        super().close()


def decompress(file: BinaryIO) -> BinaryIO:
    """Returns a file whose offsets are those of the content, if the file is compressed; else itself.

    gzip, bzip2, xz, zstd and lz4 are known by their first bytes. OSError for archives that cannot be read so.
    """
    file.seek(0)
    head = file.read(10)
    file.seek(0)
    for name, magic in (("ZIP", b"PK\3\4"), ("7z", b"7z\xbc\xaf\x27\x1c"), ("RAR", b"Rar!"), ("compress", b"\x1f\x9d")):
        if head.startswith(magic):
            raise OSError(f"is compressed by {name}, which is not read here: unpack it, or use gzip or zstd")
    stream: Callable[[BinaryIO], Any] | None = None
    if head.startswith(b"\x1f\x8b\x08"):
        stream = lambda file: gzip.GzipFile(fileobj=file)  # noqa: E731
    elif head.startswith(b"BZh") and head[4:] == b"1AY&SY":
        stream = bz2.BZ2File
    elif head.startswith(b"\xfd7zXZ\0"):
        _ask(lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress, file.read(PROBE))
        file.seek(0)
        stream = lzma.LZMAFile
    elif head.startswith((b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")):
        import pyarrow  # slow to import, and few files need it

        codec = "zstd" if head.startswith(b"\x28") else "lz4"
        stream = lambda file: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec)  # noqa: E731
    return io.BufferedReader(_Decompressed(file, stream), BUFFER) if stream else file


class _Decompressed(io.RawIOBase):
    """Reads compressed data from front to back: a seek reads what lies between, one backwards starts again."""

    def __init__(self, file, open_stream):
        self._file, self._open, self._stream, self._at = file, open_stream, open_stream(file), 0
        self._earlier = []  # Arrow closes the file below a stream that is no longer referred to

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        data = _ask(self._stream.read, len(buffer))
        buffer[: len(data)] = data
        self._count(data)
        return len(data)

    def _count(self, data):
        self._at += len(data)
        if self._at > UNPACKED and self._at > RATIO * (packed := self._file.tell()):
            raise OSError(f"unpacks to more than {RATIO} times its size, {packed:,} to {self._at:,} bytes: unpack it")

    def seek(self, offset, whence=io.SEEK_SET):
        if whence == io.SEEK_END:
            raise OSError("is compressed as a whole, and can only be read from front to back: unpack it")
        offset += self._at if whence == io.SEEK_CUR else 0
        if offset < self._at:
            self._earlier.append(self._stream)
            self._file.seek(0)
            self._stream, self._at = self._open(self._file), 0
        while self._at < offset and (data := _ask(self._stream.read, min(BUFFER, offset - self._at))):
            self._count(data)
        return self._at

    def tell(self):
        return self._at


def _ask(call: Callable[..., Any], *arguments, **keywords):
    """Calls a store's client or a decompressor. Each has its own kinds of errors; from here on they are OSErrors."""
    try:
        return call(*arguments, **keywords)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_image(path: str, data: DataConfig) -> bytes | str:
    """Reads the bytes of an image's file, or returns the kind of bad record that it makes.

    A path with backslashes, as Windows writes them, is also tried with slashes.
    """
    if not is_remote(path) and "\\" in path and not os.path.isfile(path):
        path = path.replace("\\", "/")
    if ".." in path.split("/") and (is_remote(path) or not data.allow_parent_paths):
        return PARENT
    if not (is_remote(path) or os.path.isfile(path)):
        return "no image"
    if is_remote(path) and (not data.allow_urls or "::" in path or path.startswith(("file:", "local:"))):
        return URL
    try:
        with open_file(path, timeout=TIMEOUT) as file:
            return file.read(MAX_IMAGE + 1)
    except OSError as error:
        _log.warning("%s: %s", path, remedy(error))
        return "unreadable image"


def may_name_urls(data: DataConfig, table: str) -> DataConfig:
    """Returns the settings for the images of a table: one that is remote itself may name URLs."""
    return dataclasses.replace(data, allow_urls=data.allow_urls or is_remote(table))


def located(name: str, folder: str) -> str:
    """Returns the path of an image that a table in `folder` names; `folder` is absolute or remote."""
    name = name.strip()
    if name.startswith("~"):
        name = os.path.expanduser(name)
    return name if not name or not folder or is_remote(name) or name.startswith("/") else f"{folder}/{name}"


def folder_of(path: str) -> str:
    """Returns the folder of a file, made absolute, so that ".." can only come from a name in the file."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def expand(pattern: str) -> list[str]:
    """Lists the paths of a pattern with {00000..00127}, {a,b} and globs, in the order of the braces.

    A file or folder whose name has braces, brackets or other such characters itself is taken as it is. Local files are
    checked to exist; remote ones that need no glob are not looked up. UserError if any is missing, or the pattern is a
    folder.
    """
    # One listing per folder: a lookup per file takes minutes on a mounted bucket.
    present = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    found, missing = [], []
    parts = [pattern] if not is_remote(pattern) and os.path.exists(pattern) else _expand_braces(pattern)
    for part in parts:
        if is_remote(part):
            paths = _remote(part)
        elif os.path.basename(part) in present(os.path.dirname(part) or "."):
            paths = [part]
        else:
            paths = sorted(glob.glob(_literal_folders(part))) if glob.has_magic(part) else []
        found += paths or [part]
        missing += [] if paths else [part]
    if len(parts) == 1 and os.path.isdir(parts[0]):
        raise UserError(f"{parts[0]!r} is a folder; a pattern names files, such as {parts[0].rstrip('/')}/*.tar")
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} shards are missing, first {missing[0]!r}; a pattern is local or remote "
            "paths with {00000..00127}, {a,b} or globs"
        )
    return found


def _literal_folders(pattern):
    """Escapes the folders at the start of a glob that exist under just these names."""
    folder, names = "", pattern.split("/")
    for i, name in enumerate(names[:-1]):
        if not os.path.isdir(f"{folder}{name}/"):
            return glob.escape(folder) + "/".join(names[i:])
        folder += f"{name}/"
    return glob.escape(folder) + names[-1]


def _remote(part):
    """Lists the files that match a remote path; without a glob it is the path itself, which is not looked up."""
    protocol = part.partition("://")[0].rpartition("::")[2]
    try:
        _ask(fsspec.get_filesystem_class, protocol)
        # Signed URLs have a question mark, and fsspec does not take that for a glob either.
        if not re.search("[*[]" if protocol.startswith("http") else "[*?[]", part):
            return [part]
        filesystem, name = _ask(fsspec.url_to_fs, part)
        return sorted(map(filesystem.unstrip_protocol, _ask(filesystem.glob, name)))
    except OSError as error:
        raise UserError(f"{part!r} cannot be listed: {remedy(error)}") from None


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
