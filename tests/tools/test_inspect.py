"""Counts of sources whose content is known."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from helpers import png, samples, write_tar
from PIL import Image

from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms
from flip_jax.tools import __main__, units
from flip_jax.tools import inspect as inspect_tool
from flip_jax.tools.source_units import SourceUnits


@pytest.fixture
def damaged(tmp_path):
    """Two tars with 44 records, of which 4 are bad in 3 ways; all images but one have 12 x 10 pixels; seven classes."""
    members = [list(samples(1, i)) for i in range(40)]
    members[3][0] = (members[3][0][0], b"<html>not an image</html>")
    members[4][0] = (members[4][0][0], png(4)[:60])
    members[5] = members[5][1:]
    members[6] = members[6][:1]
    members[7] = members[7][::2]  # a class, but no caption
    members[8][0] = (members[8][0][0], png(8, size=(30, 50)))
    members[9][1] = (members[9][1][0], "$x^2 \u0007 \u4e00".encode() + b"y" * 992)
    write_tar(tmp_path / "0.tar", [member for sample in members for member in sample])
    write_tar(tmp_path / "1.tar", samples(4, start=40))
    return f"webdataset:{tmp_path}/{{0..1}}.tar"


def inspect(source, **arguments):
    cut = SourceUnits(source, sources.open_source(source, DataConfig()), DataConfig())
    return inspect_tool.inspect(cut, DataConfig(), **arguments)


def test_everything_is_counted(damaged):
    summary = inspect(damaged)
    assert (summary.read, summary.usable) == (44, 40)
    assert summary.bad == {"image does not decode": 2, "no image": 1, "no text": 1}
    assert {kind: key for kind, (_, _, key) in summary.examples.items()} == {
        "image does not decode": "0.tar/00003",
        "no image": "0.tar/00005",
        "no text": "0.tar/00006",
    }
    assert summary.formats == {"PNG": 40} and summary.labelled == 40
    assert summary.counts["width (pixels)"] == {10: 39, 50: 1}
    assert summary.counts["height (pixels)"] == {12: 39, 30: 1}
    usable = [i for i in range(44) if i not in (3, 4, 5, 6)]
    assert summary.counts["bytes"] == Counter(len(png(8, (30, 50)) if i == 8 else png(i)) for i in usable)
    lengths = [len(f"picture {i}") for i in usable if i not in (7, 9)] + [1000]
    assert summary.counts["caption length"] == Counter(lengths)
    text = str(summary)
    assert "44 records read: 40 usable, 4 bad" in text and "2 image does not decode, first 0.tar/00003" in text
    assert "512 to 1023 characters         1" in text


def test_workers_count_the_same(damaged, tmp_path):
    alone = inspect(damaged)
    assert len(alone.shown) == 24 and vars(inspect(damaged, crew=units.Size(2, threads=3))) == vars(alone)
    lines = ["filepath,title", *(f"{i}.png,picture {i}" for i in range(5))]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "a.csv").write_text("\n".join(lines))
    alone = inspect(f"csv:{tmp_path}/a.csv")
    assert (alone.usable, alone.bad) == (4, {"no image": 1}) and alone.origins == {"column 'title'": 4}
    assert vars(inspect(f"csv:{tmp_path}/a.csv", crew=units.Size(1))) == vars(alone)


def test_only_the_first_records_are_read(damaged):
    for limit in (1, 5, 41):
        assert inspect(damaged, limit=limit).read == limit
    assert inspect(damaged, limit=5).bad == {"image does not decode": 2}


def test_quantiles_are_values_that_occurred():
    values = [random.Random(0).randrange(1000) for _ in range(501)]
    expected = np.quantile(values, inspect_tool.QUANTILES, method="inverted_cdf")
    assert inspect_tool.quantiles(Counter(values)) == expected.tolist()
    assert inspect_tool.quantiles(Counter([5])) == [5] * 7


def run(*arguments):
    return __main__.main(["inspect", *map(str, arguments)])


def test_the_command_prints_and_draws(damaged, tmp_path, capsys):
    assert run(damaged, f"--out={tmp_path}/new") == 0
    found = capsys.readouterr()
    assert "44 records read" in found.out and "records/s" in found.out
    assert "44/44" in found.err and "records/s" in found.err  # the progress bar
    with Image.open(tmp_path / "new" / "inspection.png") as image:
        assert image.size == (1200, 1200)
        pixels = np.asarray(image.convert("L"))
    # Five bands: four rows of images and a histogram.
    assert all(pixels[i : i + 200].std() > 10 for i in range(0, 1200, 200))


def test_source_is_an_option_too(damaged, tmp_path, capsys):
    assert run(f"--source={damaged}", f"--out={tmp_path}", "--limit=5") == 0
    assert "5 records read: 3 usable, 2 bad" in capsys.readouterr().out


def test_sources_without_usable_records_are_drawn_too_and_are_a_failure(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("1.txt", b"x")])
    assert run(f"webdataset:{tmp_path}/0.tar", f"--out={tmp_path}") == 1
    found = capsys.readouterr()
    assert "1 records read: 0 usable, 1 bad" in found.out
    assert f"error: no record of webdataset:{tmp_path}/0.tar can be used for training" in found.err
    assert (tmp_path / "inspection.png").stat().st_size > 1000


def test_bad_arguments_are_one_line(damaged, tmp_path, capsys):
    for source in ("nothing:x", "x", f"webdataset:{tmp_path}/none.tar"):
        assert run(source) == 1
        assert re.match(f"^error: --source .*{source}.*\n$", capsys.readouterr().err)
    assert run() == 1
    assert capsys.readouterr().err == "error: SOURCE is missing: give it as an argument or with --source\n"
    (tmp_path / "file").write_text("")
    assert run(damaged, f"--out={tmp_path}/file") == 1
    assert re.match("error: --out '.*file' cannot be created .File exists.*another folder", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        run("webdataset:x", "--limit=0")
    assert "argument --limit: must be an integer of at least 1, got '0'" in capsys.readouterr().err


def test_a_bug_is_not_a_bad_record(damaged, monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(transforms, "decode", broken)
    with pytest.raises(TypeError, match="a bug"):
        inspect(damaged)


WORDS = "[PAD] [UNK] a red green blue square circle , ##s".split()


def count(captions, tmp_path, *options):
    """Counts by `flip inspect` of one tar per list of captions."""
    for number, some in enumerate(captions):
        members = [[(f"{i}.png", png(i)), (f"{i}.txt", text.encode())] for i, text in enumerate(some)]
        write_tar(tmp_path / f"{number}.tar", [member for sample in members for member in sample])
    write_tar(tmp_path / "2.tar", [("bad.png", b"no image"), ("bad.txt", b"green green")])
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    options = (f"--out={tmp_path}", f"--counts={tmp_path}/new/counts.json", *options)
    assert run(f"webdataset:{tmp_path}/{{0..2}}.tar", f"--vocab={tmp_path}/vocab.txt", *options) == 0
    return json.loads((tmp_path / "new" / "counts.json").read_text())


def test_tokens_of_a_corpus_are_counted_by_any_number_of_workers(tmp_path, capsys):
    rng = random.Random(1)
    words = ["a", "red", "blue", "square", "circle", ",", "unheard"]
    captions = [[" ".join(rng.choices(words, range(1, 8), k=rng.randrange(1, 40))) for _ in range(20)] for _ in "01"]
    expected = Counter(word for some in captions for text in some for word in text.split())
    unknown = expected.pop("unheard")
    one, two = (count(captions, tmp_path, f"--workers={workers}") for workers in (1, 2))
    assert one == two and one["vocab_size"] == len(WORDS) and one["kind"] == "WordPiece"
    assert one["counts"] == [0, unknown, *(expected[word] for word in WORDS[2:])]
    total = unknown + expected.total()
    assert f"{total:,} tokens, {len(expected) + 1} of 10: {tmp_path}/new/counts.json\n" in capsys.readouterr().out


def test_counting_needs_a_tokenizer(damaged, tmp_path, capsys):
    assert run(damaged, f"--out={tmp_path}", f"--counts={tmp_path}/counts.json") == 1
    assert capsys.readouterr().err == (
        "error: --counts needs --vocab=PATH: a vocabulary file, as config.data.vocab, or a run\n"
    )
    assert run(damaged, f"--out={tmp_path}", f"--vocab={tmp_path}") == 1
    assert "--vocab is the tokenizer of --counts: give --counts=FILE" in capsys.readouterr().err
    assert run(damaged, f"--out={tmp_path}", f"--counts={tmp_path}/counts.json", f"--vocab={tmp_path}") == 1
    assert str(tmp_path) in capsys.readouterr().err
