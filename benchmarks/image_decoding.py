"""Compare decoders and resizers of JPEGs: training crops of 224 px per second on one core.

usage: taskset -c 1 python -m benchmarks.image_decoding [webdataset:PATTERN]

Without a pattern it generates images of 256 to 1,600 px. All variants run in turn, three times, on the same windows.
Prints one JSON line each: the median rate, its ratio to Pillow alone, and the mean difference in gray levels from
Pillow's full decode and antialiased resize, on average and for the worst image. "flip_jax" is `transforms.decode` with
its checks; the others only decode, crop and resize. Libraries that are not installed are skipped.
"""

import functools
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from flip_jax.config import DataConfig
from flip_jax.data import sources, transforms

try:
    import cv2

    cv2.setNumThreads(1)
except ImportError:
    cv2 = None

SIZE, IMAGES, ROUNDS = 224, 400, 3
SETTINGS = DataConfig(flip=False)


def main(source: str = "") -> None:
    images, windows = [], []
    for data in load(source) if source else generate():
        image = Image.open(io.BytesIO(data))
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            rng = transforms.generator(0, 0, str(len(images)))
            windows.append(transforms.train_window(image.height, image.width, SIZE, SETTINGS, rng))
            images.append(data)
    variants, rates, results = make_variants(), {}, {}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            start = time.perf_counter()
            results[name] = [variant(i, data, windows[i]) for i, data in enumerate(images)]
            rates.setdefault(name, []).append(len(images) / (time.perf_counter() - start))
    truth = np.stack(results["pillow + pillow"]).astype(np.int16)
    base = statistics.median(rates["pillow + pillow"])
    for name in variants:
        error = np.abs(np.stack(results[name]) - truth).mean((1, 2, 3))
        rate = statistics.median(rates[name])
        row = {"variant": name, "images_per_s": round(rate, 1), "ratio": round(rate / base, 2)}
        print(json.dumps(row | {"difference": round(error.mean(), 3), "worst": round(error.max(), 3)}))


def load(source: str) -> list[bytes]:
    """Read the first images of a source."""
    opened = sources.open_source(source, DataConfig())
    records = sources.in_order(opened, iter(range(len(opened))))
    return [record["image"] for record in itertools.islice(records, IMAGES) if "image" in record]


def generate() -> list[bytes]:
    """Generate JPEGs with about as much detail as photos: noise whose power falls with its frequency."""
    rng, images = np.random.default_rng(0), []
    for side in (256, 384, 512, 800, 1600):
        size = side, side * 3 // 4
        pixels = 128.0
        for grain in (3, 6, 12, 25, 50, 100, 200):
            noise = Image.fromarray(rng.integers(0, 256, (grain, grain, 3), np.uint8))
            pixels = pixels + (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), float) - 128) * 3 / grain**0.5
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        images += [out.getvalue()] * 8
    return images


def make_variants() -> dict[str, Callable]:
    """Return {"DECODER + RESIZER": function of the number, bytes and window of an image}."""
    decoders = {"pillow": pillow, "pillow scaled": pillow_scaled, "simplejpeg": simplejpeg.decode_jpeg}
    decoders["simplejpeg scaled"] = simplejpeg_scaled
    if cv2:
        decoders["opencv"] = opencv
    resizers = {"pillow": resize}
    if transforms.cykooz_resizer:
        resizers["cykooz_resizer"] = lambda pixels, box: transforms.resize(pixels, box, SIZE, SETTINGS, train=True)
    variants = {}
    for (decoder, decode), (resizer, fit) in itertools.product(decoders.items(), resizers.items()):
        scaled = "scaled" in decoder
        variants[f"{decoder} + {resizer}"] = functools.partial(decode_and_fit, decode, fit, scaled)
    return variants | {"flip_jax": flip_jax}


def flip_jax(i, data, window):
    return transforms.decode(data, SIZE, SETTINGS, transforms.generator(0, 0, str(i)))


def decode_and_fit(decode, fit, scaled, i, data, window):
    scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(window[2:]) >= 2 * s * SIZE) if scaled else 1
    pixels = decode(data, scale) if scaled else decode(data)
    return fit(pixels, [x / scale for x in window])


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_scaled(data, scale):
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // scale, image.height // scale))
    return np.asarray(image.convert("RGB"))


def simplejpeg_scaled(data, scale):
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, min_height=math.ceil(height / scale), min_width=math.ceil(width / scale))


def opencv(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def resize(pixels, window):
    left, top, width, height = window
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


if __name__ == "__main__":
    main(*sys.argv[1:])
