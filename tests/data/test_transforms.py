"""Crops and decoding against independent maths, the official code's recordings, and Pillow itself."""

import dataclasses
import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from flip_jax.config import DataConfig
from flip_jax.data import rare_images, transforms

DATA = DataConfig()
OFFICIAL = DataConfig(resize="official")
MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255


def encode(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(height, width, seed=0):
    """An image that a JPEG can hold: smooth, different everywhere, not symmetric."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y + seed), np.cos(5 * y - 2 * x), x - y * x]
    return Image.fromarray(np.stack([127 + 120 * w for w in waves], axis=-1).astype(np.uint8))


def use_library(monkeypatch, use):
    """With cykooz_resizer, or as where it is not installed."""
    if not use:
        monkeypatch.setattr(transforms, "cykooz_resizer", None)
    elif not transforms.cykooz_resizer:
        pytest.skip("cykooz_resizer is not installed")


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
    settings, sizes = DataConfig(crop_area=area, crop_aspect=aspect), np.random.default_rng(0)
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
        for i in (0, 1, 2, 4, 5):
            image, truth = Image.open(io.BytesIO(file[f"jpg_{i}"].tobytes())).convert("RGB"), file[f"evalcrop_{i}"]
            left, top, w, h = transforms.centre_window(image.height, image.width, min(image.size))
            assert (h, w) == truth.shape[:2]
            crop = np.asarray(image, int)[top : top + h, left : left + w]
            assert np.abs(crop - truth).mean() < 1.2  # two JPEG decoders; one pixel beside, it is 10 and more


@pytest.mark.parametrize("size", [64, 224])
def test_official_evaluation_images_are_the_recorded_ones(recorded, size):
    with np.load(recorded / "image_preproc.npz") as file:
        names = [name for name in file if name.startswith(f"eval{size}_")]
        assert len(names) == (5 if size == 64 else 1)
        rows = slice(None, None, 1 if size == 64 else 4)  # the recording at 224 px has every fourth row
        for name in names:
            truth = (file[name] * STD + MEAN).clip(0, 255)
            i = name.partition("_")[2]
            data = file[f"jpg_{i}"].tobytes()
            # The official code decodes the window alone, which moves what is next to its edges.
            assert np.abs(transforms.decode(data, size, OFFICIAL)[rows] - truth).mean() < 0.35
            crop = Image.fromarray(file[f"evalcrop_{i}"])
            assert np.abs(rare_images.eval_image(crop, size, OFFICIAL)[rows] - truth).max() < 0.51  # rounding


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", ["train64_0", "train64_1", "train64_3"])
def test_official_training_images_are_the_recorded_ones(recorded, monkeypatch, name, library):
    use_library(monkeypatch, library)
    with np.load(recorded / "image_preproc.npz") as file:
        truth = (file[name] * STD + MEAN).clip(0, 255)
        top, left, height, width = (int(n) for n in file[f"{name}_window_yxhw"])
        monkeypatch.setattr(transforms, "train_window", lambda *_: (left, top, width, height))
        data, settings = file[f"jpg_{file[f'{name}_jpg']}"].tobytes(), dataclasses.replace(OFFICIAL, flip=False)
        ours = transforms.decode(data, len(truth), settings, random.Random(0))
        assert np.abs(ours - truth).mean() < 0.35
        antialiased = transforms.decode(data, len(truth), DATA, random.Random(0))
        assert np.abs(antialiased - truth).mean() > 2


def test_a_image_of_the_right_size_is_not_touched():
    image = photo(48, 48)
    np.testing.assert_array_equal(transforms.decode(encode(image), 48, DATA), np.asarray(image))
    whole = dataclasses.replace(DATA, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False)
    np.testing.assert_array_equal(transforms.decode(encode(image), 48, whole, random.Random(0)), np.asarray(image))


def test_evaluation_takes_the_centre_square():
    image = photo(60, 90)
    truth = np.asarray(image.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC), int)
    ours = transforms.decode(encode(image), 32, DATA)
    assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
    assert np.abs(ours - truth).max() <= 1
    np.testing.assert_array_equal(rare_images.eval_image(image, 32, DATA), ours)


@pytest.mark.parametrize("library", [True, False])
def test_the_default_resize_is_pillows_of_the_cropped_image(monkeypatch, library):
    use_library(monkeypatch, library)
    # Far from black and white: which axis comes first would matter where the first one's result is clipped.
    noise = Image.fromarray(np.random.default_rng(0).integers(64, 192, (300, 200, 3), np.uint8))
    data, still = encode(noise), dataclasses.replace(DATA, flip=False, crop_area=(0.01, 1.0))
    for seed in range(20):
        left, top, w, h = transforms.train_window(300, 200, 48, still, random.Random(seed))
        truth = noise.crop((left, top, left + w, top + h)).resize((48, 48), Image.Resampling.BICUBIC)
        ours = transforms.decode(data, 48, still, random.Random(seed))
        assert np.abs(ours - np.asarray(truth, int)).max() <= (1 if library else 0)


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    assert np.abs(transforms.decode(encode(stripes), 32, DATA).astype(int) - 127).max() <= 6


def test_half_of_the_training_images_are_mirrored_and_nothing_else_changes():
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


def segments_without(jpeg, marker):
    """A JPEG without the segments of this marker."""
    kept, place = jpeg[:2], 2
    while jpeg[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        kept += b"" if jpeg[place + 1] == marker else jpeg[place:end]
        place = end
    return kept + jpeg[place:]


def test_cmyk_is_stored_inverted_whether_adobe_says_so_or_not():
    """As libvips reads it, which agrees on both files."""
    cyan = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), "JPEG", quality=100)  # with a fifth of black
    bare = segments_without(cyan, 0xEE)
    assert b"Adobe" in cyan and b"Adobe" not in bare
    for data in (cyan, bare):
        assert np.abs(transforms.decode(data, 16, DATA).astype(int) - (0, 204, 204)).max() <= 2


@pytest.mark.parametrize("settings", [DATA, OFFICIAL])
@pytest.mark.parametrize("kind", ["progressive", "grey", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PNG"])
def test_every_format_is_told_by_its_content(kind, settings):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image, other = photo(48, 48), photo(48, 48, seed=2)
    if kind == "progressive":
        data = encode(image, "JPEG", quality=95, progressive=True)
    elif kind == "grey":
        image = image.convert("L")
        data = encode(image, "JPEG", quality=95)
    elif kind == "GIF":
        image = image.quantize(256)
        data = encode(image, "GIF", save_all=True, append_images=[other])
    elif kind in ("WEBP", "MPO", "AVIF"):  # the first of several images
        data = encode(image, kind, save_all=True, append_images=[other], quality=95)
    else:
        data = encode(image, kind)
    error = np.abs(transforms.decode(data, 48, settings).astype(int) - np.asarray(image.convert("RGB")))
    assert error.mean() < (0.01 if kind in ("GIF", "BMP", "TIFF", "PNG") else 2)


def test_sixteen_bits_keep_the_upper_eight():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 200
    grey = encode(Image.fromarray(values))
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    rgb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    for data in (grey, rgb):
        np.testing.assert_array_equal(transforms.decode(data, 16, DATA)[..., 0], values >> 8)


@pytest.mark.parametrize("settings", [DATA, OFFICIAL])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1), (3, 700)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_absurd_shapes_decode(format, size, settings):
    data = encode(Image.new("RGB", size, (200, 100, 50)), format)
    for rng in (None, random.Random(0)):
        ours = transforms.decode(data, 32, settings, rng)
        assert ours.shape == (32, 32, 3) and np.abs(ours.astype(int) - (200, 100, 50)).max() <= 3


def test_harmless_damage_is_forgiven():
    image, size = photo(64, 64), 64
    jpeg = encode(image, "JPEG", quality=95)
    truth = transforms.decode(jpeg, size, DATA)
    after_end, before_end = jpeg + b"<html>", jpeg[:-2] + b"\0\0\0\xff\xd9"
    no_exif = encode(image, "JPEG", quality=95, exif=b"Exif\0\0no TIFF header")
    odd_exif = Image.Exif()
    odd_exif[0x0112] = 99
    for data in (after_end, before_end, no_exif, encode(image, "JPEG", quality=95, exif=odd_exif)):
        np.testing.assert_array_equal(transforms.decode(data, size, DATA), truth)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_set_upright(orientation):
    upright = photo(40, 64)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the image that way
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG"):
        for seed in (None, 0, 1):
            ours, truth = (
                transforms.decode(data, 10, DATA, None if seed is None else random.Random(seed)).astype(int)
                for data in (encode(stored, format, quality=100, exif=exif), encode(upright))
            )
            assert np.abs(ours - truth).mean() < (2 if format == "JPEG" else 0.01)


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


def test_images_over_the_limit_are_not_decoded():
    size = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\x00\x00\x00"
    header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + b"\0\0\1\0IDAT"
    with pytest.raises(transforms.BadImage, match="^too many pixels$"):
        transforms.decode(b"\x89PNG\r\n\x1a\n" + header, 32, DATA)
    small = dataclasses.replace(DATA, max_image_pixels=99)
    with pytest.raises(transforms.BadImage, match="^too many pixels$"):
        transforms.decode(encode(photo(10, 10)), 8, small)
    transforms.decode(encode(photo(9, 11)), 8, small)


def test_damaged_images_have_one_error():
    jpeg, png = encode(photo(64, 64), "JPEG"), encode(photo(64, 64))
    for data in (
        b"",
        b"nonsense",
        jpeg[: len(jpeg) // 2],
        png[: len(png) // 2],
        jpeg[:20],
        jpeg[:-20],
        b"<svg></svg>",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        bytes(5000),
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


@pytest.mark.parametrize("name", ["open", "load", "convert"])
@pytest.mark.parametrize("error", [TypeError, IndexError, SyntaxError, MemoryError, ZeroDivisionError])
def test_whatever_a_decoder_raises_is_a_bad_image(monkeypatch, name, error):
    def broken(*arguments, **keywords):
        raise error("damaged")

    data = encode(photo(10, 10).convert("P"))
    transforms.decode(data, 8, DATA)
    owner = Image if name == "open" else transforms.run_decoder(Image.open, io.BytesIO(data)).__class__
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(transforms.BadImage, match="^image does not decode$"):
        transforms.decode(data, 8, DATA)


@pytest.mark.parametrize("name", ["centre_window", "train_window", "_orientation", "_upright", "resize", "_mirrored"])
def test_our_own_errors_are_no_bad_images(monkeypatch, name):
    def broken(*arguments, **keywords):
        raise TypeError("a bug")

    monkeypatch.setattr(transforms, name, broken)
    with pytest.raises(TypeError, match="a bug"):
        for seed in range(20):
            rng = None if name == "centre_window" else random.Random(seed)
            transforms.decode(encode(photo(20, 20)), 8, DATA, rng)
