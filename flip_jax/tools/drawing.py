"""Figures of the tools: grids of captioned images, written as PNG."""

import pathlib
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure, FigureBase

DPI = 100
Tile = tuple[str, np.ndarray]  # caption, and uint8 [height, width, 3]


def grid(figure: FigureBase, rows: Sequence[Sequence[Tile]], columns: int, caption_width: int = 26) -> None:
    """Fill a figure with rows of images under captions of at most three lines of `caption_width` characters."""
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for row, tiles in zip(panels, rows, strict=True):
        for axes, (caption, image) in zip(row, tiles, strict=False):
            lines = textwrap.wrap(printable(caption), caption_width, max_lines=3, placeholder="…")
            # Captions are data: a $ in them must not start a formula.
            axes.set_title("\n".join(lines), fontsize=8, parse_math=False)
            axes.imshow(image)


def printable(text: str, limit: int = 200) -> str:
    """Return the first characters of a text, with blanks for those that no font draws."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write a figure as PNG, with boxes for characters that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=DPI)
