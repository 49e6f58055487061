"""Rewrite a data set as evenly filled, shuffled webdataset shards.

Use it for data sets with fewer shards than training processes, for lists of paths, for data in an order that a shuffle
window cannot undo, and to remove what training should not see. Images are copied unchanged; with --shortest_side=PX
larger ones are reduced and written as JPEG. Records that cannot be used are counted and skipped, and OUT/removed.html
shows what was not written. After an interruption the same command resumes, and writes the same bytes.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import tarfile
import tempfile
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from flip_jax import lock
from flip_jax.config import DataConfig
from flip_jax.data import records, transforms
from flip_jax.runtime import UserError
from flip_jax.tools import dedup, filters, inspect, options, spill, units
from flip_jax.tools.removed import Examples, page, priority
from flip_jax.tools.source_units import SourceUnits

EXAMPLE = "flip prepare csv:/data/pairs.csv /data/pairs --shards=256 --shortest_side=256"

SETTINGS, WORK, PAGE = "prepare.json", "work", "removed.html"
PLAN = ("before", "blocks")  # of the plan: the number of records read before each unit, and all blocks
DECODED = 64  # pixels of the image that is decoded to see whether training can use it
QUALITY, MAX_SIDE = 95, 65_500  # of a JPEG; libjpeg refuses longer sides


class Preparation(units.Job):
    """The passes over a source, whose units are (name of the pass, number).

    "filter" reads a unit of the source and writes what is kept to a file, in a random order, with images already
    reduced. "find" finds duplicates among a range of hashes, and "keep" joins those of a unit. Then it is known how
    many records each file gives, and "write" gathers a shard from all files. So every record is read, decoded and
    encoded once, and nothing depends on who does what when.
    """

    def __init__(self, source: SourceUnits, data: DataConfig, out: pathlib.Path, settings: dict[str, Any]):
        self.source, self.data, self.out = source, data, out
        self.settings = dict.fromkeys(filters.NAMES) | settings
        self.work, self.shards = out / WORK, settings["shards"]
        self.uses_model = self.settings["min_score"] is not None
        self.sizes: dict[str, Any] = {"write": None}  # what the units of the later passes need to know

    def open(self) -> None:
        """Open the source."""
        self.source.open()

    @functools.cached_property
    def _scorer(self):
        return filters.Scorer(self.settings["model"]) if self.uses_model else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_scorer", "_plan")}

    def name(self, unit: tuple[str, int]) -> str:
        """Say which unit it is."""
        return self.source.describe(unit[1]) if unit[0] == "filter" else f"{unit[0]} {unit[1]}"

    def payload(self, unit: tuple[str, int]) -> Any:
        """Return the rows to filter, or how many units, blocks or groups there are."""
        kind, number = unit
        return self.source.payload(number) if kind == "filter" else self.sizes[kind]

    def do(self, unit: tuple[str, int], payload: Any, watch: units.Watch) -> dict[str, Any]:
        """Do a unit of a pass."""
        kind, number = unit
        return getattr(self, f"_{kind}")(number, payload, watch)

    def path(self, kind: str, number: int) -> pathlib.Path:
        """Return the file that a unit of a pass writes."""
        return self.out / f"{number:05}.tar" if kind == "write" else self.work / f"{kind}-{number:07}"

    def _filter(self, unit, rows, watch):
        bad, removed, read, hashes = Examples(), Examples(), 0, []
        waiting = []  # to be scored together: number, place, files, captions and pixels
        scorer, settings = self._scorer, self.settings
        with spill.Writer(self.path("filter", unit), f"{settings['seed']}/unit {unit}") as writer:

            def pack(record):
                parts, texts = members(record, settings, self.data)
                scored = scorer and texts
                return parts, texts, transforms.decode(record["image"], scorer.size, scorer.data) if scored else None

            def keep(number, place, parts):
                writer.add(number, parts)
                if settings["dedup"]:
                    content = hashlib.blake2b(place.record["image"], digest_size=16).digest()
                    hashes.append((content, number, place.item, place.offset))

            def score():
                watch.rest()
                scores = scorer.best([line[-1] for line in waiting], [line[-2] for line in waiting]) if waiting else []
                for (number, place, parts, *_), found in zip(waiting, scores, strict=True):
                    if found >= settings["min_score"]:
                        keep(number, place, parts)
                    else:
                        kind = f"score below {settings['min_score']:g}"
                        removed.add(kind, priority(unit, number), place.item, place.offset, f"{found:.3f}")
                waiting.clear()

            for number, place, packed in watch(pack, self.source.read(unit, rows)):
                read += 1
                try:
                    parts, texts, pixels = packed.result()
                except transforms.BadImage as error:
                    bad.add(str(error), priority(unit, number), place.item, place.offset)
                except filters.Removed as error:
                    removed.add(str(error), priority(unit, number), place.item, place.offset)
                else:
                    if pixels is not None:
                        waiting.append((number, place, parts, texts, pixels))
                        if len(waiting) == filters.BATCH:
                            score()
                    else:
                        keep(number, place, parts)
            score()
            if settings["dedup"]:
                dedup.write_table(self.path("hashes", unit), hashes, writer.shuffle())
            return writer.finish({"read": read, "bad": bad.plain(), "removed": removed.plain()})

    def _find(self, group, sizes, watch):
        tables = ((unit, self.path("hashes", unit)) for unit in sizes["units"])
        found = dedup.find(tables, group, sizes["groups"], self.path("find", group))
        examples = Examples()
        for unit, number, item, offset in found.T.tolist():
            examples.add("duplicate", priority(unit, number), item, offset)
        return examples.plain()

    def _keep(self, unit, groups, watch):
        with spill.Reader(self.path("filter", unit)) as reader:
            blocks = reader.about()["blocks"]
        return dedup.keep(unit, blocks, [self.path("find", i) for i in range(groups)], self.path("keep", unit))

    @functools.cached_property
    def _plan(self):
        plan = msgpack.unpackb((self.work / "plan").read_bytes(), strict_map_key=False)
        return plan["before"], [spill.Block(*block) for block in plan["blocks"]]

    def _write(self, shard, _, watch):
        before, blocks = self._plan
        numbers, ends = [], [0]
        with tempfile.SpooledTemporaryFile(spill.HELD, dir=self.work) as held:
            for block, some in spill.deal(blocks, self.shards, shard):
                places = dedup.kept(self.path("keep", block.unit), some) if self.settings["dedup"] else some
                with spill.Reader(self.path("filter", block.unit)) as reader:
                    for number, content in reader.records(places):
                        held.write(content)
                        numbers.append(before[block.unit] + number)
                        ends.append(held.tell())
            order = list(range(len(numbers)))
            random.Random(f"{self.settings['seed']}/shard {shard}").shuffle(order)
            path = self.path("write", shard)
            new = spill.temporary(self.work / path.name)
            with open(new, "wb", buffering=2**20) as tar:
                for i in order:
                    held.seek(ends[i])
                    for extension, data in msgpack.unpackb(held.read(ends[i + 1] - ends[i])):
                        info = tarfile.TarInfo(f"{numbers[i]:010}.{extension}")
                        info.size = len(data)
                        tar.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
                tar.write(bytes(2 * tarfile.BLOCKSIZE))  # end-of-archive marker
        stats = spill.temporary(self.work / "stats")
        stats.write_text(json.dumps(statistics(len(numbers)), indent=4))
        os.replace(stats, self.out / f"{shard:05}_stats.json")
        os.replace(new, path)
        return {"read": len(numbers)}


def statistics(written: int) -> dict[str, Any]:
    """Return a shard's statistics in img2dataset's form; its times are 0, as files must not depend on when."""
    failed = {"failed_to_download": 0, "failed_to_resize": 0}
    times = {"duration": 0.0, "start_time": 0.0, "end_time": 0.0}
    return {"count": written, "successes": written, **failed, **times, "status_dict": {"success": written}}


def members(record: records.Record, settings: dict[str, Any], data: DataConfig) -> tuple[spill.Parts, list[str]]:
    """Return a webdataset sample's files as (extension, content), and its captions.

    Raises:
      BadImage: training cannot use the record.
      Removed: a filter removes it.
    """
    if "bad" in record:
        raise transforms.BadImage(record["bad"])
    if not record["texts"] and record["label"] is None:
        raise transforms.BadImage("no text")
    texts = filters.texts(record["texts"], settings)
    extension, image = reduced(record["image"], settings, data)
    parts = [(extension, image)]
    if len(texts) > 1:
        parts += [("json", json.dumps({"caption": texts}).encode())]
    elif texts:
        parts += [("txt", texts[0].encode(errors="replace"))]
    return parts + ([] if record["label"] is None else [("cls", b"%d" % record["label"])]), texts


def reduced(data: bytes, settings: dict[str, Any], config: DataConfig) -> tuple[str, bytes]:
    """Return an image's extension and bytes, as a smaller JPEG if its shorter side is above `shortest_side`."""
    shortest_side = settings["shortest_side"]
    image = transforms.open_image(data, config)
    filters.check_size(*image.size, settings)
    if not shortest_side or min(image.size) <= shortest_side:
        transforms.decode(data, DECODED, config)
        # Readers recognise other formats by their content, whatever the extension says.
        extension = image.format.lower()
        return extension if extension in records.IMAGES and extension != "jpeg" else "jpg", data
    # A JPEG decodes to a half, quarter or eighth for less; twice the target size is enough.
    image.draft(None, [2 * side * shortest_side // min(image.size) for side in image.size])
    image = Image.fromarray(transforms.upright_rgb(image))
    size = [max(1, round(side * shortest_side / min(image.size))) for side in image.size]
    if max(size) > MAX_SIDE:
        raise transforms.BadImage("image cannot be reduced")
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return "jpg", out.getvalue()


class Done:
    """What a preparation read and wrote."""

    def __init__(self, shards: int, read: int, written: int, bad: Any, removed: Any, skipped: dict[str, str], **_: Any):
        self.shards, self.read, self.written, self.skipped = shards, read, written, skipped
        self.bad, self.removed = Examples(**bad), Examples(**removed)


def prepare(
    source: SourceUnits, data: DataConfig, out: pathlib.Path, settings: dict[str, Any], crew: units.Size = units.HERE
) -> Done:
    """Write the shards, or resume writing them; without workers in this process.

    Raises:
      UserError: `out` holds something else, or there are fewer usable records than shards.
    """
    job = Preparation(source, data, out, settings | {"items": source.items})
    done = _start(job)
    if not done:
        with units.Crew(job, crew, marks=job.work) as workers:
            done = _plan(job, workers)
            present = set(os.listdir(out))
            todo = [("write", i) for i in range(job.shards) if job.path("write", i).name not in present]
            if failed := workers.run(todo, lambda *_: None, says="write"):
                raise UserError(
                    f"{len(failed)} shards could not be written, {next(iter(failed.values()))}: run it again"
                )
        if source.source.class_names:
            names = "".join(f"{name}\n" for name in source.source.class_names)
            (out / "classnames.txt").write_text(names, encoding="utf-8")
        groups = {"bad": Examples(**done["bad"]), "removed": Examples(**done["removed"])}
        (out / PAGE).write_text(page(source, data, done["read"], done["written"], groups), encoding="utf-8")
        _save(job, done)
    present = set(os.listdir(out))
    if missing := [path for i in range(job.shards) if (path := job.path("write", i)).name not in present]:
        raise UserError(f"{missing[0]} is missing: delete {out} and start again")
    shutil.rmtree(job.work, ignore_errors=True)
    return Done(job.shards, **done)


def _start(job):
    """Make the folder, or return what an earlier run that is complete has done."""
    out, file = job.out, job.out / SETTINGS
    if not file.exists():
        options.make_folder("--out", out)
        if any(name != lock.NAME and not name.startswith(f"new-{SETTINGS}") for name in os.listdir(out)):
            raise UserError(f"--out {str(out)!r} is not empty and not from this command: use another folder")
        _save(job, None)
    saved = json.loads(file.read_text())
    earlier = saved["settings"]
    if changed := [name for name in job.settings if earlier.get(name) != job.settings[name]]:
        if not saved["done"] and not any(job.work.glob("filter-*")):
            _save(job, None)  # of a run that was refused or stopped before it had done anything
        else:
            parts = (", ".join(f"{name} {part.get(name)!r}" for name in changed) for part in (earlier, job.settings))
            raise UserError(f"--out {str(out)!r} was started with {', not '.join(parts)}: use another folder")
    job.work.mkdir(exist_ok=True)
    for stale in job.work.glob("new-*"):  # of workers that were killed
        stale.unlink()
    return saved["done"]


def _save(job, done):
    new = spill.temporary(job.out / SETTINGS)
    new.write_text(json.dumps({"settings": job.settings, "done": done}, indent=1) + "\n")
    os.replace(new, job.out / SETTINGS)


def _plan(job, crew):
    """Do all passes before the shards are written, or what is missing of them; return what they found."""
    file = job.work / "plan"
    if file.exists():
        return {k: v for k, v in msgpack.unpackb(file.read_bytes(), strict_map_key=False).items() if k not in PLAN}
    count = len(job.source)
    reads, blocks, bad, removed = [0] * count, {}, Examples(), Examples()

    def filtered(unit, about):
        number = unit[1]
        if not job.path("filter", number).exists():
            raise UserError(f"--out {str(job.out)!r} must be a folder that all nodes share")
        reads[number], blocks[number] = about["read"], about["blocks"]
        bad.merge(**about["bad"])
        removed.merge(**about["removed"])

    present, todo = set(os.listdir(job.work)), []
    for unit in range(count):
        if (path := job.path("filter", unit)).name in present:
            with spill.Reader(path) as reader:
                filtered(("filter", unit), reader.about())
        else:
            todo.append(("filter", unit))
    if len(todo) < count:
        print(f"{job.out} already holds {count - len(todo)} of {count} units of work")
    skipped = {job.name(unit): cause for unit, cause in crew.run(todo, filtered, says="read").items()}
    if job.settings["dedup"]:
        _find_duplicates(job, crew, blocks, removed)
    written = sum(map(sum, blocks.values()))
    if written < job.shards:
        raise UserError(f"{written} of {sum(reads)} records can be used, too few for --shards={job.shards}: lower it")
    plan = []
    for unit in sorted(blocks):
        first = 0
        for size in blocks[unit]:
            plan.append(spill.Block(unit, first, size))
            first += size
    done = {"read": sum(reads), "written": written, "bad": bad.plain(), "removed": removed.plain(), "skipped": skipped}
    before = np.cumsum([0, *reads])[:-1].tolist()
    new = spill.temporary(file)
    new.write_bytes(msgpack.packb(done | {"before": before, "blocks": plan}))
    os.replace(new, file)
    return done


def _find_duplicates(job, crew, blocks, removed):
    """Do the passes that find duplicates; `blocks` then has the numbers of records that are kept."""
    records = sum(map(sum, blocks.values()))
    groups = dedup.groups(records)
    job.sizes |= {"find": {"units": sorted(blocks), "groups": groups}, "keep": groups}
    found = lambda _, answer: removed.merge(**answer)  # noqa: E731
    kept = lambda unit, answer: blocks.__setitem__(unit[1], answer["blocks"])  # noqa: E731
    passes = [("find", range(groups), found), ("keep", sorted(blocks), kept)]
    for kind, numbers, done in passes:
        if failed := crew.run([(kind, i) for i in numbers], done, says=kind, counted=" units"):
            raise UserError(f"duplicates could not be found, {next(iter(failed.values()))}: run it again")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip prepare`."""
    options.add_source(parser, out=True)
    parser.add_argument("--shards", type=options.positive, required=True, metavar="N", help="number of shards")
    parser.add_argument("--shortest_side", type=options.positive, metavar="PX", help="reduce larger images to this")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    inspect.add_reading(parser)
    filters.add_arguments(parser)
    units.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Run `flip prepare`."""
    options.require(arguments, "source", "out")
    filters.check(arguments)
    names = ("source", "captions", "image", "shards", "shortest_side", "seed", *filters.NAMES)
    settings = {name: getattr(arguments, name) for name in names}
    source, data = inspect.open_source(arguments)
    cut, out = SourceUnits(arguments.source, source, data), pathlib.Path(arguments.out)
    crew = units.size(arguments, len(cut))
    with lock.hold(out / lock.NAME, f"--out {str(out)!r}"):
        done = prepare(cut, data, out, settings, crew)
    counts = f"{done.written} written to {done.shards} shards, {done.bad.counts.total()} bad"
    removed = f", {done.removed.counts.total()} removed" if done.removed.counts else ""
    print(f"{done.read} records read: {counts}{removed}")
    for name, examples in (("bad", done.bad), ("removed", done.removed)):
        for kind, count in examples.most_common():
            print(f"  {name}: {count} {kind}")
    for name, cause in done.skipped.items():
        print(f"  skipped: {name}: it ends its worker ({cause})")
    print(f"what was not written: {out / PAGE}\nwebdataset:{arguments.out}/{{00000..{done.shards - 1:05}}}.tar")
