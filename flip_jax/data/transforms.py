"""Encoded pictures to uint8 RGB of the model's size."""

import io
import math
import random

import numpy as np
from PIL import Image, ImageOps

from flip_jax.config import Data

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
# Pillow would warn about large pictures and refuse larger ones. Here that is a setting, checked before decoding.
Image.MAX_IMAGE_PIXELS = None

Window = tuple[int, int, int, int]  # left, top, width, height in pixels


class BadImage(ValueError):
    """A picture that cannot be used; the message is the kind under which it is counted."""


def generator(seed: int, epoch: int, key: str) -> random.Random:
    """The random numbers of one record in one epoch, the same in every process. Half the time of NumPy's generators."""
    return random.Random(f"{seed}/{epoch}/{key}")


def train_window(height: int, width: int, size: int, settings: Data, rng: random.Random) -> Window:
    """A random window: area uniform in `crop_area` of the picture, aspect log-uniform in `crop_aspect`, any place.

    The first of ten draws that fits, else the centre square of size / (size + 32) of the shorter side (official FLIP).
    """
    low, high = (math.log(aspect) for aspect in settings.crop_aspect)
    for _ in range(10):
        area = height * width * rng.uniform(*settings.crop_area)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randrange(width - w + 1), rng.randrange(height - h + 1), w, h
    return centre_window(height, width, max(1, int(size / (size + 32) * min(height, width))))


def centre_window(height: int, width: int, side: int) -> Window:
    """The square of `side` pixels in the middle; of an odd margin, left and top get the larger part."""
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def decode(data: bytes, size: int, settings: Data, rng: random.Random | None = None) -> np.ndarray:
    """A picture, cropped and resized (bicubic, antialiased): uint8 [size, size, 3].

    The window, and whether it is flipped, are drawn from `rng`; without one it is the centre square. BadImage if the
    picture does not decode, or has more than `settings.max_image_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > settings.max_image_pixels:
            raise BadImage("too many pixels")
        if "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        width, height = image.size
        if rng:
            window = train_window(height, width, size, settings, rng)
        else:
            window = centre_window(height, width, min(height, width))
        scale = 1
        if image.format == "JPEG":
            # A JPEG decodes to a half, quarter or eighth for less; the window keeps twice the pixels that are needed.
            scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(window[2:]) >= 2 * s * size)
            image.draft(None, (width // scale, height // scale))
        image = _resize(_to_rgb(image), [x / scale for x in window], size)
        if rng and settings.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise all sorts of things for damaged files
        raise BadImage("image does not decode") from error


def eval_image(image: Image.Image, size: int) -> np.ndarray:
    """The centre square of an RGB picture, as `decode` gives it without a generator."""
    return np.asarray(_resize(image, centre_window(image.height, image.width, min(image.size)), size))


def _to_rgb(image):
    """RGB of any mode: transparency on white, the upper 8 bits of 16-bit grey."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, (0, 0), image)
    return white


def _resize(image, window, size):
    left, top, width, height = window
    box = (left, top, left + width, top + height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
