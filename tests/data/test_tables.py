"""CSV and Parquet as others write them; random layouts against an independent reading by csv, pyarrow and tarfile."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile

import pyarrow
import pytest
from helpers import png, records, write_tar
from pyarrow import parquet

from flip_jax.config import Config, DataConfig, EvalConfig
from flip_jax.data import eval_batches, paths, pipeline, sources
from flip_jax.data import shards as shard_files
from flip_jax.runtime import UserError

PAIRS = [("a.png", "one"), ("b.png", 'two, "quoted"'), ("c d.png", "drei ä\nzweite Zeile")]


@pytest.fixture
def folder(tmp_path):
    for i, (name, _) in enumerate(PAIRS):
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


def written(separator=",", header=("filepath", "title"), rows=PAIRS):
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([header, *rows])
    return out.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("tabs.csv", written("\t").encode()),
        ("semicolons.csv", written(";").encode()),
        ("bars.txt", written("|", ("image_name", " comment")).encode()),
        ("CAPITALS.TSV", written("\t", ("File Path", "TITLE")).encode()),
        (
            "index.csv",
            written(header=("", "Image", "Caption"), rows=[(i, *row) for i, row in enumerate(PAIRS)]).encode(),
        ),
        ("mark.csv", written().encode("utf-8-sig")),
        ("utf16.csv", written().encode("utf-16")),
        ("utf32.csv", written().encode("utf-32")),
        ("0.csv.gz", gzip.compress(written().encode(), mtime=0)),
        ("0.tsv.xz", lzma.compress(written("\t").encode())),
        ("0.csv.bz2", bz2.compress(written().encode())),
        ("0.csv.zst", pyarrow.compress(written().encode(), "zstd", asbytes=True)),
        ("empty first line.csv", b"\n" + written().encode()),
    ],
)
def test_a_csv_is_read_as_it_was_meant(folder, name, content):
    (folder / name).write_bytes(content)
    found = records("csv", folder / name)
    assert [(r["image"], [text.replace("\r", "") for text in r["texts"]]) for r in found] == [
        (png(i), [text]) for i, (_, text) in enumerate(PAIRS)
    ]


def test_blanks_after_the_separator_and_backslashes_are_understood(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").write_bytes(png(7))
    (folder / "0.csv").write_text('filepath, title\nsub\\x.png, "one, two"\n a.png , three\n')
    assert [(r["image"], r["texts"]) for r in records("csv", folder / "0.csv")] == [
        (png(7), ["one, two"]),
        (png(0), ["three"]),
    ]


def test_rows_of_an_image_are_its_captions_over_all_files_in_their_order(folder):
    rows = [("a.png", "a1"), ("b.png", "b1"), ("a.png", '["a2", "a3"]'), ("", "lost"), ("", "lost"), ("a.png", " ")]
    (folder / "0.csv").write_text(written(rows=rows))
    (folder / "1.csv").write_text(written(rows=[("c d.png", "[not a list]"), ("b.png", '["b2"]')]))
    found = records("csv", folder / "{0,1}.csv")
    assert [r.get("texts") for r in found] == [["a1", "a2", "a3"], ["b1", "b2"], None, None, ["[not a list]"]]


def test_a_quote_without_meaning_joins_no_rows(folder):
    lines = ["filepath\ttitle", 'a.png\t"The lone', 'b.png\tsays "stop"', 'c d.png\t"Hello" she said']
    (folder / "0.tsv").write_text("\n".join(lines))
    assert [r["texts"] for r in records("csv", folder / "0.tsv")] == [[line.split("\t")[1]] for line in lines[1:]]
    (folder / "0.csv").write_text('filepath,title\na.png,"The lone\nb.png,second"\nc d.png,third\n')
    assert [r["texts"] for r in records("csv", folder / "0.csv")] == [["The lone\n"], ['second"'], ["third"]]


def test_lines_are_captions_of_their_own_only_in_text_files_of_tars_that_are_evaluated(folder):
    text = "one\ntwo"
    (folder / "0.csv").write_text(written(rows=[("a.png", text)]))
    write_parquet(folder / "0.parquet", jpg=[png(0)], caption=[text])
    entry = {"split": "test", "filename": "a.png", "sentences": [{"raw": text}]}
    (folder / "k.json").write_text(json.dumps({"images": [entry]}))
    write_tar(folder / "0.tar", [("0.png", png(0)), ("0.txt", text.encode())])
    write_tar(folder / "1.tar", [("0.png", png(0)), ("0.json", json.dumps({"caption": text}).encode())])
    config = Config(eval=EvalConfig(batch_size=1))
    captions = {
        name: next(eval_batches.eval_dataset(f"{name[0]}:{folder}/{name[1]}", config, with_text=True))["texts"][0]
        for name in (
            ("csv", "0.csv"),
            ("parquet", "0.parquet"),
            ("karpathy", "k.json#test"),
            ("webdataset", "1.tar"),
            ("webdataset", "0.tar"),
        )
    }
    assert list(captions.values()) == [[text]] * 4 + [["one", "two"]]
    assert records("webdataset", folder / "0.tar")[0]["texts"] == [text]


def train_on(source):
    """Opens a source for training."""
    config = Config(global_batch_size=1, data=DataConfig(train=source))
    pipeline.train_dataset(config, None, process_index=0, process_count=1)


def test_labels_of_a_csv_are_numbers_or_names(folder):
    (folder / "0.csv").write_text("image,label\na.png,2\nb.png,10\nc d.png,\n")
    assert [r["label"] for r in records("csv", folder / "0.csv")] == [2, 10, None]
    (folder / "1.csv").write_text("image,Class\na.png,owl\nb.png,fox\na.png,owl\n")
    source = sources.open_source(f"csv:{folder}/1.csv", DataConfig())
    assert source.class_names == ["fox", "owl"]
    assert [r["label"] for r in sources.in_order(source, iter(range(3)))] == [1, 0, 1]
    with pytest.raises(UserError, match="has no captions .*1.csv has columns 'image', 'Class'"):
        train_on(f"csv:{folder}/1.csv")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a.png,one\n", "lacks a column with paths of images: .* first line, separated by commas, are 'a.png', 'one'"),
        (b"file\tname\n", "separated by tabs, are 'file', 'name'"),
        (b"photo,title\n", "lacks a column with paths of images: [^;]*; name another in config.data.image. The names"),
        (b"filepath,said\n", "lacks captions or labels: .*; name others in config.data.captions. The names"),
        ("filepath,title\n".encode("utf-16-le"), "is not UTF-8 text; if it is UTF-16 without a mark"),
        (gzip.compress(written().encode(), mtime=0)[:-9], "Compressed file ended before the end-of-stream marker"),
        (b"PK\3\4....", "is compressed by ZIP, which is not read here: unpack it, or use gzip or zstd"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused_with_what_it_has(tmp_path, content, message):
    (tmp_path / "0.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        records("csv", tmp_path / "0.csv")


STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
IMAGES = [png(i, (2, 2)) for i in range(5)]
TEXTS = [f"text {i}" for i in range(5)]


def write_parquet(path, metadata=None, **columns):
    table = pyarrow.table(columns)
    table = (
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
        if metadata
        else table
    )
    parquet.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pyarrow.array([{"bytes": b, "path": "x"} for b in IMAGES], STRUCT), "caption": TEXTS},
        {"photo": pyarrow.array([{"bytes": b, "path": None} for b in IMAGES], STRUCT), "caption": TEXTS},
        {"images": pyarrow.array([[{"bytes": b}] for b in IMAGES], pyarrow.list_(STRUCT)), "Text": TEXTS},
        {"JPG": pyarrow.array(IMAGES, pyarrow.large_binary()), "TITLE": pyarrow.array(TEXTS, pyarrow.large_string())},
        {"png": pyarrow.array(IMAGES, pyarrow.binary_view()), "text": pyarrow.array(TEXTS, pyarrow.string_view())},
        {"image": ["a.png"] * 5, "image_bytes": IMAGES, "caption": pyarrow.array(TEXTS).dictionary_encode()},
        {"image": [f"{i}.png" for i in range(5)], "caption": TEXTS},
        {"image": pyarrow.array([{"bytes": None, "path": f"{i}.png"} for i in range(5)], STRUCT), "txt": TEXTS},
    ],
)
def test_parquet_is_read_as_it_was_meant(tmp_path, columns):
    for i, content in enumerate(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(content)
    found = records("parquet", write_parquet(tmp_path / "0.parquet", **columns))
    assert [(r["image"], r["texts"]) for r in found] == [(b, [text]) for b, text in zip(IMAGES, TEXTS, strict=True)]


def test_parquets_labels_have_the_names_that_hugging_face_gives_them(tmp_path):
    features = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": ["owl", "fox", "cat"]}}
    path = write_parquet(tmp_path / "0.parquet", features, img=IMAGES, fine=[2, 0, -1, 1, 1])
    source = sources.open_source(f"parquet:{path}", DataConfig())
    assert source.class_names == ["owl", "fox", "cat"]
    assert [r["label"] for r in sources.in_order(source, iter([0]))] == [2, 0, None, 1, 1]
    with pytest.raises(UserError, match="has no captions .*'img' .binary.*'fine' .int64"):
        train_on(f"parquet:{path}")


def test_consecutive_rows_with_an_image_are_its_captions_and_every_offset_resumes(tmp_path):
    numbers = [0, 0, 0, 1, 2, 2, None, None, 0, 3, 3, 3, 3, 3]
    images = pyarrow.array([None if n is None else IMAGES[n] for n in numbers])
    path = write_parquet(tmp_path / "0.parquet", jpg=images, caption=[f"c{i}" for i in range(len(numbers))])
    source = sources.open_source(f"parquet:{path}", DataConfig())
    whole = list(source.read([(0, 0)]))
    assert [(record.get("texts"), offset) for record, offset in whole] == [
        (["c0", "c1", "c2"], 3),
        (["c3"], 4),
        (["c4", "c5"], 6),
        (None, 7),
        (None, 8),
        (["c8"], 9),
        (["c9", "c10", "c11", "c12", "c13"], 14),
    ]
    for i, (_, offset) in enumerate(whole[:-1]):
        assert list(source.read([(0, 0)], offset)) == whole[i + 1 :]


def test_captions_may_be_fields_of_a_column(tmp_path):
    path = write_parquet(
        tmp_path / "0.parquet",
        jpg=IMAGES[:2],
        caption=[{"en": "a", "de": "b"}] * 2,
        said=[[{"raw": "c"}, {"raw": "d"}]] * 2,
    )
    assert [r["texts"] for r in records("parquet", path)] == [[], []]
    assert records("parquet", path, captions=("caption/de",))[0]["texts"] == ["b"]
    assert records("parquet", path, captions=("said/raw",))[0]["texts"] == ["c", "d"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, "zstd", "lz4"])
def test_compressed_shards_resume_at_every_offset(tmp_path, compress):
    members = [(f"{i}.{name}", data) for i in range(6) for name, data in (("png", png(i)), ("txt", b"text %d" % i))]
    content = open(write_tar(tmp_path / "plain.tar", members), "rb").read()
    packed = pyarrow.compress(content, compress, asbytes=True) if isinstance(compress, str) else compress(content)
    (tmp_path / "0.tar").write_bytes(packed)
    source = sources.open_source(f"webdataset:{tmp_path}/0.tar", DataConfig())
    whole = list(source.read([(0, 0)]))
    assert [record["texts"] for record, _ in whole] == [[f"text {i}"] for i in range(6)]
    for i, (_, offset) in enumerate(whole):
        assert list(source.read([(0, 0)], offset)) == whole[i + 1 :]


def caption(rng):
    return "".join(
        rng.choice(["a", "b", " ", ",", '"', "\n", "\t", ";", "é", "日", "'", "[", "\\"])
        for _ in range(rng.randrange(1, 9))
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_csvs_hold_the_pairs_that_csv_reads(folder, seed):
    rng = random.Random(seed)
    separator, columns = rng.choice(",;|"), ["path", "caption", "more"]
    rng.shuffle(columns)
    rows = [
        {"path": rng.choice(PAIRS)[0], "caption": caption(rng), "more": rng.choice(["", "x"])}
        for _ in range(rng.randrange(1, 30))
    ]
    path = folder / rng.choice(["0.csv", "0.txt"])
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    with open(path, "w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig", "utf-16"])) as file:
        writer = csv.DictWriter(
            file, columns, delimiter=separator, quoting=quoting, lineterminator=rng.choice(["\n", "\r\n"])
        )
        writer.writeheader()
        writer.writerows(rows)
    truth: dict[str, list[str]] = {}
    for row in rows:
        truth.setdefault(row["path"], []).extend([row["caption"]] if row["caption"].strip() else [])
    found = {r["key"].rpartition("/")[2]: r["texts"] for r in records("csv", path)}
    assert found == truth


@pytest.mark.parametrize("seed", range(20))
def test_random_parquets_hold_the_pairs_that_pyarrow_reads(tmp_path, seed):
    rng = random.Random(seed)
    count = rng.randrange(1, 200)
    content = [rng.choice([None, *IMAGES]) for _ in range(count)]
    texts = [rng.choice([None, caption(rng)]) for _ in range(count)]
    image = pyarrow.array([{"bytes": b, "path": ""} for b in content], STRUCT) if seed % 2 else pyarrow.array(content)
    path = tmp_path / "0.parquet"
    parquet.write_table(pyarrow.table({"image": image, "caption": texts}), path, row_group_size=rng.randrange(1, 90))
    pairs, seen = [], object()
    for row in parquet.read_table(path).to_pylist():
        data = row["image"]["bytes"] if seed % 2 else row["image"]
        own = [row["caption"]] if row["caption"] and row["caption"].strip() else []
        if data is not None and data == seen:
            pairs[-1][1].extend(own)
        else:
            pairs.append((data, own))
        seen = data
    found = records("parquet", path)
    assert [(r.get("image"), r.get("texts", [])) for r in found] == [(d, t if d else []) for d, t in pairs]


@pytest.mark.parametrize("seed", range(20))
def test_random_tars_hold_the_pairs_that_tarfile_reads(tmp_path, seed):
    rng, members = random.Random(seed), []
    for i in range(rng.randrange(1, 20)):
        stem = rng.choice(["", "./", "a b/", "x.y/", ".ipynb_checkpoints/", "__MACOSX/"]) + f"{i:03}"
        parts = {"jpg": png(i, (2, 2)), "txt": caption(rng).encode(), "json": json.dumps({"caption": "stale"}).encode()}
        for extension in rng.sample(sorted(parts), rng.randrange(1, 4)):
            members.append((f"{stem}.{extension}", parts[extension]))
            if rng.random() < 0.3:
                members.append((f"{stem.rpartition('/')[0] or '.'}/._{i}.jpg", b"resource fork"))
    path = tmp_path / "0.tar"
    write_tar(path, members, rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    truth, hidden = {}, 0
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.split("/")
            if any(part.startswith(".") and part != "." for part in parts) or parts[0] == "__MACOSX":
                hidden += 1
                continue
            key, _, extension = member.name.rpartition(".")
            truth.setdefault(key, {})[extension] = tar.extractfile(member).read()
    source = shard_files.WebDataset(str(path), DataConfig())
    found = {record["key"].removeprefix("0.tar/"): record for record, _ in source.read([(0, 0)])}
    assert found.keys() == truth.keys() or (not truth and list(found) == ["0.tar"])
    assert source.ignored.total() == hidden
    for key, parts in truth.items():
        if "jpg" not in parts:
            assert found[key]["bad"] == "no image"
            continue
        own = [parts["txt"].decode()] if parts.get("txt", b"").strip() else ["stale"] if "json" in parts else []
        assert (found[key]["image"], found[key]["texts"]) == (parts["jpg"], own)


def test_names_with_characters_of_a_glob_are_taken_as_they_are(tmp_path, monkeypatch):
    names = ["run [v2]/a.tar", "run [v2]/b.tar", "x{1,2}.tar", "what?.tar", "日 本.tar"]
    (tmp_path / "run [v2]").mkdir()
    for name in names:
        (tmp_path / name).touch()
    for pattern, found in {
        "run [v2]/a.tar": names[:1],
        "run [v2]/*.tar": names[:2],
        "run [v2]/{a,b}.tar": names[:2],
        "x{1,2}.tar": names[2:3],
        "what?.tar": names[3:4],
        "日*.tar": names[4:],
    }.items():
        assert paths.expand(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in found]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.open_source("webdataset:~/run [v2]/{a,b}.tar", DataConfig()).paths == [
        f"{tmp_path}/{name}" for name in names[:2]
    ]
