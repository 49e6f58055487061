"""One image, one tensor: bytes and opened images of every format and mode give the same pixels."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from flip_jax.config import DataConfig
from flip_jax.data import rare_images, records, transforms

DATA = DataConfig()


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def grey(values, format="TIFF", **options):
    return encode(Image.fromarray(values), format, **options)


RAMP = np.linspace(0, 1, 48 * 48).reshape(48, 48)


@pytest.mark.parametrize(
    "data",
    [
        grey((RAMP * 65535).astype(np.uint16)),
        grey((RAMP * 65535).astype(np.uint16), "PNG"),
        grey((RAMP * (2**31 - 1)).astype(np.int32)),
        grey(RAMP.astype(np.float32)),
        grey((RAMP * 255).astype(np.uint8), "PPM"),
    ],
    ids=["tiff16", "png16", "tiff32", "float", "pgm"],
)
def test_wide_grey_is_scaled_by_the_range_of_its_format(data):
    truth = np.repeat((RAMP * 255)[..., None], 3, axis=2)
    assert np.abs(transforms.decode(data, 48, DATA) - truth).max() <= 1


@pytest.mark.parametrize(
    "values, message",
    [
        ((RAMP * 255).astype(np.int32), "integer image of unknown range"),  # by its format it would be all black
        ((RAMP * 255).astype(np.float32), r"float image outside \[0, 1\]"),
        (np.full((48, 48), np.nan, np.float32), r"float image outside \[0, 1\]"),
    ],
)
def test_wide_grey_of_unknown_range_is_refused(values, message):
    with pytest.raises(transforms.BadImage, match=message):
        transforms.decode(grey(values), 48, DATA)


def files():
    """Yields (name, encoded image) of every format, mode and EXIF orientation that people have."""
    colour = photo(60, 91)
    alpha = np.dstack([np.asarray(colour), np.arange(60 * 91).reshape(60, 91) % 256]).astype(np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield f"{format} turned {orientation}", encode(colour, format, exif=exif)
    for mode, format in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("P", "PNG"), ("1", "BMP"), ("L", "TIFF")):
        yield f"{format} {mode}", encode(colour.convert(mode), format)
    for mode in ("RGBA", "LA"):
        yield mode, encode(Image.fromarray(alpha).convert(mode), "PNG")
    yield "palette", encode(colour.convert("P"), "PNG", transparency=3)
    yield "animated", encode(colour, "GIF", save_all=True, append_images=[photo(60, 91).rotate(180)])
    yield "16 bits", grey((RAMP * 65535).astype(np.uint16), "PNG")
    yield "ppm", encode(colour, "PPM")


@pytest.mark.parametrize("resize", ["antialias", "official"])
@pytest.mark.parametrize("name, data", list(files()), ids=lambda value: value if isinstance(value, str) else "")
def test_an_opened_file_gives_the_pixels_of_its_bytes(resize, name, data):
    settings = dataclasses.replace(DATA, resize=resize)
    ours, opened = transforms.decode(data, 32, settings), Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(rare_images.eval_image(opened, 32, settings), ours)
    if resize == "antialias":
        opened.load()
        np.testing.assert_array_equal(rare_images.eval_image(opened, 32, settings), ours)
        if "turned" in name and "TIFF" not in name:  # Pillow turns the pixels of a TIFF itself
            turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(rare_images.eval_image(turned, 32, settings), ours)


@pytest.mark.parametrize("name, data", list(files()), ids=lambda value: value if isinstance(value, str) else "")
def test_large_images_are_converted_in_bands_to_the_same_pixels(monkeypatch, name, data):
    whole = transforms.decode(data, 32, DATA)
    monkeypatch.setattr(rare_images, "BAND", 7 * 91)
    monkeypatch.setattr(transforms, "LARGE", 1)
    np.testing.assert_array_equal(transforms.decode(data, 32, DATA), whole)
    assert not transforms._large.locked()


def test_every_extension_of_the_list_is_that_of_a_format_that_decodes():
    Image.init()
    formats = {Image.registered_extensions()[f".{extension}"] for extension in records.IMAGES if extension != "mpo"}
    assert formats == set(transforms.FORMATS)
