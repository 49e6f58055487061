"""Encoded pictures to uint8 RGB of the model's size."""

import io
import math
import random
import types

import numpy as np
import simplejpeg
from PIL import Image

from flip_jax.config import DataConfig

try:  # Pillow's resize but for rounding, in a quarter of the time; there are no wheels for Linux on ARM
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # told by their content, whatever a file is called
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
# Pillow would warn about large pictures and refuse larger ones. Here that is a setting, checked before decoding.
Image.MAX_IMAGE_PIXELS = None

Window = tuple[int, int, int, int]  # left, top, width, height in pixels


class BadImage(ValueError):
    """A picture that cannot be used; the message is the kind under which it is counted."""


def generator(seed: int, epoch: int, key: str) -> random.Random:
    """The random numbers of one record in one epoch, the same in every process. Half the time of NumPy's generators."""
    return random.Random(f"{seed}/{epoch}/{key}")


def train_window(height: int, width: int, size: int, settings: DataConfig, rng: random.Random) -> Window:
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


def decode(data: bytes, size: int, settings: DataConfig, rng: random.Random | None = None) -> np.ndarray:
    """A picture, cropped and resized as `settings.resize` says: uint8 [size, size, 3].

    The window, and whether it is flipped, are drawn from `rng`; without one it is the centre square. Of an animation
    it is the first frame. BadImage if the picture does not decode, or has more than `settings.max_image_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads no more than the header
        if image.width * image.height > settings.max_image_pixels:
            raise BadImage("too many pixels")
        orientation = _orientation(image)
        width, height = image.size if orientation < 5 else image.size[::-1]
        if rng:
            window = train_window(height, width, size, settings, rng)
        else:
            window = centre_window(height, width, min(height, width))
        scale = 1
        if settings.resize == "antialias" and rng:
            # A JPEG decodes to a half, quarter or eighth for less; the window keeps twice the pixels that are needed.
            scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(window[2:]) >= 2 * s * size)
        pixels, scale = _pixels(image, data, scale, settings)
        pixels = _resize(_upright(pixels, orientation), [x / scale for x in window], size, settings, train=bool(rng))
        return _mirrored(pixels) if rng and settings.flip and rng.random() < 0.5 else pixels
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise all sorts of things for damaged files
        raise BadImage("image does not decode") from error


def eval_image(image: Image.Image, size: int, settings: DataConfig) -> np.ndarray:
    """The centre square of a picture in any mode, as `decode` gives it without a generator."""
    window = centre_window(image.height, image.width, min(image.size))
    return _resize(np.asarray(_to_rgb(image)), window, size, settings, train=False)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """A whole picture as it is to be seen, uint8 [height, width, 3]: in RGB, on white, turned as EXIF says."""
    return _upright(np.asarray(_to_rgb(image)), _orientation(image))


def _mirrored(pixels):
    """Left and right exchanged. A channel at a time takes NumPy a quarter of the time that whole pixels take it."""
    mirrored = np.empty_like(pixels)
    for channel in range(3):
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def _orientation(image):
    """1 to 8, the EXIF orientation; upright if there is none that can be read."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
    except Exception:  # as many kinds as there are ways to damage it
        return 1
    return orientation if orientation in range(1, 9) else 1


def _pixels(image, data, scale, settings):
    """RGB [height, width, 3] of an opened picture, and the scale: if not JPEG it is 1."""
    if image.format not in ("JPEG", "MPO"):
        return np.asarray(_to_rgb(image)), 1
    if image.mode != "CMYK":
        width, height = (math.ceil(n / scale) for n in image.size)
        fast = settings.resize == "official"  # the official code's choice, a grey level from the exact transform
        try:
            return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, fastdct=fast), scale
        except ValueError:
            pass  # libjpeg has a complaint; Pillow forgives those that do no harm
    image.draft(None, (image.width // scale, image.height // scale))
    return np.asarray(_to_rgb(image)), scale


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


def _upright(pixels, orientation):
    """The picture as it is to be seen, from how EXIF says that it is stored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def _resize(pixels, window, size, settings, train):
    """A window, whose numbers may have fractions, to uint8 [size, size, 3]; nothing beyond it has an influence."""
    left, top, width, height = window
    x, y = int(left), int(top)
    pixels = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    official = settings.resize == "official"
    if official and not (train and cykooz_resizer):
        return _resize_official(pixels, size, train)
    left, top = left - x, top - y
    if not (train and cykooz_resizer):  # evaluation takes the very pixels that other tools take
        box = (left, top, left + width, top + height)
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
    kind, algorithms = cykooz_resizer.PixelType.U8x3, cykooz_resizer.Algorithm
    algorithm = types.SimpleNamespace(  # the library's own class has no way to ask for an interpolation
        algorithm=algorithms.interpolation if official else algorithms.convolution,
        filter_type=cykooz_resizer.FilterType.catmull_rom,
        multiplicity=None,
    )
    box = cykooz_resizer.CropBox(left, top, width, height)
    options = cykooz_resizer.ResizeOptions(algorithm, crop_box=box)
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], kind, pixels.tobytes())
    target = cykooz_resizer.ImageData(size, size, kind)
    cykooz_resizer.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


def _resize_official(pixels, size, train):
    """The official code's bicubics, which do not antialias: one for training, TensorFlow's oldest for evaluation."""
    for _ in range(2):  # to `size` rows; those are the columns of the next pass
        index, weights = _taps(len(pixels), size, train)
        rows = pixels.reshape(len(pixels), -1)
        rows = sum(rows[i] * w[:, None] for i, w in zip(index.T, weights.T, strict=True))
        pixels = rows.reshape(size, -1, 3).swapaxes(0, 1)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _taps(length, size, train):
    """Along one axis, the four pixels that make each of `size` pixels, and their weights: two arrays [size, 4]."""
    scale, a = length / size, -0.5 if train else -0.75
    place = (np.arange(size) + 0.5) * scale - 0.5 if train else np.arange(size) * scale
    first = np.floor(place)
    fraction = np.rint((place - first) * 1024) / 1024  # the official code looks its weights up in a table
    steps = np.arange(-1, 3)
    index, d = first[:, None].astype(int) + steps, np.abs(fraction[:, None] - steps)
    weights = np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4))
    if train:
        weights *= (index >= 0) & (index < length)
        weights /= weights.sum(1, keepdims=True)
    return index.clip(0, length - 1), weights.astype(np.float32)
