"""Crops and decoding against independent maths, the official code's recordings, and Pillow itself."""

import dataclasses
import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flip_jax.config import Data
from flip_jax.data import transforms

DATA = Data()


def encode(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(height, width, seed=0):
    """A picture that a JPEG can hold: smooth, different everywhere, not symmetric."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y + seed), np.cos(5 * y - 2 * x), x - y * x]
    return Image.fromarray(np.stack([127 + 120 * w for w in waves], axis=-1).astype(np.uint8))


class Recorder(random.Random):
    """Remembers the numbers that it gave, so that the rule can be worked out again from them."""

    def __init__(self, seed):
        super().__init__(seed)
        self.uniforms, self.offsets = [], []

    def uniform(self, a, b):
        self.uniforms.append(value := super().uniform(a, b))
        assert a <= value <= b
        return value

    def randrange(self, n):
        self.offsets.append((value := super().randrange(n), n))
        return value


@pytest.mark.parametrize(
    "area, aspect", [((0.5, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.3), (0.5, 0.9)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_train_window_follows_the_official_rule(area, aspect):
    settings, sizes = Data(crop_area=area, crop_aspect=aspect), np.random.default_rng(0)
    for seed in range(300):
        height, width = (int(n) for n in sizes.integers(1, 700, 2))
        rng = Recorder(seed)
        left, top, w, h = transforms.train_window(height, width, 224, settings, rng)
        draws = np.array(rng.uniforms, np.float64).reshape(-1, 2)
        assert np.all((draws >= [area[0], np.log(aspect[0])]) & (draws <= [area[1], np.log(aspect[1])]))
        pixels, ratio = draws[:, 0] * (height * width), np.exp(draws[:, 1])
        widths, heights = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        assert not fits[:-1].any() and len(draws) <= 10
        if fits[-1]:
            assert (w, h) == (widths[-1], heights[-1])
            assert rng.offsets == [(left, width - w + 1), (top, height - h + 1)]
        else:
            side = max(1, math.floor(224 / 256 * min(height, width)))
            assert len(draws) == 10 and (w, h) == (side, side)
            assert 0 <= left - (width - side - left) <= 1 and 0 <= top - (height - side - top) <= 1
        assert 0 <= left and left + w <= width and 0 <= top and top + h <= height


def test_train_windows_are_spread_evenly():
    windows = [transforms.train_window(50, 50, 32, DATA, random.Random(i)) for i in range(4000)]
    left, top, w, h = np.array(windows, float).T
    assert abs(np.log(w / h).mean()) < 0.01 and 0.48 < (w * h / 2500).min() < 0.52 and (w * h).max() > 2400
    assert left.min() == top.min() == 0 and (left + w).max() == (top + h).max() == 50
    for start, length in ((left, w), (top, h)):
        free = length < 50
        assert abs((start[free] / (50 - length[free])).mean() - 0.5) < 0.02


def test_centre_window_is_the_official_one(recorded):
    with np.load(recorded / "image_preproc.npz") as file:
        for i in range(8):
            image, truth = Image.open(io.BytesIO(file[f"jpg_{i}"].tobytes())).convert("RGB"), file[f"evalcrop_{i}"]
            left, top, w, h = transforms.centre_window(image.height, image.width, min(image.size))
            assert (h, w) == truth.shape[:2]
            crop = np.asarray(image, int)[top : top + h, left : left + w]
            assert np.abs(crop - truth).mean() < 1.2  # two JPEG decoders; one pixel beside, it is 10 and more


def test_a_picture_of_the_right_size_is_not_touched():
    image = photo(48, 48)
    np.testing.assert_array_equal(transforms.decode(encode(image), 48, DATA), np.asarray(image))
    whole = dataclasses.replace(DATA, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False)
    np.testing.assert_array_equal(transforms.decode(encode(image), 48, whole, random.Random(0)), np.asarray(image))


def test_evaluation_takes_the_centre_square():
    image = photo(60, 90)
    truth = np.asarray(image.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC), int)
    ours = transforms.decode(encode(image), 32, DATA)
    assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
    assert np.abs(ours - truth).max() <= 6 and np.abs(ours - truth)[:, 2:-2].max() <= 1  # taps beyond the edge are real
    np.testing.assert_array_equal(transforms.eval_image(image, 32), ours)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    assert np.abs(transforms.decode(encode(stripes), 32, DATA).astype(int) - 127).max() <= 6


def test_half_of_the_training_pictures_are_mirrored_and_nothing_else_changes():
    still, data = dataclasses.replace(DATA, flip=False), encode(photo(50, 64))
    mirrored = 0
    for i in range(200):
        plain = transforms.decode(data, 32, still, transforms.generator(0, 0, str(i)))
        flipped = transforms.decode(data, 32, DATA, transforms.generator(0, 0, str(i)))
        mirrored += np.array_equal(flipped, plain[:, ::-1])
        assert np.array_equal(flipped, plain) != np.array_equal(flipped, plain[:, ::-1])
    assert 70 < mirrored < 130


def test_random_numbers_depend_on_seed_epoch_and_key_alone():
    first = [
        transforms.generator(*key).random() for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "é"))
    ]
    again = [
        transforms.generator(*key).random() for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "é"))
    ]
    assert first == again and len(set(first)) == 5
    assert transforms.generator(0, 0, "a").random() == pytest.approx(GOLDEN, abs=1e-15)  # may not change: crops would


GOLDEN = 0.5012923276045466


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((20, 20), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 200 * 256 + 7, np.uint16))
    elif mode == "1":
        image = grey.point(lambda v: 255).convert("1")
    else:
        image = grey.convert(mode) if mode in ("L", "LA", "P") else grey.convert("RGB").convert(mode)
    data = encode(image, "JPEG", quality=100) if mode in ("CMYK", "YCbCr") else encode(image)
    ours = transforms.decode(data, 20, DATA)
    assert ours.shape == (20, 20, 3)
    assert np.abs(ours.astype(int) - (255 if mode == "1" else 200)).max() <= 2


def test_transparency_is_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    indexed = Image.fromarray(np.zeros((16, 16), np.uint8), "P")
    indexed.putpalette([0, 0, 255])
    for data, colour in (
        (encode(clear), (255, 255, 255)),
        (encode(half), (255, 127, 127)),
        (encode(indexed, transparency=0), (255, 255, 255)),
        (encode(Image.new("RGB", (16, 16), "green"), transparency=(0, 128, 0)), (255, 255, 255)),
        (encode(Image.new("LA", (16, 16), (9, 0))), (255, 255, 255)),
    ):
        assert np.abs(transforms.decode(data, 16, DATA).astype(int) - colour).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_set_upright(orientation):
    upright = photo(40, 64)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the picture that way
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    ours = transforms.decode(encode(stored, "JPEG", quality=100, exif=exif), 40, DATA).astype(int)
    assert np.abs(ours - transforms.eval_image(upright, 40)).mean() < 2


def test_large_jpegs_are_decoded_small_without_a_visible_difference():
    image, size = photo(1100, 1500), 64
    jpeg = encode(image, "JPEG", quality=95)
    exact = transforms.decode(encode(Image.open(io.BytesIO(jpeg))), size, DATA)
    assert np.abs(transforms.decode(jpeg, size, DATA).astype(int) - exact).max() <= 4
    for i in range(5):
        crops = [
            transforms.decode(data, size, DATA, random.Random(i))
            for data in (jpeg, encode(Image.open(io.BytesIO(jpeg))))
        ]
        assert np.abs(crops[0].astype(int) - crops[1]).max() <= 4


def test_pictures_over_the_limit_are_not_decoded():
    size = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\x00\x00\x00"
    header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + b"\0\0\1\0IDAT"
    with pytest.raises(transforms.BadImage, match="^too many pixels$"):
        transforms.decode(b"\x89PNG\r\n\x1a\n" + header, 32, DATA)
    small = dataclasses.replace(DATA, max_image_pixels=99)
    with pytest.raises(transforms.BadImage, match="^too many pixels$"):
        transforms.decode(encode(photo(10, 10)), 8, small)
    transforms.decode(encode(photo(9, 11)), 8, small)


def test_damaged_pictures_have_one_error():
    jpeg, png = encode(photo(64, 64), "JPEG"), encode(photo(64, 64))
    for data in (
        b"",
        b"nonsense",
        jpeg[: len(jpeg) // 2],
        png[: len(png) // 2],
        jpeg[:20],
        b"<svg></svg>",
        b"%!PS-Adobe-3.0 EPSF",
    ):
        with pytest.raises(transforms.BadImage, match="^image does not decode$"):
            transforms.decode(data, 32, DATA)
    rng = np.random.default_rng(0)
    for data in [jpeg, png] * 100:
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 5):
            damaged[place] = rng.integers(256)
        try:
            assert transforms.decode(bytes(damaged), 32, DATA, random.Random(0)).shape == (32, 32, 3)
        except transforms.BadImage:
            pass
