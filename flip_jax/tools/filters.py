"""What `flip prepare` removes: small or narrow images, captions that say nothing, and pairs that do not match."""

import argparse
import re
from typing import Any

import numpy as np

from flip_jax.data import records
from flip_jax.runtime import UserError
from flip_jax.tools import options

# A caption that is nothing but addresses, the name of a file, or what a camera or a program names its files.
_ADDRESS = ("http://", "https://", "ftp://", "www.")
_FILES = (*records.IMAGES, "svg", "heic", "pdf", "psd")
_CAMERA = re.compile(r"(?:img|dsc[nf]?|pict|screenshot)[\s_-]*\d[\d\s_.:-]*", re.IGNORECASE)

NAMES = ("min_side", "max_aspect", "min_caption", "max_caption", "drop_junk_captions", "min_score", "model", "dedup")
BATCH = 64  # images and captions compared at once


class Removed(Exception):
    """Raised for a record that a filter removes; the message is the kind under which it is counted."""


def is_junk(text: str) -> bool:
    """Tell whether a caption is only addresses, a file's name, or has no letter of any script."""
    words = text.lower().split()
    return (
        not any(c.isalpha() for c in text)
        or all(word.startswith(_ADDRESS) for word in words)
        or (len(words) == 1 and "." in words[0] and words[0].rpartition(".")[2] in _FILES)
        or _CAMERA.fullmatch(text.strip()) is not None
    )


def texts(found: list[str], settings: dict[str, Any]) -> list[str]:
    """Return the captions that are kept; `Removed` if there were some and none is left."""
    kinds = [_caption_kind(text, settings) for text in found]
    kept = [text for text, kind in zip(found, kinds, strict=True) if not kind]
    if found and not kept:
        raise Removed(kinds[0])
    return kept


def _caption_kind(text, settings):
    """Return why a caption is removed, "" if it is not."""
    length = len(text.strip())
    if settings["drop_junk_captions"] and is_junk(text):
        return "junk caption"
    if settings["min_caption"] and length < settings["min_caption"]:
        return f"caption shorter than {settings['min_caption']} characters"
    if settings["max_caption"] and length > settings["max_caption"]:
        return f"caption longer than {settings['max_caption']} characters"
    return ""


def check_size(width: int, height: int, settings: dict[str, Any]) -> None:
    """Raise `Removed` for an image that is too small or too narrow."""
    short, long = sorted((width, height))
    if settings["min_side"] and short < settings["min_side"]:
        raise Removed(f"side below {settings['min_side']} pixels")
    if settings["max_aspect"] and long > settings["max_aspect"] * short:
        raise Removed(f"aspect above {settings['max_aspect']:g}")


class Scorer:
    """Cosines of images and their captions, by a model."""

    def __init__(self, model: str):
        from flip_jax import runtime
        from flip_jax.tools import embed  # with JAX, which only workers with a model need

        runtime.enable_compile_cache()
        self._encoder = embed.load(model)
        self.size, self.data = self._encoder.config.model.image.image_size, self._encoder.config.data

    def best(self, pixels: list[np.ndarray], captions: list[list[str]]) -> list[float]:
        """Return the largest cosine of each image with its captions; at most `BATCH` images, with a caption each."""
        padding = np.zeros((BATCH - len(pixels), *pixels[0].shape), np.uint8)
        image_BxE = np.asarray(self._encoder.encode_image(np.concatenate([np.stack(pixels), padding])))
        owner = [i for i, found in enumerate(captions) for _ in found]
        flat = [text for found in captions for text in found]
        score = [-np.inf] * len(captions)
        for start in range(0, len(flat), BATCH):
            some = flat[start : start + BATCH]
            text_BxE = self._encoder.encode_text(some + [""] * (BATCH - len(some)))
            for row, i in enumerate(owner[start : start + BATCH]):
                score[i] = max(score[i], float(image_BxE[i] @ text_BxE[row]))
        return score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the filters' arguments."""
    group = parser.add_argument_group("filters")
    group.add_argument("--min_side", type=options.positive, metavar="PX", help="of an image")
    group.add_argument("--max_aspect", type=_at_least_one, metavar="X", help="longer side over shorter side")
    group.add_argument("--min_caption", type=options.positive, metavar="N", help="characters of a caption")
    group.add_argument("--max_caption", type=options.positive, metavar="N", help="characters of a caption")
    group.add_argument(
        "--drop_junk_captions",
        action="store_true",
        help="drop captions that are only addresses, a file's name, or without letters",
    )
    group.add_argument("--min_score", type=float, metavar="X", help="least cosine of an image and a caption by --model")
    group.add_argument("--model", metavar="DIR", help=f"with --min_score: {options.MODEL}")
    group.add_argument("--dedup", action="store_true", help="keep the first of images with the same bytes")


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not fit together."""
    if (arguments.min_score is None) != (arguments.model is None):
        raise UserError("--min_score=X and --model=DIR need each other: the model gives the score")
    if arguments.min_score is not None and not -1 <= arguments.min_score <= 1:
        raise UserError(f"--min_score={arguments.min_score:g} must be a cosine, -1 to 1, such as 0.28")
    if arguments.min_caption and arguments.max_caption and arguments.min_caption > arguments.max_caption:
        raise UserError(f"--min_caption={arguments.min_caption} is above --max_caption={arguments.max_caption}")


def _at_least_one(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return value
