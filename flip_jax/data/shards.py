"""Sources read from front to back: tar and TFRecord files."""

import functools
import itertools
import logging
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import google_crc32c

from flip_jax.config import DataConfig
from flip_jax.data import fingerprint, paths, sources
from flip_jax.data.content import example, example_key, json_object, sample
from flip_jax.data.records import END, IMAGES, MAX_IMAGE, MAX_TEXT, Pick, Record
from flip_jax.runtime import UserError, is_remote

_log = logging.getLogger(__name__)

Sample = tuple[str, dict[str, Any], int]  # key in the shard, rest of the record, offset after it

RETRY_AFTER = (0.1, 0.3, 1.0)  # seconds between the attempts to read a shard
TEXTS = ("txt", "json", "cls")
MAX_BYTES = dict.fromkeys(IMAGES, MAX_IMAGE) | dict.fromkeys(TEXTS, MAX_TEXT)  # of a member of a tar
IMAGE_FIELDS = (
    *IMAGES,
    "image",
    "images",
    "image_bytes",
    "image/encoded",
)  # columns or features; the first that exists is used
MAX_NAME = 2**20  # bytes
MAX_SKIP = 2**40  # bytes; a header with a larger size is damaged, and file systems refuse to seek so far
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's rule: the key ends at the first dot
_HIDDEN = re.compile(r"(?:^|/)(?:\.[^./]|__MACOSX/)")  # a part of a path; "." and ".." are none
_PAX = re.compile(rb"^\d+ (path|size)=(.*)$", re.MULTILINE)


class Damaged(Exception):
    """Raised as (kind, details) for a shard that no further attempt can read beyond this place."""


class _BadHeader(Exception):
    """Raised for a tar header with a wrong checksum, or numbers that are none."""


class Shards:
    """Files read from front to back. A subclass parses one in `_samples`."""

    class_names: list[str] | None = None
    templates: list[str] | None = None  # prompts for those classes, each with one {}
    caption_names: Sequence[str] = ()  # where the texts of a record come from, for people
    at_once = 1  # items that `read` takes per call

    def __init__(self, pattern: str | list[str], data: DataConfig):
        self.paths = paths.expand(pattern) if isinstance(pattern, str) else pattern
        self.window, self.interleave = data.shuffle_window, data.interleave
        self._data, self._captions, self._weights = data, data.captions, getattr(data, "weights", ())
        self.ignored: Counter[str] = Counter()  # what no sample is made of, by kind
        self._failed = set()  # paths that all attempts failed for: they get one attempt in later epochs

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies the files wherever they are."""
        return fingerprint.of(self.paths)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Reads the records of one shard from `offset` on, each with the offset after it.

        A read that fails is retried where it stopped. A shard that stays unreadable or is damaged ends in one bad
        record. Only OSError is retried: it is the one kind that `paths.open_file` raises, so a mistake in a parser
        surfaces as itself.
        """
        ((index, epoch),) = picks
        path, waits = self.paths[index], iter(RETRY_AFTER)
        shard, problem, details = os.path.basename(path), "" if offset else "empty shard", ""
        while True:
            try:
                with paths.open_file(path) as file:
                    for key, rest, offset in self._samples(file, offset, path):  # noqa: B020  a retry starts here
                        yield {"key": f"{shard}/{key}", "epoch": epoch} | rest, offset
                        problem, waits = "", iter(RETRY_AFTER)
                        self._failed.discard(path)
            except Damaged as error:
                problem, details = error.args
            except OSError as error:
                if path not in self._failed and (wait := next(waits, None)):
                    time.sleep(wait)
                    continue
                self._failed.add(path)
                problem, details = "unreadable shard", paths.remedy(error)
            if problem:
                _log.warning("%s: %s %s", path, problem, details)
                yield {"key": shard, "epoch": epoch, "bad": problem, "why": f"{path}: {details}"}, END
            return

    def _samples(self, file: BinaryIO, offset: int, path: str) -> Iterator[Sample]:
        """Parses an open file from `offset` on. `Damaged` where the rest is lost, OSError where a retry may help."""
        raise NotImplementedError


class WebDataset(Shards):
    """Tars as webdataset, img2dataset and CLIP_benchmark write them.

    A sample is the consecutive members that share a name up to the first dot: `IMAGES`; txt, or captions in json; cls,
    a class number. Offsets are bytes. Class names and templates come from the files that CLIP_benchmark puts next to
    the shards.
    """

    def __init__(self, pattern: str | list[str], data: DataConfig):
        super().__init__(pattern, data)
        self.caption_names = [sources.TEXT_FILE if name == "txt" else f"JSON key {name!r}" for name in data.captions]
        self._images = [data.image.lower()] if data.image else IMAGES
        self._limits = MAX_BYTES | {data.image.lower(): MAX_IMAGE} if data.image else MAX_BYTES

    @functools.cached_property
    def class_names(self):
        return self._adjacent("classnames.txt")

    @functools.cached_property
    def templates(self):
        lines = self._adjacent("zeroshot_classification_templates.txt")
        return lines and [line.replace("{c}", "{}") for line in lines]

    def _adjacent(self, name):
        """Reads the lines of a file in the shards' folder or the one above; None if neither has it."""
        path = self.paths[0] if is_remote(self.paths[0]) else os.path.abspath(self.paths[0])
        for folder in (path.rpartition("/")[0], path.rsplit("/", 2)[0]):
            try:
                with paths.open_file(f"{folder}/{name}") as file:
                    return [line.strip() for line in file.read(MAX_TEXT).decode().strip().split("\n")]
            except FileNotFoundError:
                pass
            except UnicodeDecodeError:
                raise UserError(f"{folder}/{name} is not UTF-8; save it as UTF-8") from None
        return None

    def _samples(self, file, offset, path):
        data = paths.decompress(file)
        found = members(data, offset, self.ignored)
        for key, files in itertools.groupby(found, key=lambda member: member.key):
            parts, bad = {}, ""
            for _, extension, safe, size, end in files:  # noqa: B007  the last `end` is the sample's
                if not safe:
                    bad = "unsafe member"
                elif size > self._limits.get(extension, size):
                    bad = "too large"
                elif extension in parts:
                    bad = "duplicate key"
                elif extension in self._limits:
                    parts[extension] = data.read(size)
                    if len(parts[extension]) < size:
                        raise Damaged("tar cut short", f"in {key}.{extension}")
            if key:
                yield key, {"bad": bad} if bad else self._sample(parts), end

    def _sample(self, parts):
        fields = json_object(parts.get("json", b"")) | {name: parts[name] for name in parts.keys() & {"txt"}}
        label = parts.get("cls", b"").strip()
        if not re.fullmatch(rb"\d{0,9}", label):
            return {"bad": "class is no number"}
        image = next((parts[extension] for extension in self._images if extension in parts), None)
        return sample(image, map(fields.get, self._captions), int(label) if label else None, self._weights)


class TfRecord(Shards):
    """TFRecord files of tf.train.Example, as img2dataset writes them: `IMAGE_FIELDS`, captions, key. Offsets are bytes.

    A wrong checksum of a record's data costs that record. A wrong checksum of its length costs the rest of the file,
    as the start of the next record is then unknown.
    """

    def __init__(self, pattern: str | list[str], data: DataConfig):
        super().__init__(pattern, data)
        self.caption_names = [f"feature {name!r}" for name in data.captions]
        self._images = [data.image] if data.image else IMAGE_FIELDS

    def _samples(self, file, offset, path):
        header = file.read(12)
        # The length of a first record may look like the mark of a compressed file, but not with its checksum.
        if len(header) == 12 and _masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
            file = paths.decompress(file)
        file.seek(offset)
        while header := file.read(12):
            if len(header) < 12:
                raise Damaged("TFRecord cut short", f"at byte {offset}")
            length, checksum = struct.unpack("<QI", header)
            if _masked_crc32c(header[:8]) != checksum or length > MAX_SKIP:
                raise Damaged("shard damaged", f"from byte {offset} on")
            start, offset = offset, offset + 12 + length + 4
            if length > MAX_IMAGE:
                file.seek(offset)
                yield str(start), {"bad": "too large"}, offset
                continue
            data = file.read(length + 4)
            if len(data) < length + 4:
                raise Damaged("TFRecord cut short", f"at byte {start}")
            if _masked_crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                yield str(start), {"bad": "bad checksum"}, offset
                continue
            fields = example(data[:-4])
            if fields is None:
                yield str(start), {"bad": "not an Example"}, offset
                continue
            image = next((fields[name][0] for name in self._images if fields.get(name)), None)
            yield (
                example_key(fields, start),
                sample(image, map(fields.get, self._captions), None, self._weights),
                offset,
            )


class Member(NamedTuple):
    """A member of a tar that belongs to a sample; an empty `key` marks that the sample before it is complete."""

    key: str = ""  # its path up to the first dot of the file name
    extension: str = ""
    safe: bool = True  # a plain file with a path inside the archive
    size: int = 0
    end: int = 0  # offset of the next member's header


def members(file: BinaryIO, offset: int, ignored: Counter[str]) -> Iterator[Member]:
    """Iterates over the members of a tar from `offset` on; the file stands at each one's data while it is yielded.

    Hidden files, and those in hidden folders or in macOS's __MACOSX, are counted in `ignored`.
    Python's own tarfile takes three times as long, which is as much as decoding a small image. Raises `Damaged` where
    a header is damaged, the end mark is missing, or the file is not a tar.
    """
    extended, after_end_mark = {}, False
    while True:
        file.seek(offset)
        block = file.read(512)
        # Tars end with two blocks of zeros, but a zeroed header looks the same and tars may be concatenated. So zeros
        # only complete the sample before them; the end is where nothing at all follows them.
        if len(block) == 512 and not block.strip(b"\0"):
            if not after_end_mark:
                yield Member(end=offset)
            offset, after_end_mark = offset + 512, True
            continue
        if after_end_mark and not block.strip(b"\0"):
            return
        after_end_mark = False
        try:
            kind, size = _parse_header(block, extended)
        except _BadHeader:
            if not block:  # cut exactly between two members: only the end mark is missing
                yield Member(end=offset)
            if len(block) < 512:
                raise Damaged("tar cut short", f"at byte {offset}") from None
            if offset:
                raise Damaged("shard damaged", f"no header at byte {offset}; the rest is lost") from None
            raise Damaged("unreadable shard", "not a tar file") from None
        # Data fills whole blocks. Links, devices and folders have none, whatever size their headers give.
        offset += 512 if kind in b"123456" else 512 + (size + 511) // 512 * 512
        if kind in b"xL":  # a PAX or GNU extension holds the path or size that the next header has no room for
            body = file.read(min(size, MAX_NAME))
            extended |= dict(_PAX.findall(body)) if kind == b"x" else {b"path": body}
        elif kind not in b"gK":  # PAX's global settings and GNU's long link targets do not matter here
            name = _member_name(block, extended)
            if _HIDDEN.search(name):
                ignored["hidden files (._*, __MACOSX)"] += kind in b"\x0007"
            elif match := _NAME.fullmatch(name):
                safe = kind in b"\x0007" and not name.startswith("/") and ".." not in name.split("/")
                yield Member(match[1], match[2].lower(), safe, size, offset)
            extended = {}


def _parse_header(block, extended):
    """Returns the kind and size in a tar header, or raises _BadHeader."""
    kind = block[156:157]
    # Sizes above 8 GB are binary, marked by the first bit.
    size = int.from_bytes(block[125:136]) if block[124:125] == b"\x80" else _number(block[124:136])
    if kind not in b"xgLK":
        size = _number(extended[b"size"], 10) if b"size" in extended else size
    # The checksum is taken with spaces in its own place.
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if not 0 <= size <= MAX_SKIP or len(block) < 512 or _number(block[148:156]) != checksum:
        raise _BadHeader
    return kind, size


def _member_name(block, extended):
    """Returns the path of a tar's member, from its header or the extension before it."""
    name, prefix = block[:100], block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    name = extended.get(b"path", prefix + b"/" + name if prefix else name).partition(b"\0")[0]
    return name.decode(errors="replace")


def _number(field, base=8):
    """Parses a number of a tar header, or raises _BadHeader."""
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", base)
    except ValueError:
        raise _BadHeader from None


def _masked_crc32c(data):
    """Computes the checksum that TFRecord uses."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
