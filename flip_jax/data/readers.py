"""Encoded records of the sources that a setting may name, "KIND:REST".

A record is {"key": str, "epoch": int, "image": bytes, "texts": list[str], "label": int | None}, or {"key", "epoch",
"bad": KIND} if it cannot be used. A new kind of source is a class like those in `KINDS`, and its name there.
"""

import collections
import functools
import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain

from flip_jax.config import Data

Record = dict[str, Any]
Pick = tuple[int, int]  # index of a shard or record, epoch
Places = list[list[int]]

CHUNK = 64  # records that go from thread to thread together
END = -1  # in place of an offset: the shard has no more
IMAGES, TEXTS = ("jpg", "jpeg", "png", "webp"), ("txt", "json", "cls")
MAX_BYTES = dict.fromkeys(IMAGES, 2**28) | dict.fromkeys(TEXTS, 2**20)  # of a tar's member
TEXT_FEATURES = ("captions", "captions/text", "caption", "text")  # of a TFDS set, the first that it has
CLASS_CAPTION = "a photo of a {}."  # for TFDS sets without text
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's rule: the key ends at the first dot
_PAX = re.compile(rb"^\d+ (path|size)=(.*)$", re.MULTILINE)
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


class Schedule:
    """What one process reads, without end: `schedule[i]` is computed on the spot.

    An epoch is a new permutation of all items, dealt out to the processes in turn: none is left out or read twice.
    Where items do not divide by processes, some have shorter epochs. ValueError if items are fewer than processes.
    """

    def __init__(self, items: int, seed: int, process_index: int = 0, process_count: int = 1):
        if items < process_count:
            raise ValueError(
                f"config.data.train has {items} shards for {process_count} processes, and each needs its own: write "
                "more shards, or use fewer processes"
            )
        self.per_epoch = len(range(process_index, items, process_count))
        self._last, self._seed, self._index, self._count = items - 1, seed, process_index, process_count

    def __getitem__(self, i: int) -> Pick:
        epoch, j = divmod(i, self.per_epoch)
        position = j * self._count + self._index
        seed = int.from_bytes(hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=4).digest())
        return grain.experimental.index_shuffle(position, max_index=self._last, seed=seed, rounds=4), epoch


class WebDataset:
    """Tars as webdataset and img2dataset write them; `pattern` may hold {00..31}, {a,b} and globs.

    A sample is the successive members that share a name up to the first dot: jpg, jpeg, png or webp; txt, or "caption"
    in json; cls, a class number. Its key is SHARD.tar/NAME.
    """

    class_names = None
    at_once = 1  # items that `read` takes

    def __init__(self, pattern: str, data: Data):
        self.paths, self.window, self.interleave = _expand(pattern), data.shuffle_window, data.interleave

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The records of one shard from byte `offset` on, each with the offset after it."""
        ((index, epoch),) = picks
        return read_tar(self.paths[index], epoch, offset)


class Tfds:
    """A split of a TFDS set that is stored as ArrayRecord: NAME/SPLIT. Texts are `TEXT_FEATURES` or `CLASS_CAPTION`."""

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK  # one by one takes several times as long

    def __init__(self, rest: str, data: Data):
        # Slow to import, and not every source needs it.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        name, _, split = rest.rpartition("/")
        if not name:
            raise ValueError("expected tfds:NAME/SPLIT")
        command = f"tfds build {name} --file_format=array_record"
        if re.split("[/:]", name)[0] == "emoji":
            import flip_jax.data.emoji  # noqa: F401  registers the set

            command = "python -m flip_jax.data.emoji"
        try:
            builder = tfds.builder(name, data_dir=data.tfds_dir or None)
            # TFDS takes ten times as long to turn what it has parsed into NumPy arrays as to parse it.
            self._rows = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            self._parse = tf_example_pb2.Example.FromString
            fields = self._parse(self._rows[0]).features.feature
        except (ValueError, NotImplementedError, AssertionError, OSError, LookupError) as error:
            folder, reason = data.tfds_dir or tfds.core.constants.DATA_DIR, str(error).partition("\n")[0]
            raise ValueError(
                f"cannot be read from {folder} (config.data.tfds_dir): {reason} "
                f"Prepare it: `{command} --data_dir={folder}`"
            ) from error
        features = builder.info.features
        label = features["label"] if "label" in features else None
        self.class_names = label.names if isinstance(label, tfds.features.ClassLabel) else None
        self._image = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
        self._text = next((key for key in TEXT_FEATURES if key in fields), None)
        if not self._image or not (self._text or self.class_names):
            raise ValueError(f"needs an image, and {', '.join(TEXT_FEATURES)} or a class label; has {list(features)}")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The picked records."""
        rows = self._rows.__getitems__([index for index, _ in picks])
        for (index, epoch), row in zip(picks, rows, strict=True):
            fields = self._parse(row).features.feature
            key = fields["key"].bytes_list.value[0].decode(errors="replace") if "key" in fields else str(index)
            label = fields["label"].int64_list.value[0] if self.class_names else None
            if self._text:
                texts = [text.decode(errors="replace") for text in fields[self._text].bytes_list.value]
            else:
                texts = [CLASS_CAPTION.format(self.class_names[label].replace("_", " "))]
            image = fields[self._image].bytes_list.value[0]
            yield {"key": key, "epoch": epoch, "image": image, "texts": texts, "label": label}, END


KINDS: dict[str, Callable[[str, Data], Any]] = {"webdataset": WebDataset, "tfds": Tfds}


def open_source(source: str, data: Data, key: str = "source") -> Any:
    """The source that "KIND:REST" names. ValueError, naming the setting `key`, if it is of no kind or not there."""
    kind, _, rest = source.partition(":")
    if kind not in KINDS or not rest:
        raise ValueError(f'{key} must be "KIND:REST" with KIND one of {", ".join(KINDS)}; got {source!r}')
    try:
        return KINDS[kind](rest, data)
    except ValueError as error:
        raise ValueError(f"{key} {source!r}: {error}") from error


def in_order(source: Any, indices: Iterator[int]) -> Iterator[Record]:
    """The records of these items, one item after the other."""
    while picks := [(index, 0) for index in itertools.islice(indices, source.at_once)]:
        yield from (record for record, _ in source.read(picks))


def interleave(source: Any, schedule: Schedule, places: Places) -> Iterator[tuple[Places, list[Record]]]:
    """Chunks of records without end, from several entries of the schedule in turn, each read ahead by a thread.

    A place is [entry, offset in it], and the first is the next to be read; at the start [[0, 0], [1, 0], ...]. Yields
    each chunk with the places after it, from which another call goes on. (Grain's InterleaveIterDataset edits the state
    that it is restored from: what is saved after a first resume leads a second one astray.)
    """

    def open_entry(entry, offset):
        picks = [schedule[i] for i in range(entry * source.at_once, (entry + 1) * source.at_once)]
        return read_ahead(entry, source.read(picks, offset))

    def read_ahead(entry, reader):
        return entry, reader, pool.submit(lambda: list(itertools.islice(reader, CHUNK)))

    newest = max(entry for entry, _ in places)
    with ThreadPoolExecutor(len(places), "flip_jax-read") as pool:
        slots = collections.deque(open_entry(*place) for place in places)
        while True:
            entry, reader, future = slots.popleft()
            chunk = future.result()
            if len(chunk) < CHUNK or chunk[-1][1] == END:
                newest += 1
                places = [*places[1:], [newest, 0]]
                slots.append(open_entry(newest, 0))
            else:
                places = [*places[1:], [entry, chunk[-1][1]]]
                slots.append(read_ahead(entry, reader))
            yield places, [record for record, _ in chunk]


def read_tar(path: str, epoch: int = 0, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """The samples of a tar from byte `offset` on, each with the offset of the next. Nothing is written to disk.

    A tar that is cut short or damaged gives the samples before that place, then one bad record.
    """
    shard, problem = os.path.basename(path), "" if offset else "empty shard"
    try:
        with open(path, "rb", buffering=2**18) as file:
            for name, members in itertools.groupby(_members(file, offset), key=lambda member: member[0]):
                parts, bad, problem = {}, "", ""
                for _, extension, safe, size, end in members:  # noqa: B007  the last `end` is that of the sample
                    if not safe:
                        bad = "unsafe member"
                    elif size > MAX_BYTES.get(extension, size):
                        bad = "too large"
                    elif extension in MAX_BYTES:
                        parts[extension] = file.read(size)
                        if len(parts[extension]) < size:
                            raise EOFError
                yield _record(f"{shard}/{name}", epoch, parts, bad), end
    except EOFError:
        problem = "tar cut short"
    except OSError as error:
        logging.warning("%s: %s", path, error)
        problem = "unreadable shard"
    if problem:
        yield {"key": shard, "epoch": epoch, "bad": problem}, END


def _members(file, offset):
    """(key, extension, whether it is a plain file in the archive, size, offset after it) of each member of a sample.

    The file stands at the member's data. The standard library takes three times as long, as much as to decode a small
    picture. EOFError where the tar ends without its end mark or a header is damaged; OSError if it is no tar.
    """
    extended = {}
    while True:
        file.seek(offset)
        block = file.read(512)
        if block == bytes(512):
            return
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
            raise EOFError if offset or len(block) < 512 else OSError("not a tar file") from None
        offset += 512 if kind in b"123456" else 512 + (size + 511) // 512 * 512
        if kind in b"xL":  # what does not fit in the header of the next member
            body = file.read(min(size, 2**20))
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


def _record(key, epoch, parts, bad):
    """The record that the members of a sample make."""
    image = next((parts[extension] for extension in IMAGES if extension in parts), None)
    text, label = parts.get("txt", b"").decode(errors="replace"), parts.get("cls", b"").strip()
    if "txt" not in parts and "json" in parts:
        try:
            text = json.loads(parts["json"])["caption"].encode(errors="replace").decode()  # without lone surrogates
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # no caption
    if not bad and not image:
        bad = "no image"
    if not bad and label and not re.fullmatch(rb"\d{1,9}", label):
        bad = "class is no number"
    if bad:
        return {"key": key, "epoch": epoch, "bad": bad}
    texts = [text] if text.strip() else []
    return {"key": key, "epoch": epoch, "image": image, "texts": texts, "label": int(label) if label else None}


def _expand(pattern: str) -> list[str]:
    """The paths of a pattern; all of them exist."""
    # One listing a folder: asking for each file takes minutes where a bucket is mounted.
    present = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
    found = [sorted(glob.glob(part)) or [part] if glob.has_magic(part) else [part] for part in _expand_braces(pattern)]
    paths = [path for part in found for path in part]
    missing = [path for path in paths if os.path.basename(path) not in present(os.path.dirname(path) or ".")]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} shards are not there, first {missing[0]!r}; a pattern is local paths with "
            "{00000..00127}, {a,b} or globs"
        )
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, items = match.groups()
    if items is None:
        width = max(len(number) if number[0] == "0" and len(number) > 1 else 0 for number in (first, last))
        items = ",".join(f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    head, tails = pattern[: match.start()], _expand_braces(pattern[match.end() :])
    return [head + item + tail for item in items.split(",") for tail in tails]
