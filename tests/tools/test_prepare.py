"""Shards hold what the source held, evenly and shuffled, and the same bytes after interruptions."""

import io
import itertools
import json
import os
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
from helpers import REPO, png, samples, write_tar
from PIL import Image
from prepared import contents, prepare

from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms
from flip_jax.data.records import END
from flip_jax.runtime import UserError
from flip_jax.tools import __main__, spill, units
from flip_jax.tools import prepare as prepare_tool


@pytest.fixture
def source(tmp_path):
    """Three tars of 15 samples; 3 of the 45 cannot be used."""
    members = [list(samples(1, i)) for i in range(45)]
    members[3][0] = (members[3][0][0], b"no image")
    members[20] = members[20][1:]
    members[21] = members[21][:1]
    members[30] = members[30][::2]  # a class, but no caption
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", itertools.chain(*members[15 * i : 15 * i + 15]))
    return f"webdataset:{tmp_path}/{{0..2}}.tar"


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    monkeypatch.setattr(spill, "HELD", 4000)


def digest(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_usable_record_is_in_one_shard_as_it_was(source, tmp_path):
    done = prepare(source, tmp_path / "out")
    assert (done.read, done.written) == (45, 42)
    assert done.bad.counts == {"image does not decode": 1, "no image": 1, "no text": 1}
    shards = contents(tmp_path / "out")
    everything = {name: data for shard in shards for name, data in shard.items()}
    assert len(everything) == sum(map(len, shards))
    truth = {}
    for i in sorted(set(range(45)) - {3, 20, 21}):
        truth |= {name.replace(f"{i:05}", f"{i:010}"): data for name, data in samples(1, i)}
    del truth["0000000030.txt"]
    assert everything == truth
    assert sorted(len({name[:10] for name in shard}) for shard in shards) == [10, 10, 11, 11]


def test_readers_find_the_same_records(source, tmp_path):
    def records(source):
        source = sources.open_source(source, DataConfig())
        found = sources.in_order(source, iter(range(len(source))))
        return Counter((r["image"], *r["texts"], r["label"]) for r in found if "bad" not in r)

    prepare(source, tmp_path / "out")
    written, read = records(f"webdataset:{tmp_path}/out/*.tar"), records(source)
    assert written.total() == 42 and written <= read


def test_the_order_is_random_and_follows_from_the_seed(tmp_path, as_workers_do):
    write_tar(tmp_path / "0.tar", samples(400))
    orders = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(f"webdataset:{tmp_path}/0.tar", tmp_path / name, shards=4, seed=seed)
        orders[name] = [[int(n[:10]) for n in shard if n.endswith("png")] for shard in contents(tmp_path / name)]
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert orders["a"] != orders["c"]
    for shard in orders["a"]:
        assert len(shard) == 100 and abs(np.corrcoef(shard, range(100))[0, 1]) < 0.3
    # A neighbour is in any shard: in the same one as often as chance has it, a quarter of 399, give or take 4 sigma.
    place = {number: i for i, shard in enumerate(orders["a"]) for number in shard}
    same = sum(place[i] == place[i + 1] for i in range(399))
    assert abs(same - 399 / 4) < 4 * (399 * 3 / 16) ** 0.5


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_and_gives_the_same_bytes(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole")
    truth = digest(tmp_path / "whole")
    points = itertools.count()
    real = {(os, "replace"): os.replace, (prepare_tool, "members"): prepare_tool.members}

    def killable(call, kill_at, late):
        def function(*arguments):
            now = next(points)
            if now == kill_at and not late:
                raise Killed
            result = call(*arguments)
            if now == kill_at:
                raise Killed
            return result

        return function

    kills = resumed = 0
    for (owner, name), late in itertools.product(real, (False, True)):
        for kill_at in range(0, 60, 7 if name == "members" else 1):
            out, points = tmp_path / f"{name}{late}{kill_at}", itertools.count()
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killable(real[owner, name], kill_at, late))
                try:
                    prepare(source, out)
                except Killed:
                    kills += 1
            resumed += any((out / "work").glob("filter-*"))
            done = prepare(source, out)
            assert (done.read, done.written, done.bad.counts.total()) == (45, 42, 3)
            assert digest(out) == truth
            if next(points) <= kill_at:
                break
    assert kills > 20 and resumed > 10


@pytest.fixture
def as_workers_do(monkeypatch):
    """Blocks as large as in other processes, whose settings a test cannot change."""
    monkeypatch.setattr(spill, "HELD", 2**28)


def test_workers_write_the_same(source, tmp_path, as_workers_do):
    prepare(source, tmp_path / "none", dedup=True)
    done = prepare(source, tmp_path / "two", crew=units.Size(2, threads=2), dedup=True)
    assert (done.read, done.written, done.skipped) == (45, 42, {})
    assert digest(tmp_path / "two") == digest(tmp_path / "none")


@pytest.mark.parametrize("last", [("filter", 0), ("write", 1)])
def test_a_killed_process_resumes(source, tmp_path, as_workers_do, last):
    prepare(source, tmp_path / "whole")
    program = (
        "import sys, os, signal; from flip_jax.tools import __main__, units\n"
        "def run(self, todo, done, **rest):\n"
        "    def then(unit, answer):\n"
        "        done(unit, answer)\n"
        f"        if unit == {last} and sys.argv[-1] == '--seed=0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, todo, then, **rest)\n"
        "real, units.Crew.run = units.Crew.run, run\n"
        "sys.exit(__main__.main())"
    )
    command = [sys.executable, "-c", program, "prepare", source, str(tmp_path / "out"), "--shards=4", "--workers=1"]
    assert subprocess.run([*command, "--seed=0"], capture_output=True, cwd=REPO).returncode == -9
    kept = (tmp_path / "out" / "00001.tar") if last[0] == "write" else tmp_path / "out" / "work" / "filter-0000000"
    before = os.stat(kept)
    with open(kept) as held:  # the file of the first pass is removed at the end, but its content cannot change
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
        assert os.fstat(held.fileno()).st_mtime_ns == before.st_mtime_ns
    assert "45 records read: 42 written to 4 shards, 3 bad" in done.stdout and "1 no text" in done.stdout, done.stderr
    assert f"webdataset:{tmp_path}/out/{{00000..00003}}.tar" in done.stdout
    assert digest(tmp_path / "out").keys() == digest(tmp_path / "whole").keys()
    for name, content in digest(tmp_path / "whole").items():
        if name != "prepare.json":  # the command has more settings
            assert (tmp_path / "out" / name).read_bytes() == content


def test_a_full_disk_is_said_and_the_run_resumes(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole")
    add, calls = spill.Writer.add, itertools.count()

    def full(*arguments):
        if next(calls) == 20:
            raise OSError(28, "No space left on device", "a file")
        add(*arguments)

    monkeypatch.setattr(spill.Writer, "add", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "work").iterdir()) == ["filter-0000000"]
    prepare(source, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_larger_images_are_reduced(tmp_path):
    def encoded(size, kind, **options):
        out = io.BytesIO()
        Image.radial_gradient("L").resize(size).convert("RGB").save(out, kind, **options)
        return out.getvalue()

    exif = Image.Exif()
    exif[transforms.ORIENTATION] = 6
    images = {
        "small.jpg": encoded((99, 30), "JPEG"),
        "wide.jpg": encoded((200, 80), "JPEG"),
        "turned.jpg": encoded((200, 80), "JPEG", exif=exif.tobytes()),
        "tall.png": encoded((61, 122), "PNG"),
        "exact.webp": encoded((40, 99), "WEBP"),
        "too_long.png": encoded((65_000, 40), "PNG"),
    }
    names = list(images)
    members = [(f"{i}.{n.split('.')[1]}", images[n]) for i, n in enumerate(names)]
    write_tar(tmp_path / "0.tar", itertools.chain(*((m, (f"{m[0][0]}.txt", b"x")) for m in members)))
    prepare(f"webdataset:{tmp_path}/0.tar", tmp_path / "out", shards=1, shortest_side=40)
    (found,) = contents(tmp_path / "out")
    sizes = {"wide.jpg": (100, 40), "turned.jpg": (40, 100), "tall.png": (40, 80)}
    for i, name in enumerate(names):
        if name not in sizes:
            assert found[f"{i:010}.{name.split('.')[1]}"] == images[name]
            continue
        with Image.open(io.BytesIO(found[f"{i:010}.jpg"])) as image:
            assert image.format == "JPEG" and image.size == sizes[name]
            truth = Image.radial_gradient("L").resize(sizes[name], Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(image.convert("L"), float) - np.asarray(truth)).mean() < 6


def test_captions_and_classes_are_kept(tmp_path, monkeypatch):
    class Toy:
        at_once, class_names = 7, ["owl", "red fox"]

        def __init__(self, rest, data):
            pass

        def __len__(self):
            return 20

        def read(self, picks, offset=0):
            for index, epoch in picks:
                texts, label = [["é", "two"], ["one"], []][index % 3], index % 2 if index % 3 else None
                record = {"key": str(index), "epoch": epoch, "image": png(index), "texts": texts, "label": label}
                yield record, END

    monkeypatch.setitem(sys.modules, "toy", types.SimpleNamespace(Toy=Toy))
    monkeypatch.setitem(sources.KINDS, "toy", "toy:Toy")
    done = prepare("toy:x", tmp_path / "out", shards=3)
    assert done.written == 20
    everything = {name: data for shard in contents(tmp_path / "out") for name, data in shard.items()}
    for i in range(20):
        parts = {name[11:]: data for name, data in everything.items() if int(name[:10]) == i}
        assert parts.pop("png") == png(i)
        if i % 3 == 0:
            assert json.loads(parts.pop("json")) == {"caption": ["é", "two"]}
        else:
            assert parts.pop("cls") == b"%d" % (i % 2)
        assert parts == ({"txt": b"one"} if i % 3 == 1 else {})
    written = sources.open_source(f"webdataset:{tmp_path}/out/*.tar", DataConfig())
    texts = Counter(tuple(record["texts"]) for record in sources.in_order(written, iter(range(3))))
    assert texts == {("é", "two"): 7, ("one",): 7, (): 6} and written.class_names == ["owl", "red fox"]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "owl\nred fox\n"


def test_what_does_not_fit_is_refused(source, tmp_path, capsys):
    with pytest.raises(UserError, match="42 of 45 records can be used, too few for --shards=43: lower it"):
        prepare(source, tmp_path / "many", shards=43)
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="out' was started with seed 0, not seed 1: use another folder"):
        prepare(source, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="is not empty and not from this command"):
        prepare(source, tmp_path)
    os.remove(tmp_path / "out" / "00001.tar")
    with pytest.raises(UserError, match="00001.tar is missing: delete .*out and start again"):
        prepare(source, tmp_path / "out")
    capsys.readouterr()  # the progress bars
    assert __main__.main(["prepare", "webdataset:/nowhere.tar", str(tmp_path / "x"), "--shards=2"]) == 1
    assert capsys.readouterr().err.startswith("error: --source 'webdataset:/nowhere.tar': 1 of 1 shards are")
    assert __main__.main(["prepare", source, "--shards=2"]) == 1
    assert capsys.readouterr().err == "error: OUT is missing: give it as an argument or with --out\n"


def test_a_bug_while_reducing_is_not_a_bad_record(source, tmp_path, monkeypatch):
    def broken(_):
        raise TypeError("a bug")

    monkeypatch.setattr(transforms, "upright_rgb", broken)
    with pytest.raises(TypeError, match="a bug"):
        prepare(source, tmp_path / "out", shortest_side=4)


def test_arguments_that_do_not_fit_are_refused(source, tmp_path, capsys):
    cases = {
        "--min_score=0.3": "--min_score=X and --model=DIR need each other: the model gives the score",
        "--min_caption=9 --max_caption=5": "--min_caption=9 is above --max_caption=5",
        "--min_score=28 --model=x": "--min_score=28 must be a cosine, -1 to 1, such as 0.28",
        "--workers=4": "--workers=4: the source has 3 units of work, shards or 2,000 records of a "
        "source without shards, and a worker does one at a time: use at most --workers=3",
    }
    for words, message in cases.items():
        assert __main__.main(["prepare", source, str(tmp_path / "out"), "--shards=2", *words.split()]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["prepare", source, str(tmp_path / "out"), "--shards=2", "--max_aspect=0.5"])
    assert "argument --max_aspect: must be a number of at least 1, got '0.5'" in capsys.readouterr().err
