"""Any source as evenly filled, shuffled webdataset shards: python -m flip_jax.prepare_data SOURCE OUT --shards=N

For sources with fewer shards than processes, of paths, or in an order that a shuffle window cannot undo. Records that
cannot be used are counted and left out. Pictures are copied as they are; with --shortest_side=PX those that are larger
are reduced and encoded anew. A run that was killed goes on where it was, and writes the same bytes.
"""

import io
import json
import os
import pathlib
import random
import sys
import tarfile
from collections import Counter
from itertools import groupby
from typing import Any

from PIL import Image
from tqdm import tqdm

from flip_jax.config import DataConfig
from flip_jax.data import records, sources, transforms
from flip_jax.tools import inspect

HELD = 2**28  # bytes in memory before they are written out
DECODED = 64  # pixels, of the picture that is made to see whether one can be
QUALITY = 95  # of JPEG


class Preparation:
    """The folder OUT: progress.json, and of each shard a part (its records as they came), then the tar (shuffled).

    Of each N records that follow one another in the source, every one of the N shards gets one, in a random order. So
    shards differ by one record at most, and need neither a count beforehand nor much memory.
    """

    def __init__(self, out: pathlib.Path, settings: dict[str, Any]):
        self.out, self.settings, self.shards = out, settings, settings["shards"]
        self.items = self.read = self.written = 0  # items of the source that are finished; records
        self.bad: Counter = Counter()
        self._saved = [0] * self.shards  # bytes of each part
        self._held = [bytearray() for _ in range(self.shards)]
        self._unsaved = self._in_memory = 0  # bytes
        self._block, self._order = -1, []  # N records, and the shards they go to
        self._file = out / "progress.json"
        if self._file.exists():
            saved = json.loads(self._file.read_text())
            if saved["settings"] != settings:
                raise ValueError(f"OUT {str(out)!r} was begun with {saved['settings']}, not {settings}; use another")
            self.items, self.read, self.written = saved["items"], saved["read"], saved["written"]
            self.bad, self._saved = Counter(saved["bad"]), saved["part_bytes"]
        else:
            out.mkdir(parents=True, exist_ok=True)
            if set(os.listdir(out)) - {"progress.new"}:
                raise ValueError(f"OUT {str(out)!r} is not empty, and was not begun by this tool; use another")
            self._save()

    def deal(self, source: Any, data: DataConfig) -> None:
        """Adds the records of the source, from where progress.json says on, to the parts."""
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
        """Writes all that is held, and that it is there; records after the last finished item must not be held."""
        self._write_out()
        sizes = [part.stat().st_size if (part := self._part(i)).exists() else 0 for i in range(self.shards)]
        counts = {"items": self.items, "read": self.read, "written": self.written, "bad": self.bad}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"settings": self.settings, **counts, "part_bytes": sizes}))
        os.replace(new, self._file)
        self._saved, self._unsaved = sizes, 0

    def finish(self) -> None:
        """Turns each part into a tar, its records in a random order. ValueError if there are too few."""
        if self.written < self.shards:
            raise ValueError(f"{self.written} of {self.read} records can be used, too few for {self.shards} shards")
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
            raise ValueError(f"{part} has lost what was written to it: delete {self.out} and start again")
        return part


def members(record: sources.Record, shortest_side: int | None, data: DataConfig) -> list[tuple[str, bytes]]:
    """The files of a webdataset sample, as (extension, content). BadImage if the record cannot be used."""
    inspect.decode(record, DECODED, data)
    extension, image = reduced(record["image"], shortest_side)
    texts = record["texts"]
    parts = [(extension, image)]
    if len(texts) > 1:
        parts += [("json", json.dumps({"caption": texts}).encode())]
    elif texts:
        parts += [("txt", texts[0].encode(errors="replace"))]
    return parts + ([] if record["label"] is None else [("cls", b"%d" % record["label"])])


def reduced(data: bytes, shortest_side: int | None) -> tuple[str, bytes]:
    """An encoded picture's extension and bytes; if its shorter side is above `shortest_side` pixels, a JPEG of that."""
    image = Image.open(io.BytesIO(data), formats=transforms.FORMATS)
    if not shortest_side or min(image.size) <= shortest_side:
        extension = image.format.lower()  # readers know other formats by their content, whatever they are called
        return extension if extension in records.IMAGES and extension != "jpeg" else "jpg", data
    try:
        image.draft(None, [2 * side * shortest_side // min(image.size) for side in image.size])  # if JPEG, not smaller
        image = Image.fromarray(transforms.upright_rgb(image))
        size = [max(1, round(side * shortest_side / min(image.size))) for side in image.size]
        out = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    except Exception as error:  # as `transforms.decode`; and no JPEG is longer than 65,535 pixels
        raise transforms.BadImage("image cannot be reduced") from error
    return "jpg", out.getvalue()


def shuffle(part: pathlib.Path, path: pathlib.Path, seed: str) -> None:
    """The samples of a tar in a random order as another, without holding more than one."""
    with tarfile.open(part, "r:") as tar, open(part, "rb") as source, open(path, "wb") as target:
        samples = [list(files) for _, files in groupby(tar, key=lambda file: file.name.partition(".")[0])]
        random.Random(seed).shuffle(samples)
        for files in samples:
            source.seek(files[0].offset)
            end = files[-1].offset_data + files[-1].size
            target.write(source.read(end + -end % tarfile.BLOCKSIZE - files[0].offset))
        target.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark


def prepare(source: Any, data: DataConfig, out: pathlib.Path, settings: dict[str, Any]) -> Preparation:
    """Writes, or goes on to write, the shards. ValueError if OUT is of something else, or records are too few."""
    preparation = Preparation(out, settings)
    if preparation.items < len(source):
        preparation.deal(source, data)
    preparation.finish()
    if source.class_names:
        (out / "classnames.txt").write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
    return preparation


def main() -> None:
    parser = inspect.parser("Rewrites a source as evenly filled, shuffled webdataset shards.")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="folder for the shards")
    parser.add_argument("--shards", type=inspect.positive, required=True, metavar="N")
    parser.add_argument("--shortest_side", type=inspect.positive, metavar="PX", help="reduce larger pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("source", "captions", "shards", "shortest_side", "seed")}
    try:
        source, data = inspect.open_source(arguments)
        done = prepare(source, data, arguments.out, settings | {"items": len(source)})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{done.read} records read: {done.written} written to {done.shards} shards, {done.bad.total()} bad")
    for kind, count in done.bad.most_common():
        print(f"  bad: {count} {kind}")
    print(f"webdataset:{arguments.out}/{{00000..{done.shards - 1:05}}}.tar")


if __name__ == "__main__":
    main()
