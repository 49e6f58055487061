"""Rewrite a data set as evenly filled, shuffled webdataset shards.

Use it for data sets with fewer shards than training processes, for lists of paths, and for data in an order that a
shuffle window cannot undo. Records that cannot be used are counted and skipped. Images are copied unchanged; with
--shortest_side=PX larger ones are reduced and written as JPEG. After an interruption the same command resumes, and
writes the same bytes.
"""

import argparse
import io
import json
import os
import pathlib
import random
import tarfile
from collections import Counter
from itertools import groupby
from typing import Any

from PIL import Image
from tqdm import tqdm

from flip_jax import lock
from flip_jax.config import DataConfig
from flip_jax.data import records, transforms
from flip_jax.runtime import UserError
from flip_jax.tools import inspect, options

EXAMPLE = "flip prepare csv:/data/pairs.csv /data/pairs --shards=256 --shortest_side=256"

HELD = 2**28  # bytes held in memory before they are written
DECODED = 64  # pixels of the image that is decoded to see whether training can use it
QUALITY, MAX_SIDE = 95, 65_500  # of a JPEG; libjpeg refuses longer sides


class Preparation:
    """The folder OUT: progress.json, and for each shard a part (records in source order), then the tar (shuffled).

    Each block of N consecutive records gives one record to each of the N shards, in a random order. So shard sizes
    differ by at most one record, without counting the records first and without holding many in memory.
    """

    def __init__(self, out: pathlib.Path, settings: dict[str, Any]):
        self.out, self.settings, self.shards = out, settings, settings["shards"]
        self.items = self.read = self.written = 0  # finished items of the source; records
        self.bad: Counter[str] = Counter()
        self._saved = [0] * self.shards  # bytes of each part
        self._held = [bytearray() for _ in range(self.shards)]
        self._unsaved = self._in_memory = 0  # bytes
        self._block, self._order = -1, []  # the current N records, and the shards they go to
        self._file = out / "progress.json"
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            earlier = saved["settings"]
            if changed := [name for name in settings if earlier.get(name) != settings[name]]:
                then, now = (
                    ", ".join(f"{name} {part.get(name)!r}" for name in changed) for part in (earlier, settings)
                )
                raise UserError(f"--out {str(out)!r} was started with {then}, not {now}: use another folder")
            self.items, self.read, self.written = saved["items"], saved["read"], saved["written"]
            self.bad, self._saved = Counter(saved["bad"]), saved["part_bytes"]
        else:
            options.make_folder("--out", out)
            if set(os.listdir(out)) - {"progress.new", lock.NAME}:
                raise UserError(f"--out {str(out)!r} is not empty and not from this command: use another folder")
            self._save()

    def deal(self, source: Any, data: DataConfig) -> None:
        """Append the records of the source to the parts, from where progress.json stopped."""
        for shard, size in enumerate(self._saved):
            if size:
                os.truncate(self._part(shard, at_least=size), size)
            else:
                self._part(shard).unlink(missing_ok=True)

        def pack(record):
            try:
                return members(record, self.settings["shortest_side"], data)
            except transforms.BadImage as error:
                return str(error)

        for item, packed in inspect.each(source, pack, self.items, self.read):
            if item > self.items:
                self.items = item
                if self._unsaved >= HELD:
                    self._save()
            self._add(packed)
            if self._in_memory >= HELD:
                self._write_out()
        self.items = len(source)
        self._save()

    def _add(self, packed):
        self.read += 1
        if isinstance(packed, str):
            self.bad[packed] += 1
            return
        block, place = divmod(self.written, self.shards)
        if block != self._block:
            self._block, self._order = block, list(range(self.shards))
            random.Random(f"{self.settings['seed']}/block {block}").shuffle(self._order)
        for extension, data in packed:
            info = tarfile.TarInfo(f"{self.read - 1:010}.{extension}")
            info.size = len(data)
            padded = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
            self._held[self._order[place]] += padded
            self._in_memory += len(padded)
            self._unsaved += len(padded)
        self.written += 1

    def _write_out(self):
        for shard, data in enumerate(self._held):
            if data:
                with open(self._part(shard), "ab") as file:
                    file.write(data)
                data.clear()
        self._in_memory = 0

    def _save(self):
        """Write what is held, then record it in progress.json.

        No record of an unfinished item may be held: progress.json counts whole items only.
        """
        self._write_out()
        sizes = [part.stat().st_size if (part := self._part(i)).exists() else 0 for i in range(self.shards)]
        counts = {"items": self.items, "read": self.read, "written": self.written, "bad": self.bad}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"settings": self.settings, **counts, "part_bytes": sizes}))
        os.replace(new, self._file)
        self._saved, self._unsaved = sizes, 0

    def finish(self) -> None:
        """Turn each part into a tar, its records in a random order; UserError if there are too few records."""
        if self.written < self.shards:
            raise UserError(
                f"{self.written} of {self.read} records can be used, too few for --shards={self.shards}: lower it"
            )
        for shard in tqdm(range(self.shards), unit=" shards", mininterval=1):
            tar = self.out / f"{shard:05}.tar"
            if not tar.exists():
                part = self._part(shard, at_least=self._saved[shard])
                shuffle(part, tar.with_suffix(".new"), f"{self.settings['seed']}/shard {shard}")
                os.replace(tar.with_suffix(".new"), tar)
            self._part(shard).unlink(missing_ok=True)

    def _part(self, shard, at_least=0):
        part = self.out / f"{shard:05}.part"
        if at_least and (not part.exists() or part.stat().st_size < at_least):
            raise UserError(f"{part} is shorter than progress.json says: delete {self.out} and start again")
        return part


def members(record: records.Record, shortest_side: int | None, data: DataConfig) -> list[tuple[str, bytes]]:
    """Return a webdataset sample's files as (extension, content); BadImage if training cannot use the record."""
    inspect.decode(record, DECODED, data)
    extension, image = reduced(record["image"], shortest_side, data)
    texts = record["texts"]
    parts = [(extension, image)]
    if len(texts) > 1:
        parts += [("json", json.dumps({"caption": texts}).encode())]
    elif texts:
        parts += [("txt", texts[0].encode(errors="replace"))]
    return parts + ([] if record["label"] is None else [("cls", b"%d" % record["label"])])


def reduced(data: bytes, shortest_side: int | None, settings: DataConfig) -> tuple[str, bytes]:
    """Return an encoded image's extension and bytes, as a smaller JPEG if its shorter side is above `shortest_side`."""
    image = transforms.open_image(data, settings)
    if not shortest_side or min(image.size) <= shortest_side:
        # Readers recognise other formats by their content, whatever the extension says.
        extension = image.format.lower()
        return extension if extension in records.IMAGES and extension != "jpeg" else "jpg", data
    # A JPEG decodes to a half, quarter or eighth for less; twice the target size is enough.
    image.draft(None, [2 * side * shortest_side // min(image.size) for side in image.size])
    try:
        image.load()
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise transforms.BadImage("image cannot be reduced") from error
    image = Image.fromarray(transforms.upright_rgb(image))
    size = [max(1, round(side * shortest_side / min(image.size))) for side in image.size]
    if max(size) > MAX_SIDE:
        raise transforms.BadImage("image cannot be reduced")
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return "jpg", out.getvalue()


def shuffle(part: pathlib.Path, path: pathlib.Path, seed: str) -> None:
    """Copy a tar with its samples in a random order, holding one sample at a time."""
    with tarfile.open(part, "r:") as tar, open(part, "rb") as source, open(path, "wb") as target:
        samples = [list(files) for _, files in groupby(tar, key=lambda file: file.name.partition(".")[0])]
        random.Random(seed).shuffle(samples)
        for files in samples:
            source.seek(files[0].offset)
            end = files[-1].offset_data + files[-1].size
            target.write(source.read(end + -end % tarfile.BLOCKSIZE - files[0].offset))
        target.write(bytes(2 * tarfile.BLOCKSIZE))  # end-of-archive marker


def prepare(source: Any, data: DataConfig, out: pathlib.Path, settings: dict[str, Any]) -> Preparation:
    """Write the shards, or resume writing them.

    Raises:
      UserError: `out` holds something else, or there are fewer usable records than shards.
    """
    preparation = Preparation(out, settings)
    if preparation.items < len(source):
        preparation.deal(source, data)
    preparation.finish()
    if source.class_names:
        (out / "classnames.txt").write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
    return preparation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip prepare`."""
    options.add_source(parser, out=True)
    parser.add_argument("--shards", type=options.positive, required=True, metavar="N", help="number of shards")
    parser.add_argument("--shortest_side", type=options.positive, metavar="PX", help="reduce larger images to this")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    inspect.add_reading(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run `flip prepare`."""
    options.require(arguments, "source", "out")
    settings = {name: getattr(arguments, name) for name in ("source", "captions", "shards", "shortest_side", "seed")}
    source, data = inspect.open_source(arguments)
    out = pathlib.Path(arguments.out)
    with lock.hold(out / lock.NAME, f"--out {str(out)!r}"):
        done = prepare(source, data, out, settings | {"items": len(source)})
    print(f"{done.read} records read: {done.written} written to {done.shards} shards, {done.bad.total()} bad")
    for kind, count in done.bad.most_common():
        print(f"  bad: {count} {kind}")
    print(f"webdataset:{arguments.out}/{{00000..{done.shards - 1:05}}}.tar")
