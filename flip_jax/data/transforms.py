"""Encoded images to uint8 RGB of the model's size."""

import contextlib
import functools
import io
import math
import random
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from flip_jax.config import DataConfig
from flip_jax.data.records import BadRecord

try:  # Pillow's resize up to rounding, in a quarter of the time; it has no wheels for Linux on ARM
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # recognised by content, not by file name
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
MAX_SCANS, SCAN = 32, b"\xff\xda"  # of a progressive JPEG, each as much work as an image; libjpeg writes 10
SMALL = 2**20  # bytes, which cost little whatever they are
LARGE = 2**24  # pixels; such images are decoded one at a time
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are counted here
_large, _small = threading.Lock(), contextlib.nullcontext()

Window = tuple[int, int, int, int]  # left, top, width, height in pixels


class BadImage(BadRecord):
    """An image that cannot be used; the message is the kind under which it is counted."""


def generator(seed: int, epoch: int, key: str) -> random.Random:
    """Seeds the random numbers of one record in one epoch. Python's generators take half the time of NumPy's."""
    return random.Random(f"{seed}/{epoch}/{key}")


def train_window(height: int, width: int, size: int, settings: DataConfig, rng: random.Random) -> Window:
    """Draws a window: area uniform in `crop_area` of the image, aspect log-uniform in `crop_aspect`, any position.

    Takes the first of ten draws that fits, or else the centre square of size / (size + 32) of the shorter side, as
    the official code does.
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
    """Centres a square of `side` pixels; an odd margin is larger at the left and top."""
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def decode(data: bytes, size: int, settings: DataConfig, rng: random.Random | None = None) -> np.ndarray:
    """Decodes an image, crops and resizes it as `settings.resize` says: uint8 [size, size, 3].

    The window and the flip are drawn from `rng`; without one the window is the centre square. An animation gives its
    first frame. BadImage if the image does not decode or has more than `settings.max_image_pixels`.
    """
    image = open_image(data, settings)
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    if rng:
        window = train_window(height, width, size, settings, rng)
    else:
        window = centre_window(height, width, min(height, width))
    scale = 1
    if settings.resize == "antialias" and rng:
        # A JPEG decodes faster at a half, quarter or eighth; the window keeps at least twice the pixels it needs.
        scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(window[2:]) >= 2 * s * size)
    # The decoder of a progressive JPEG holds all of it, whatever the scale.
    held = width * height / (1 if image.info.get("progressive") else scale**2)
    with _large if held > LARGE else _small:
        pixels, scale = _pixels(image, data, scale, fast=settings.resize == "official")
        del image  # with what its decoder holds
        pixels = _upright(pixels, orientation)
        if pixels.shape != (math.ceil(height / scale), math.ceil(width / scale), 3):
            raise BadImage("image does not decode")  # its header gives one size and its body another
        pixels = resize(pixels, [x / scale for x in window], size, settings, train=bool(rng))
    return _mirrored(pixels) if rng and settings.flip and rng.random() < 0.5 else pixels


def open_image(data: bytes, settings: DataConfig) -> Image.Image:
    """Reads the header of an encoded image. BadImage if it is none, or would cost far more than its pixels."""
    Image.MAX_IMAGE_PIXELS = settings.max_image_pixels  # twice that is Pillow's limit for frames and tiles
    file = io.BytesIO(data)
    if len(data) > SMALL or data[:2] in (b"II", b"MM"):
        from flip_jax.data import rare_images

        file = rare_images.bounded(data, settings.max_image_pixels)
    image = run_decoder(Image.open, file, formats=FORMATS)
    if image.width * image.height > settings.max_image_pixels:
        raise BadImage("too many pixels")
    if image.format in ("JPEG", "MPO"):
        # Most JPEGs have one scan of all components. Looking for others takes a millisecond per megabyte.
        components = data[file.tell() - 4 - 2 * image.layers]
        if (image.info.get("progressive") or components != image.layers) and data.count(SCAN) > MAX_SCANS:
            from flip_jax.data import rare_images

            rare_images.check_scans(data)
    return image


def run_decoder(call: Callable[..., Any], *arguments, **keywords):
    """Calls a decoder on data that may be damaged: decoders raise almost any exception, which all become BadImage.

    Only the library's call is inside the `try`, so that an error in this file is never counted as a bad image.
    """
    try:
        return call(*arguments, **keywords)
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels") from error
    except Exception as error:
        raise BadImage("image does not decode") from error


def _mirrored(pixels):
    """Swaps left and right. One channel at a time takes NumPy a quarter of the time of whole pixels."""
    mirrored = np.empty_like(pixels)
    for channel in range(3):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def _orientation(image):
    """Reads the EXIF orientation, 1 to 8; 1, which is upright, if it is missing or damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
    except Exception:  # damaged EXIF data makes Pillow raise almost any exception
        return 1
    return orientation if orientation in range(1, 9) else 1


def _pixels(image, data, scale, fast):
    """Decodes an opened image to RGB [height, width, 3]. Returns that and its scale, which is 1 unless it is a JPEG.

    `fast` is the official code's transform, within one grey level of the exact one, which Pillow also uses.
    """
    if image.format not in ("JPEG", "MPO"):
        return _rgb(image), 1
    if image.mode != "CMYK":
        width, height = (math.ceil(n / scale) for n in image.size)
        try:
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, fastdct=fast), scale
        except ValueError:
            pass  # libjpeg refuses even harmless damage; Pillow tolerates it
    run_decoder(image.draft, None, (image.width // scale, image.height // scale))
    return _rgb(image), scale


def _rgb(image):
    """Decodes any mode to RGB [height, width, 3]."""
    from flip_jax.data import rare_images

    run_decoder(image.load)
    return rare_images.rgb(image)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """Converts a whole image to uint8 RGB [height, width, 3], on white and turned as EXIF says."""
    return _upright(_rgb(image), _orientation(image))


def _upright(pixels, orientation):
    """Turns stored pixels upright, from how EXIF says that they are stored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def resize(pixels: np.ndarray, window: Sequence[float], size: int, settings: DataConfig, train: bool) -> np.ndarray:
    """Resizes a window, which may start and end between pixels, to uint8 [size, size, 3]; ignores all beyond it."""
    left, top, width, height = window
    x, y = int(left), int(top)
    pixels = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    official = settings.resize == "official"
    if official and not (train and cykooz_resizer):
        from flip_jax.data import rare_images

        return rare_images.resize_official(pixels, size, train)
    left, top = left - x, top - y
    if not (train and cykooz_resizer):  # evaluation uses the exact pixels that other tools use
        box = (left, top, left + width, top + height)
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
    kind, algorithm = cykooz_resizer.PixelType.U8x3, _algorithm(official)
    box = cykooz_resizer.CropBox(left, top, width, height)
    options = cykooz_resizer.ResizeOptions(algorithm, crop_box=box)
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    target = cykooz_resizer.ImageData(size, size, kind)
    _own.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


class _Own(threading.local):
    """The resizer of each thread, which keeps its buffers from image to image."""

    def __init__(self):
        self.resizer = cykooz_resizer.Resizer()


_own = _Own() if cykooz_resizer else None


@functools.cache
def _algorithm(official):
    """Returns the resizer's bicubic; its own class cannot ask for an interpolation."""
    algorithms = cykooz_resizer.Algorithm
    return types.SimpleNamespace(
        algorithm=algorithms.interpolation if official else algorithms.convolution,
        filter_type=cykooz_resizer.FilterType.catmull_rom,
        multiplicity=None,
    )
