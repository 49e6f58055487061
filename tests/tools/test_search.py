"""Hits against NumPy's sort of all of them, on pages that hold the right pictures and no markup of others."""

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
from flip_jax.tools import embed, search


def queries(count=3):
    query_QxE = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    return query_QxE / np.linalg.norm(query_QxE, axis=1, keepdims=True)


@pytest.mark.parametrize(("form", "dtype"), [("parquet", "float32"), ("npy", "float32"), ("parquet", "float16")])
@pytest.mark.parametrize("block", [4, 8192])
def test_hits_are_those_of_a_full_sort(encoder, source, tmp_path, monkeypatch, form, dtype, block):
    write_embeddings(encoder, source, tmp_path, format=form, dtype=dtype)
    monkeypatch.setattr(search, "BLOCK", block)
    found, stored = search.Index(tmp_path).nearest(queries(), 12), embedded_rows(tmp_path)
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
    (hits,) = search.Index(tmp_path).nearest(queries(1), 1000)
    assert sorted(hit.key for hit in hits) == [row["key"] for row in embedded_rows(tmp_path)]


def test_of_equal_scores_the_first_row_is_best():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score_QxN = rng.integers(0, 4, (3, 20)).astype(np.float32)
        row_QxN = np.stack([rng.permutation(20) for _ in range(3)])
        scores, ids = search.best(score_QxN, row_QxN, 7)
        for i in range(3):
            truth = sorted(zip(-score_QxN[i], row_QxN[i], strict=True))[:7]
            assert list(zip(-scores[i], ids[i], strict=True)) == truth


class Page(html.parser.HTMLParser):
    """The tags, pictures and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.pictures, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            (content,) = re.fullmatch("data:image/jpeg;base64,(.*)", dict(attrs)["src"]).groups()
            self.pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")))

    def handle_data(self, data):
        self.text += data


EVIL = '<script>alert("x")</script> & <img src=y onerror=z>'


@pytest.fixture
def evil(tmp_path):
    """A tar whose keys and captions are markup."""
    (tmp_path / "evil").mkdir()
    members = [((f"<b>{i}.png", png(i)), (f"<b>{i}.txt", f"{EVIL} {i}".encode())) for i in range(6)]
    write_tar(tmp_path / "evil" / "0.tar", (member for pair in members for member in pair))
    return f"webdataset:{tmp_path}/evil/0.tar"


def test_a_page_shows_each_hit_and_no_markup_of_others(encoder, evil, tmp_path):
    write_embeddings(encoder, evil, tmp_path / "out")
    hits = search.Index(tmp_path / "out").nearest(queries(2), 3)
    pictures = search.Pictures(embed.open_source(evil, DataConfig(), False), DataConfig())
    page = Page(search.page([(EVIL, None), ("a picture", pictures(hits[0][0]))], hits, pictures))
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
    for picture, hit in zip(page.pictures, shown, strict=True):
        truth = transforms.decode(png(int(hit.key[-1])), search.SIZE, DataConfig())
        assert picture.shape == truth.shape and np.abs(picture.astype(float) - truth).mean() < 6


def test_a_picture_that_is_not_there_any_more_is_said_to_be(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "out")
    hits = search.Index(tmp_path / "out").nearest(queries(1), 8)
    write_tar(tmp_path / "1.tar", samples(9, 1))
    pictures = search.Pictures(embed.open_source(f"webdataset:{tmp_path}/1.tar", DataConfig(), False), DataConfig())
    assert {str(pictures(hit)) for hit in hits[0]} == {"the source has changed"}
    assert search.page([("x", None)], hits, pictures).count("the source has changed") == 8
    search.draw([("x", None)], hits, pictures, tmp_path / "hits.png")
    lines = tmp_path / "lines.txt"
    lines.write_text("a picture\nred\n")
    write_embeddings(encoder, str(lines), tmp_path / "texts", texts=True)
    hits = search.Index(tmp_path / "texts").nearest(queries(1), 2)
    page = Page(search.page([("x", None)], hits, search.Pictures(embed.Lines(str(lines)), DataConfig())))
    assert "img" not in page.tags and "a picture" in page.text


def test_a_png_shows_the_hits_in_order(encoder, source, tmp_path):
    write_embeddings(encoder, source, tmp_path / "out")
    hits = search.Index(tmp_path / "out").nearest(queries(2), 10)
    asked, real = [], search.Pictures(embed.open_source(source, DataConfig(), False), DataConfig())
    search.draw([("$a_b", None), ("b", None)], hits, lambda hit: asked.append(hit) or real(hit), tmp_path / "hits.png")
    assert asked == hits[0] + hits[1]
    with Image.open(tmp_path / "hits.png") as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(10**6)) > 50


def test_what_does_not_fit_is_refused(encoder, source, tmp_path):
    with pytest.raises(ValueError, match="has no index.json: it must be a folder of flip_jax.embed"):
        search.Index(tmp_path)
    write_embeddings(encoder, source, tmp_path / "out", format="npy")
    index = search.Index(tmp_path / "out")
    index.check(encoder)
    with pytest.raises(ValueError, match="--model has weights_hash .* made with .* a model; search with that one"):
        index.check(make_encoder(seed=1))
    part = tmp_path / "out" / "part-000001-0001.npy"
    whole = part.read_bytes()
    for damaged in (b"", whole[:40], whole[:-10], b"\x80" + whole[1:]):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match="part-000001-0001.npy is damaged"):
            index.nearest(queries(1), 3)
    part.unlink()
    with pytest.raises(ValueError, match="part-000001-0001.npy is missing: run flip_jax.embed again"):
        search.Index(tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json is damaged"):
        search.Index(tmp_path / "out")
    write_embeddings(encoder, source, tmp_path / "b")
    part = tmp_path / "b" / "part-000001-0001.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match="part-000001-0001.parquet is damaged"):
        search.Index(tmp_path / "b").nearest(queries(1), 3)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match="no.png': image does not decode; it must be one of JPEG, PNG"):
        search.query_image(str(tmp_path / "no.png"), 32, DataConfig())
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        search.query_image(str(tmp_path / "nowhere.png"), 32, DataConfig())


def test_the_command(encoder, source, tmp_path):
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
    assert len(Page((tmp_path / "x.html").read_text()).pictures) == 10
    refused = command("search", **options)
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: give a query: --text=TEXT")
