"""A thousand damaged shards of each format: no crash, no hang, nothing lost in silence, no harm to other records."""

import asyncio
import collections
import dataclasses
import functools
import io
import itertools
import json
import random
import struct
import subprocess
import sys
import tarfile

import google_crc32c
import helpers
import hostile
import numpy as np
import pyarrow
import pytest
from aiohttp.test_utils import TestClient, TestServer
from helpers import REPO
from PIL import Image
from pyarrow import parquet
from tensorflow_datasets.proto import tf_example_pb2

from flip_jax.config import Config, DataConfig, ImageConfig, ModelConfig, TextConfig
from flip_jax.data import pipeline, sources, vocabulary
from flip_jax.data import shards as shard_files
from flip_jax.data.samples import make_target, prepare
from flip_jax.tools import demo_server

SIZE, LENGTH, SAMPLES = 8, 6, 4
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}
TOKENIZER = vocabulary.train([f"picture {i}" for i in range(9)], 100)
CONFIG = Config(
    seed=5,
    global_batch_size=8,
    model=ModelConfig(
        image=ImageConfig(image_size=SIZE, patch_size=SIZE), text=TextConfig(vocab_size=100, context_length=LENGTH)
    ),
    # A header can be made to claim any size.
    data=DataConfig(max_image_pixels=10**6, max_bad_fraction=1.0, shuffle_window=1, interleave=1, threads=2),
)


def flip_bits(data, rng):
    data, places = bytearray(data), [rng.randrange(len(data)) for _ in range(rng.randint(1, 8))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data), min(places)


def truncate(data, rng):
    place = rng.randrange(len(data))
    return data[:place], place


def insert(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.choice((1, 7, 64, 512))) + data[place:], place


def remove(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice((1, 7, 64, 512)) :], place


def overwrite(data, rng):
    place, length = rng.randrange(len(data)), rng.choice((1, 7, 64, 512))
    filling = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return (data[:place] + filling)[: len(data)] + data[place + length :], place


def swap(data, rng):
    length = rng.randint(1, max(1, len(data) // 8))
    one, other = sorted(rng.randrange(len(data)) for _ in range(2))
    other = max(other, one + length)
    between = data[one + length : other]
    return data[:one] + data[other : other + length] + between + data[one : one + length] + data[other + length :], one


MUTATIONS = (flip_bits, truncate, insert, remove, overwrite, swap)


@functools.cache
def picture(number, extension):
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((20, 16), Image.Resampling.BILINEAR).save(out, FORMATS[extension])
    return out.getvalue()


def write_tar(samples):
    """Makes the bytes of a tar of (extension, image, column, caption), and the offset by which each is complete."""
    out, ends = io.BytesIO(), []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (extension, image, column, text) in enumerate(samples):
            text = text if column == "txt" else b'{"caption": "' + text + b'"}'
            for name, data in ((extension, image), (column, text)):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            ends.append(out.tell() + 512)  # that a sample has no more members shows at the header after it
    return out.getvalue()[: ends[-1] + 512], ends


def write_tfrecord(samples):
    """Makes a TFRecord file as `write_tar` does a tar."""
    out, ends = b"", []
    for i, (extension, image, _, text) in enumerate(samples):
        example = tf_example_pb2.Example()
        for name, value in ((extension, image), ("caption", text), ("key", b"%d" % i)):
            example.features.feature[name].bytes_list.value.append(value)
        data = example.SerializeToString(deterministic=True)
        for part in (struct.pack("<Q", len(data)), data):
            crc = google_crc32c.value(part)
            out += part + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        ends.append(len(out))
    return out, ends


def write_parquet(samples):
    """Makes a Parquet file; no sample is safe from damage, as the index is at the end of the file."""
    columns = {"key": [str(i) for i in range(len(samples))], "jpg": [image for _, image, *_ in samples]}
    columns["caption"] = [text.decode(errors="replace") for *_, text in samples]
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out, row_group_size=2)
    return out.getvalue(), [2**30] * len(samples)


WRITERS = {"webdataset": write_tar, "tfrecord": write_tfrecord, "parquet": write_parquet}


def whole(extension):
    return [(extension, picture(i, extension), "txt", b"picture %d" % i) for i in range(SAMPLES)]


def damaged_shards(kind):
    """Yields (bytes, number of records or None if uncertain, untouched samples) of each case."""
    write = WRITERS[kind]
    for seed, extension, mutate in itertools.product(range(30), FORMATS, MUTATIONS):
        rng, samples = random.Random(f"picture {seed} {extension} {mutate.__name__}"), whole(extension)
        samples[1] = (extension, mutate(samples[1][1], rng)[0], "txt", samples[1][3])
        yield write(samples)[0], SAMPLES, (0, 2, 3)
    for seed, column, mutate in itertools.product(range(15), ("txt", "json"), MUTATIONS):
        rng, samples = random.Random(f"caption {seed} {column} {mutate.__name__}"), whole("png")
        text = "pictures: 画像 \U0001f600 &amp; ünder\0".encode() * 5
        samples[2] = ("png", samples[2][1], column, mutate(text, rng)[0])
        yield write(samples)[0], SAMPLES, (0, 1, 3)
    for seed, extension, mutate in itertools.product(range(40), ("jpg", "png"), MUTATIONS):
        rng, (data, ends) = random.Random(f"shard {seed} {extension} {mutate.__name__}"), write(whole(extension))
        data, place = mutate(data, rng)
        if kind == "webdataset" and rng.random() < 0.5:  # headers, which are few of the bytes
            header = rng.randrange(SAMPLES) * (ends[0] - 512)
            data = data[:header] + mutate(data[header : header + 512] or b"0", rng)[0] + data[header + 512 :]
            place = min(place, header)
        yield data, None, [i for i, end in enumerate(ends) if end <= place]


@pytest.fixture(scope="module", params=WRITERS)
def prepared(request, tmp_path_factory):
    """Writes the shards; returns their pattern, and each case with its records and the samples made of them."""
    folder, found = tmp_path_factory.mktemp(request.param), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_files, "RETRY_AFTER", ())
        for number, (data, count, untouched) in enumerate(damaged_shards(request.param)):
            (folder / f"{number:05}.x").write_bytes(data)
            source = sources.open_source(f"{request.param}:{folder}/{number:05}.x", CONFIG.data)
            records = list(itertools.islice(sources.in_order(source, iter(range(1))), 100))
            assert len(records) < 100
            samples = prepare(records, CONFIG, make_target(CONFIG, TOKENIZER))
            found.append((records, samples, count, untouched))
        yield f"{request.param}:{folder}/*.x", found


def test_each_damaged_record_is_used_or_counted_and_the_others_are_as_they_were(prepared):
    _, cases = prepared
    assert len(cases) > 1000
    bad = 0
    for records, samples, count, untouched in cases:
        assert len(samples) == len(records) and (count is None or len(records) == count)
        for sample in samples:
            if isinstance(sample, str):
                bad += 1
                continue
            image, tokens = sample
            assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
            assert tokens.shape == (LENGTH,) and tokens.dtype == np.int32
        by_key = {record["key"].rpartition("/")[2]: i for i, record in enumerate(records)}
        for i in untouched:
            record, sample = records[by_key[str(i)]], samples[by_key[str(i)]]
            assert record["image"] in {picture(i, extension) for extension in FORMATS}
            assert record["texts"] == [f"picture {i}"] and not isinstance(sample, str)
            np.testing.assert_array_equal(sample[1], TOKENIZER([f"picture {i}"], LENGTH)[0])
    assert bad > 200  # or little was damaged


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_counts_all_that_it_reads(prepared, workers, tmp_path, monkeypatch):
    pattern, cases = prepared
    # Workers get no patched modules; this one Python imports at its start.
    (tmp_path / "sitecustomize.py").write_text("from flip_jax.data import shards\nshards.RETRY_AFTER = ()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, train=pattern, workers=workers))
    usable = sorted(
        record["key"]
        for records, samples, *_ in cases
        for record, sample in zip(records, samples, strict=True)
        if not isinstance(sample, str)
    )
    keys = []
    for batch in pipeline.train_dataset(config, TOKENIZER, process_index=0, process_count=1):
        keys += batch["keys"]
        counts = batch["counts"]
        assert counts["used"] == len(keys) and counts["read"] == len(keys) + sum(counts["bad"].values())
        if len(keys) >= len(usable):
            break
    assert sorted(keys[: len(usable)]) == usable
    assert counts["read"] >= sum(len(records) for records, *_ in cases) - 100


# Small files that would take gigabytes or hours. They are read in a process of their own, which tells its peak of
# memory; sizes are as small as the mechanism allows, because the bounds do not depend on them.

READ = """
import json, pathlib, random, re, sys, time
from flip_jax.config import DataConfig
from flip_jax.data import shards, sources, transforms
shards.RETRY_AFTER = ()
data = DataConfig(captions=("caption", "txt"))
for name in sys.argv[1:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    start, found, source = time.process_time(), {}, sources.open_source(name, data)
    for record in sources.in_order(source, iter(range(len(source)))):
        kind = record.get("bad", "")
        try:
            if not kind:
                transforms.decode(record["image"], 32, data, random.Random(0))
        except transforms.BadImage as error:
            kind = str(error)
        found[record["key"].rpartition("/")[2]] = kind
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps([found, peak, time.process_time() - start]))
"""
PEAK = 2**30  # bytes; half of what a loader may take
SECONDS = 10  # of processor time for a file; each took minutes, or memory for minutes


def read_apart(*names):
    """{source: {key: kind, "" if usable}} of sources read in a process of their own, within `PEAK` and `SECONDS`."""
    done = subprocess.run([sys.executable, "-c", READ, *names], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        kinds, peak, seconds = json.loads(line)
        assert peak < PEAK and seconds < SECONDS, (name, kinds, peak, seconds)
        found[name] = kinds
    return found


def test_hostile_images_cost_neither_time_nor_memory(tmp_path):
    images = hostile.images()
    members = [
        (f"{name}.{part}", data)
        for name, (image, _) in images.items()
        for part, data in (("jpg", image), ("txt", b"a"))
    ]
    source = "webdataset:" + helpers.write_tar(tmp_path / "images.tar", members)
    assert read_apart(source)[source] == {name: kind for name, (_, kind) in images.items()}


def test_hostile_tables_cost_neither_time_nor_memory(tmp_path):
    cases = dict(hostile.tables(tmp_path))
    found = read_apart(*cases)
    assert {name: {*kinds.values()} for name, kinds in found.items()} == cases


def test_tars_of_holes_and_sparse_members_are_refused_before_they_are_read(tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512  # of 8 GB
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, 512), b"\x80" + (2**33).to_bytes(11)
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "sparse.tar").write_bytes(header + bytes(512 + 1024))
    pax = tarfile.TarInfo("b.jpg")
    for name, size in (("pax", 2**60), ("digits", 10**5000), ("negative", -1)):
        pax.pax_headers = {"size": f"{size}" if size < 2**63 else "9" * 5000}
        (tmp_path / f"{name}.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    found = read_apart(
        hostile.tar_of_holes(tmp_path / "holes.tar", [250 * 2**20] * 26),
        *(f"webdataset:{tmp_path}/{name}.tar" for name in ("sparse", "pax", "digits", "negative")),
    )
    holes, *others = [[*kinds.values()] for kinds in found.values()]
    assert holes == ["too large"] * 26
    assert others == [["unsafe member"], *[["shard damaged"]] * 3]


LOAD = """
import pathlib, re, sys
from flip_jax.config import Config, DataConfig
from flip_jax.data import pipeline
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError
data = DataConfig(train=sys.argv[1], threads=2, shuffle_window=2000, max_bad_fraction=1.0)
batches = pipeline.train_dataset(
    Config(global_batch_size=8, data=data),
    Tokenizer({"[PAD]": 0, "[UNK]": 1}), process_index=0, process_count=1)
try:
    next(iter(batches))
except UserError as error:
    print(error)
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def test_a_loader_of_nothing_but_large_records_holds_few_of_them(tmp_path):
    """The window of 2,000 records would take 60 GB, and the chunk of 64 that is read ahead 2 GB."""
    source = hostile.tar_of_holes(tmp_path / "0.tar", [30 * 2**20] * 120)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, source], cwd=REPO, env=helpers.environment(), capture_output=True
    )
    reason, peak = done.stdout.decode().splitlines()
    assert "200 of 200" in reason or "cannot be used" in reason, done.stderr[-2000:]
    assert 2**28 < int(peak) * 1024 < 2**30  # and the window was full


class Page:
    """Answers every question of the page with what it was asked."""

    def about(self):
        return {"template": "{}", "mask": "random", "mask_ratio": 0.5}

    def content(self, key):
        return key.encode()

    def classify(self, content, *arguments):
        return [content.hex(), *arguments[:-1]]

    def mask(self, content, *arguments):
        return [content.hex(), *arguments[:-1]]

    def search(self, text, left):
        return [text]


@pytest.mark.filterwarnings("ignore::aiohttp.multipart.BadContentDispositionHeader")
def test_damaged_forms_are_answered_or_refused():
    fields = (b'name="image"; filename="a.png"', b'name="names"', b'name="text"', b'name="ratio"', b'name="seed"')
    types = (b"image/png", b"text/plain", b"text/plain; charset=punycode", b"text/plain", b"multipart/mixed")
    head = b"--x\r\nContent-Disposition: form-data; %s\r\nContent-Type: %s\r\nContent-Encoding: gzip\r\n\r\n%d\r\n"
    body = (
        b"".join(head % (field, kind, i) for i, (field, kind) in enumerate(zip(fields, types, strict=True))) + b"--x--"
    )
    forms = [(body[: body.index(b"multipart") - 16] + b"\r\n5\r\n--x--", "multipart/form-data; boundary=x")]
    for seed, mutate in itertools.product(range(60), MUTATIONS):
        rng = random.Random(f"form {seed} {mutate.__name__}")
        form, declared = mutate(body, rng)[0], "multipart/form-data; boundary=x"
        if rng.random() < 0.3:
            declared = mutate(declared.encode(), rng)[0].decode("latin-1")
            declared = "".join(character for character in declared if character.isprintable() and character.isascii())
        forms.append((form, rng.choice((declared, "application/x-www-form-urlencoded; charset=punycode"))))

    origins = itertools.cycle(("", "", "", "null"))

    async def ask():
        statuses = collections.Counter()
        async with TestClient(TestServer(demo_server.make_app(Page()))) as client:
            for (form, declared), path in zip(forms, itertools.cycle(("/classify", "/mask", "/search"))):
                headers = {"Content-Type": declared, "Origin": next(origins)}
                async with client.post(path, data=form, headers={k: v for k, v in headers.items() if v}) as response:
                    assert response.content_type == "application/json", (form, declared)
                    statuses[response.status] += 1
        return statuses

    statuses = asyncio.run(ask())
    assert statuses.keys() <= {200, 400, 403} and statuses[400] > 50, statuses
