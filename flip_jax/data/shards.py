"""Sources that are read from front to back: tars, TFRecord and Parquet files."""

import functools
import itertools
import json
import logging
import os
import re
import struct
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import google_crc32c

from flip_jax.config import DataConfig
from flip_jax.data import paths
from flip_jax.data.records import CHUNK, END, IMAGES, MAX_IMAGE, MAX_TEXT, Pick, Record, example, example_key, sample

_log = logging.getLogger(__name__)

Sample = tuple[str, dict[str, Any], int]  # key in the shard, rest of the record, offset after it

RETRY_AFTER = (0.1, 0.3, 1.0)  # seconds, of a shard that cannot be read
TEXTS = ("txt", "json", "cls")
MAX_BYTES = dict.fromkeys(IMAGES, MAX_IMAGE) | dict.fromkeys(TEXTS, MAX_TEXT)  # of a tar's member
IMAGE_FIELDS = (*IMAGES, "image", "image_bytes", "image/encoded")  # columns and features, the first that is there
MAX_NAME = 2**20  # bytes
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's rule: the key ends at the first dot
_PAX = re.compile(rb"^\d+ (path|size)=(.*)$", re.MULTILINE)


class Damaged(Exception):
    """(kind, details): a shard of which nothing more can be read, however often one tries."""


class Shards:
    """Files that are read from front to back. A subclass says in `_samples` what is in one."""

    class_names: list[str] | None = None
    templates: list[str] | None = None  # prompts for those classes, each with one {}
    at_once = 1  # items that `read` takes

    def __init__(self, pattern: str, data: DataConfig):
        self.paths, self.window, self.interleave = paths.expand(pattern), data.shuffle_window, data.interleave
        self._captions = data.captions
        self._failed = set()  # paths that it makes no sense to wait for once more

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The records of one shard from `offset` on, each with the offset after it.

        A shard that cannot be read is tried again where it stopped. What is then left of it is one bad record.
        """
        ((index, epoch),) = picks
        path, waits = self.paths[index], iter(RETRY_AFTER)
        shard, problem, details = os.path.basename(path), "" if offset else "empty shard", ""
        while True:
            try:
                with paths.open_file(path) as file:
                    for key, rest, offset in self._samples(file, offset, path):  # noqa: B020  where to go on
                        yield {"key": f"{shard}/{key}", "epoch": epoch} | rest, offset
                        problem, waits = "", iter(RETRY_AFTER)
                        self._failed.discard(path)
            except Damaged as error:
                problem, details = error.args
            except Exception as error:  # clients of remote stores have errors of their own kinds
                if path not in self._failed and (wait := next(waits, None)):
                    time.sleep(wait)
                    continue
                self._failed.add(path)
                problem, details = "unreadable shard", error
            if problem:
                _log.warning("%s: %s %s", path, problem, details)
                yield {"key": shard, "epoch": epoch, "bad": problem}, END
            return

    def _samples(self, file: BinaryIO, offset: int, path: str) -> Iterator[Sample]:
        raise NotImplementedError

    def _require(self, columns, names):
        """The first of `names` among the columns."""
        for name in names:
            if name in columns:
                return name
        raise Damaged("missing column", f"wanted one of {', '.join(names)}; has {', '.join(columns)}")


class WebDataset(Shards):
    """Tars as webdataset, img2dataset and CLIP_benchmark write them.

    A sample is the successive members that share a name up to the first dot: `IMAGES`; txt, or captions in json; cls, a
    class number. Offsets are bytes. Class names and templates are those that CLIP_benchmark puts beside the shards.
    """

    @functools.cached_property
    def class_names(self):
        return self._beside("classnames.txt")

    @functools.cached_property
    def templates(self):
        lines = self._beside("zeroshot_classification_templates.txt")
        return lines and [line.replace("{c}", "{}") for line in lines]

    def _beside(self, name):
        """The lines of a file in the folder of the shards or the one above, None if there is none."""
        path = self.paths[0] if paths.is_remote(self.paths[0]) else os.path.abspath(self.paths[0])
        for folder in (path.rpartition("/")[0], path.rsplit("/", 2)[0]):
            try:
                with paths.open_file(f"{folder}/{name}") as file:
                    return [line.strip() for line in file.read(MAX_TEXT).decode().strip().split("\n")]
            except FileNotFoundError:
                pass
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder}/{name} is not UTF-8") from error
        return None

    def _samples(self, file, offset, path):
        for key, files in itertools.groupby(members(file, offset), key=lambda member: member[0]):
            parts, bad = {}, ""
            for _, extension, safe, size, end in files:  # noqa: B007  the last `end` is that of the sample
                if not safe:
                    bad = "unsafe member"
                elif size > MAX_BYTES.get(extension, size):
                    bad = "too large"
                elif extension in parts:
                    bad = "duplicate key"
                elif extension in MAX_BYTES:
                    parts[extension] = file.read(size)
                    if len(parts[extension]) < size:
                        raise Damaged("tar cut short", f"in {key}.{extension}")
            if key:
                yield key, {"bad": bad} if bad else self._sample(parts), end

    def _sample(self, parts):
        try:
            fields = json.loads(parts.get("json", b"").decode(errors="surrogateescape"))
        except (ValueError, RecursionError):
            fields = {}
        fields = (fields if isinstance(fields, dict) else {}) | {name: parts[name] for name in parts.keys() & {"txt"}}
        label = parts.get("cls", b"").strip()
        if not re.fullmatch(rb"\d{0,9}", label):
            return {"bad": "class is no number"}
        image = next((parts[extension] for extension in IMAGES if extension in parts), None)
        return sample(image, map(fields.get, self._captions), int(label) if label else None)


class TfRecord(Shards):
    """TFRecord files of tf.train.Example, as img2dataset writes them: `IMAGE_FIELDS`, captions, key. Offsets are bytes.

    A record with a wrong checksum is bad; after a wrong checksum of a length, nobody knows where the next one starts.
    """

    def _samples(self, file, offset, path):
        file.seek(offset)
        while header := file.read(12):
            if len(header) < 12:
                raise Damaged("TFRecord cut short", f"at byte {offset}")
            length, checksum = struct.unpack("<QI", header)
            if _masked_crc32c(header[:8]) != checksum:
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
            image = next((fields[name][0] for name in IMAGE_FIELDS if fields.get(name)), None)
            yield example_key(fields, start), sample(image, map(fields.get, self._captions)), offset


class Parquet(Shards):
    """Parquet files, as img2dataset writes them: columns `IMAGE_FIELDS`, captions, key. Offsets are rows.

    Where an image is a struct, as in Hugging Face's sets, its field "bytes" is taken.
    """

    def _samples(self, file, offset, path):
        from pyarrow import parquet  # slow to import, and not every source needs it

        # The default holds a whole row group at a time.
        table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        names = table.schema_arrow.names
        image = self._require(names, IMAGE_FIELDS)
        self._require(names, self._captions)
        columns = [name for name in (image, "key", *self._captions) if name in names]
        group, skip = 0, offset
        while group < table.num_row_groups and skip >= (count := table.metadata.row_group(group).num_rows):
            group, skip = group + 1, skip - count
        for batch in table.iter_batches(CHUNK, range(group, table.num_row_groups), columns, use_threads=False):
            for row in batch.slice(min(skip, batch.num_rows)).to_pylist():
                number, offset = offset, offset + 1
                yield str(row.get("key") or number), sample(row[image], map(row.get, self._captions)), offset
            skip = max(0, skip - batch.num_rows)


def members(file: BinaryIO, offset: int) -> Iterator[tuple[str, str, bool, int, int]]:
    """(key, extension, whether it is a plain file in the archive, size, offset after it) of each member of a sample.

    The file stands at the member's data. The standard library takes three times as long, as much as to decode a small
    picture. Key "" says that the sample before is whole. Damaged where the tar ends without its end mark, a header is
    damaged, or it is no tar.
    """
    extended, ended = {}, False
    while True:
        file.seek(offset)
        block = file.read(512)
        if not block.strip(b"\0") and (ended or len(block) == 512):
            if len(block) < 512:
                return
            if not ended:
                yield "", "", True, 0, offset
            # A zeroed header looks like the end mark, and tars may be joined: the end is where nothing follows.
            offset, ended = offset + 512, True
            continue
        ended = False
        kind = block[156:157]
        try:
            size = int.from_bytes(block[125:136]) if block[124:125] == b"\x80" else _octal(block[124:136])
            size = size if kind in b"xgLK" else int(extended.get(b"size", size))
            checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
            if size < 0 or len(block) < 512 or _octal(block[148:156]) != checksum:
                raise ValueError
        except ValueError:
            if not block:  # only the end mark is missing: the sample before is whole
                yield "", "", True, 0, offset
            if offset or len(block) < 512:
                raise Damaged("tar cut short", f"at byte {offset}") from None
            raise Damaged("unreadable shard", "not a tar file") from None
        offset += 512 if kind in b"123456" else 512 + (size + 511) // 512 * 512
        if kind in b"xL":  # what does not fit in the header of the next member
            body = file.read(min(size, MAX_NAME))
            extended |= dict(_PAX.findall(body)) if kind == b"x" else {b"path": body}
        elif kind not in b"gK":
            name, prefix = block[:100], block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
            name = extended.get(b"path", prefix + b"/" + name if prefix else name).partition(b"\0")[0]
            name = name.decode(errors="replace")
            if match := _NAME.fullmatch(name):
                safe = kind in b"\x0007" and not name.startswith("/") and ".." not in name.split("/")
                yield match[1], match[2].lower(), safe, size, offset
            extended = {}


def _octal(field):
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _masked_crc32c(data):
    """The checksum of TFRecords."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
