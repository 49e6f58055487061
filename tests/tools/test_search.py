"""Hits against NumPy's sort of all rows, on pages with the right images and no markup from the data."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from helpers import command, embedded_rows, make_encoder, png, samples, save, write_embeddings, write_tar
from PIL import Image

from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.runtime import UserError
from flip_jax.tools import __main__ as flip
from flip_jax.tools import approximate, embed, index, search


def queries(count=3):
    query_QxE = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    return query_QxE / np.linalg.norm(query_QxE, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [4, 8192])
def test_hits_are_those_of_a_full_sort(encoder, source, tmp_path, monkeypatch, dtype, block):
    write_embeddings(encoder, source, tmp_path, dtype=dtype)
    monkeypatch.setattr(index, "BLOCK", block)
    found, stored = index.Index(tmp_path).nearest(queries(), 12), embedded_rows(tmp_path)
    score_QxN = queries().astype(float) @ np.array([row["embedding"] for row in stored], dtype).astype(float).T
    for scores, hits in zip(score_QxN, found, strict=True):
        order = np.argsort(-scores, kind="stable")[:12]
        assert [hit.key for hit in hits] == [stored[i]["key"] for i in order]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-6)
        assert all(
            hit._asdict().items() > {k: stored[i][k] for k in ("texts", "item", "offset")}.items()
            for hit, i in zip(hits, order, strict=True)
        )


def test_more_hits_than_there_are_rows(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path)
    (hits,) = index.Index(tmp_path).nearest(queries(1), 1000)
    assert sorted(hit.key for hit in hits) == [row["key"] for row in embedded_rows(tmp_path)]


def test_an_approximate_index_finds_the_same_in_half_precision(encoder, source, tmp_path):
    pytest.importorskip("usearch.index")
    write_embeddings(encoder, source, tmp_path)
    opened = index.Index(tmp_path)
    scores = [{hit.key: hit.score for hit in hits} for hits in opened.nearest(queries(5), 42)]
    for _ in range(2):  # the second time the file is there
        found = approximate.nearest(tmp_path, opened, queries(5), 12)
        for hits, true in zip(found, scores, strict=True):
            # Rounding is 2^-11 of each number, in the query and in the row: 1e-3 of vectors of length 1.
            np.testing.assert_allclose([hit.score for hit in hits], [true[hit.key] for hit in hits], atol=1e-3)
            np.testing.assert_allclose([hit.score for hit in hits], list(true.values())[:12], atol=1e-3)
            assert len({hit.key for hit in hits}) == 12
    path = approximate.graph_path(tmp_path, opened)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="usearch is damaged: delete it"):
        approximate.nearest(tmp_path, opened, queries(1), 3)


def test_ties_are_in_row_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score_QxN = rng.integers(0, 4, (3, 20)).astype(np.float32)
        row_QxN = np.stack([rng.permutation(20) for _ in range(3)])
        scores, ids = index.best(score_QxN, row_QxN, 7)
        for i in range(3):
            truth = sorted(zip(-score_QxN[i], row_QxN[i], strict=True))[:7]
            assert list(zip(-scores[i], ids[i], strict=True)) == truth


class Page(html.parser.HTMLParser):
    """The tags, images and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.images, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            (content,) = re.fullmatch("data:image/jpeg;base64,(.*)", dict(attrs)["src"]).groups()
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")))

    def handle_data(self, data):
        self.text += data


EVIL = '<script>alert("x")</script> & <img src=y onerror=z>'


@pytest.fixture
def evil(tmp_path):
    """A tar with markup as keys and captions."""
    (tmp_path / "evil").mkdir()
    members = [((f"<b>{i}.png", png(i)), (f"<b>{i}.txt", f"{EVIL} {i}".encode())) for i in range(6)]
    write_tar(tmp_path / "evil" / "0.tar", (member for pair in members for member in pair))
    return f"webdataset:{tmp_path}/evil/0.tar"


def test_a_page_shows_each_hit_and_escapes_its_markup(encoder, evil, tmp_path):
    write_embeddings(encoder, evil, tmp_path / "out")
    hits = index.Index(tmp_path / "out").nearest(queries(2), 3)
    thumbnails = search.Thumbnails(embed.open_source(evil, DataConfig(), False), DataConfig())
    page = Page(search.page([(EVIL, None), ("a picture", thumbnails(hits[0][0]))], hits, thumbnails))
    assert page.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h2",
        "div",
        "figure",
        "img",
        "figcaption",
        "b",
        "small",
    }
    assert page.text.count(EVIL) == 7 and all(hit.key in page.text for found in hits for hit in found)
    shown = [hit for hit in (*hits[0], hits[0][0], *hits[1])]
    for image, hit in zip(page.images, shown, strict=True):
        truth = transforms.decode(png(int(hit.key[-1])), search.SIZE, DataConfig())
        assert image.shape == truth.shape and np.abs(image.astype(float) - truth).mean() < 6


def test_a_hit_says_that_its_image_is_missing(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "out")
    hits = index.Index(tmp_path / "out").nearest(queries(1), 8)
    write_tar(tmp_path / "1.tar", samples(9, 1))
    thumbnails = search.Thumbnails(embed.open_source(f"webdataset:{tmp_path}/1.tar", DataConfig(), False), DataConfig())
    assert {str(thumbnails(hit)) for hit in hits[0]} == {"the source has changed"}
    assert search.page([("x", None)], hits, thumbnails).count("the source has changed") == 8
    lines = tmp_path / "lines.txt"
    lines.write_text("a picture\nred\n")
    write_embeddings(encoder, str(lines), tmp_path / "texts", texts=True)
    hits = index.Index(tmp_path / "texts").nearest(queries(1), 2)
    page = Page(search.page([("x", None)], hits, search.Thumbnails(embed.Lines(str(lines)), DataConfig())))
    assert "img" not in page.tags and "a picture" in page.text


def test_what_does_not_fit_is_refused(encoder, source, tmp_path):
    with pytest.raises(UserError, match="has no index.json: it must be a folder written by `flip embed`"):
        index.Index(tmp_path)
    write_embeddings(encoder, source, tmp_path / "out")
    found = index.Index(tmp_path / "out")
    found.check(encoder)
    with pytest.raises(UserError, match="--model has weights_hash .* made with .*/a model: search with that one"):
        found.check(make_encoder(seed=1))
    part = tmp_path / "out" / "part-000001-0001.parquet"
    whole = part.read_bytes()
    for damaged in (b"", whole[:40], whole[:-10], whole[:4] + bytes(100) + whole[104:]):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match="part-000001-0001.parquet is damaged: delete it"):
            found.nearest(queries(1), 100)
    part.unlink()
    with pytest.raises(UserError, match="part-000001-0001.parquet is missing: run `flip embed` again"):
        index.Index(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text("{}")
    with pytest.raises(UserError, match="is not complete: run `flip embed` again"):
        index.Index(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json is damaged"):
        index.Index(tmp_path / "out")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(UserError, match="no.png': image does not decode; it must be one of JPEG, PNG"):
        search.query_image(str(tmp_path / "no.png"), 32, DataConfig())
    with pytest.raises(UserError, match="nowhere.png' cannot be read .No such file"):
        search.query_image(str(tmp_path / "nowhere.png"), 32, DataConfig())


def test_the_command(encoder, source, tmp_path, capsys):
    save(encoder, tmp_path / "model")
    write_embeddings(encoder, source, tmp_path / "out")
    (tmp_path / "a.png").write_bytes(png(40))
    options = {"index": str(tmp_path / "out"), "model": str(tmp_path / "model"), "top": "3"}
    done = command(
        "search", text=["a red 1", "a"], image=str(tmp_path / "a.png"), out=str(tmp_path / "x.html"), **options
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "a red 1" and lines[4] == "a" and lines[8] == str(tmp_path / "a.png")
    assert lines[9].split() == ["1.0000", "2.tar/00040", "picture", "40"]
    assert len(Page((tmp_path / "x.html").read_text()).images) == 10
    for changes, message in (
        ({}, "no query: give --text=TEXT, --image=FILE"),
        ({"text": "a", "out": "hits.png"}, "--out must end in .html, got 'hits.png'"),
        ({"text": "a", "out": "nowhere/x.html"}, "--out 'nowhere/x.html' is in a folder that does not exist"),
        ({"text": "a", "out": "x.html", "source": "webdataset:gone.tar"}, "--out reads it again: if it was moved, use"),
    ):
        assert flip.main(["search", *(f"--{name}={value}" for name, value in (options | changes).items())]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and message in last
