"""The parts of `transforms` for images that are not plain JPEGs, for large or hostile ones, and the official resize."""

import io
import math
import re

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.data.transforms import MAX_SCANS, BadImage, run_decoder

BAND = 2**22  # pixels, converted at once
MAX_PARTS = 2**18  # segments of a JPEG; strips or tiles of a TIFF
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_LISTS = (273, 279, 324, 325)  # TIFF's tags with an entry for each strip or tile
_TILE = (322, 323)  # its width and height


class Reader(io.BytesIO):
    """Bytes that may be read a few times over, and not in tiny parts: Pillow loops over the parts of a header."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._left = 2**20 + 4 * len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._left -= 64 + len(found)
        if self._left < 0:
            raise OSError("too many parts")
        return found


def bounded(data: bytes, max_pixels: int) -> Reader:
    """Opens a large file or a TIFF. BadImage for one whose directory says that it would fill the memory."""
    if data[:2] in (b"II", b"MM"):
        _check_tiff(data, max_pixels)
    return Reader(data)


def check_scans(data: bytes) -> None:
    """Counts the scans of a JPEG itself, without those of a thumbnail in its header and of what follows its end.

    Raises:
      BadImage: there are more than `MAX_SCANS`.
    """
    at = scans = 0
    for _ in range(MAX_PARTS):
        match = _MARKER.search(data, at)
        if not match or match[1] == b"\xd9":
            return
        at, scans = match.end(), scans + (match[1] == b"\xda")
        if scans > MAX_SCANS:
            break
        at += 0 if match[1] in b"\x01\xd8" else int.from_bytes(data[at : at + 2])
    raise BadImage("too many scans")


def _check_tiff(data, max_pixels):
    """Reads the directory of a TIFF, before Pillow makes several objects of each strip or tile."""
    order, big = ("<" if data[:2] == b"II" else ">"), 43 in data[2:4]
    number = np.dtype(order + ("u8" if big else "u4"))
    entry = np.dtype([("tag", order + "u2"), ("type", order + "u2"), ("count", number), ("value", number)])
    try:
        place = int(np.frombuffer(data, number, 1, 8 if big else 4)[0])
        length = np.dtype(number if big else order + "u2")
        count = int(np.frombuffer(data, length, 1, place)[0])
        room = (len(data) - place - length.itemsize) // entry.itemsize
        entries = np.frombuffer(data, entry, min(count, room), place + length.itemsize)
    except (ValueError, OverflowError):
        return  # cut short, which Pillow says
    if (entries["count"][np.isin(entries["tag"], _LISTS)] > MAX_PARTS).any():
        raise BadImage("too many strips")
    # A number of 16 bits is at the start of its field.
    short = 8 * (number.itemsize - 2) if order == ">" else 0
    sides = entries[np.isin(entries["tag"], _TILE)]
    values = np.where(sides["type"] == 3, (sides["value"] >> short) & 0xFFFF, sides["value"])
    if math.prod(map(int, values)) > max_pixels:
        raise BadImage("too many pixels")


def rgb(image: Image.Image) -> np.ndarray:
    """Converts a loaded image of any mode to RGB [height, width, 3], transparency on white.

    A large one is converted a few rows at a time, so that no copies of all of it are held.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(image))
    (width, height), rows = image.size, max(1, BAND // image.width)
    if height <= rows:
        return np.asarray(_to_rgb(image))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom))))
    return pixels


def _to_rgb(image):
    """Converts an image of 8 bits."""
    if image.mode == "La":  # grey multiplied by its alpha, which only converts to LA
        image = run_decoder(image.convert, "LA")
    if "transparency" not in image.info and image.mode not in ("RGBA", "RGBa", "LA", "PA"):
        return image if image.mode == "RGB" else run_decoder(image.convert, "RGB")
    image = run_decoder(image.convert, "RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, (0, 0), image)
    return white


def eval_image(image: Image.Image, size: int, settings: DataConfig) -> np.ndarray:
    """Turns, crops and resizes an opened image of any mode, to the pixels that `decode` gives without a generator.

    Only a JPEG that is loaded already may differ, by a grey level, where `settings.resize` is "official".
    """
    if isinstance(image, JpegImageFile) and image.tile and image.fp:  # not loaded yet
        image.fp.seek(0)
        return transforms.decode(image.fp.read(), size, settings)
    pixels = transforms.upright_rgb(image)
    height, width = pixels.shape[:2]
    window = transforms.centre_window(height, width, min(height, width))
    return transforms.resize(pixels, window, size, settings, train=False)


def _eight_bits(image):
    """Scales grey values of more than 8 bits to uint8; BadImage where their range is unknown or unused."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise BadImage("float image outside [0, 1]")
        return _scaled(values, lambda band: np.rint(band * 255))
    # Only TIFF has other widths; Pillow opens 16-bit PPM as mode I. The first tag is the number of bits, the second is
    # 2 for signed values.
    bits = tags.get(258, (16,))[0] if tags or image.mode != "I" or image.format in ("PNG", "PPM") else 32
    full = 2.0 ** (bits - (tags.get(339, (1,))[0] == 2))
    if full == 2.0**32:
        values = values.view(np.uint32)  # Pillow reads unsigned values as signed ones
    if values.min() < 0 or (bits > 16 and 0 < values.max() < full / 256):
        raise BadImage("integer image of unknown range")
    return _scaled(values, lambda band: band * (256 / full))


def _scaled(values, scale):
    """Scales a few rows at a time to uint8: 64-bit copies of a large image would take gigabytes."""
    pixels, rows = np.empty(values.shape, np.uint8), 1 + BAND // values.shape[1]
    for top in range(0, len(values), rows):
        pixels[top : top + rows] = scale(values[top : top + rows]).astype(np.uint8)
    return pixels


def resize_official(pixels: np.ndarray, size: int, train: bool) -> np.ndarray:
    """Resizes as the official code does, bicubic without antialiasing; TensorFlow's oldest kernel in evaluation."""
    for _ in range(2):  # rows first; the swap makes columns the rows of the second pass
        index, weights = _taps(len(pixels), size, train)
        rows = pixels.reshape(len(pixels), -1)
        rows = sum(rows[i] * w[:, None] for i, w in zip(index.T, weights.T, strict=True))
        pixels = rows.reshape(size, -1, 3).swapaxes(0, 1)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _taps(length, size, train):
    """Finds the four source pixels of each of `size` pixels along one axis, and their weights: two arrays [size, 4]."""
    scale, a = length / size, -0.5 if train else -0.75
    place = (np.arange(size) + 0.5) * scale - 0.5 if train else np.arange(size) * scale
    first = np.floor(place)
    fraction = np.rint((place - first) * 1024) / 1024  # the official code has a table of 1024 weights
    steps = np.arange(-1, 3)
    index, d = first[:, None].astype(int) + steps, np.abs(fraction[:, None] - steps)
    weights = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4))
    if train:
        weights *= (index >= 0) & (index < length)
        weights /= weights.sum(1, keepdims=True)
    return index.clip(0, length - 1), weights.astype(np.float32)
