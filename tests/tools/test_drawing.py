"""Grids of images hold the images, whatever their captions contain."""

import warnings

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flip_jax.tools import drawing

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]


def test_a_grid_shows_every_image_in_its_place_under_any_caption(tmp_path):
    captions = ["", "$x_{$ 100 % \\frac", "a\nb\tc\0d", "\u4e00\U0001f600", "long " * 500]
    tiles = [(text, np.full((8, 8, 3), colour, np.uint8)) for text, colour in zip(captions, COLOURS, strict=True)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.grid(figure, [tiles[:3], tiles[3:]], columns=3)
        drawing.save(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (600, 400)
        pixels = np.asarray(image.convert("RGB"))
    centres = []
    for colour in COLOURS:
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        assert len(rows) > 5000
        centres.append((int(rows.mean()) // 200, int(columns.mean()) // 200))
    assert centres == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_captions_are_cut_and_made_printable():
    assert drawing.printable("a\x1b[31mb\u202e") == "a [31mb "
    assert drawing.printable("x" * 500) == "x" * 200
