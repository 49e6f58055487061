"""Small files that would take gigabytes or hours if they were read without bounds."""

import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow
from helpers import png
from PIL import Image
from pyarrow import parquet


def encoded(mode, size, form, **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def with_scans(count):
    """A progressive JPEG of 4 megapixels whose last scan is repeated, and its honest form."""
    data = encoded("RGB", (2000, 2000), "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(before=b"", after=b""):
    data = encoded("RGB", (40, 40), "PNG")
    begin, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:begin] + before + data[begin:end] + after + data[end:]


def tiff(*tags, after=b""):
    """A TIFF of 8 x 8 grey pixels with other or more tags (number, type, count, value); AT means the place after it."""
    usual = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, "AT")]
    entries = sorted({tag[0]: tag for tag in (*usual, (277, 3, 1, 1), (279, 4, 1, 64), *tags)}.values())
    at = 10 + 12 * len(entries) + 4
    listed = b"".join(struct.pack("<HHII", *tag[:3], at if tag[3] == "AT" else tag[3]) for tag in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + (after or bytes(64))


def images():
    """{name: (encoded image, the kind under which it is counted, "" for an honest one)}."""
    jpeg, large = encoded("RGB", (40, 40), "JPEG"), zlib.compress(bytes(2**28), 1)
    noise = b"\xff\xda" * 1000  # as in a film behind a photo, or in a thumbnail
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 128, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;"
    return {
        "scans": (with_scans(500), "too many scans"),
        "progressive": (with_scans(0), ""),
        "film": (with_scans(0) + noise, ""),
        "thumbnail": (jpeg[:2] + b"\xff\xe5" + struct.pack(">H", 2 + len(noise)) + noise + with_scans(0)[2:], ""),
        "segments": (jpeg[:2] + b"\xff\xfe\0\2" * 2**20 + jpeg[2:], "image does not decode"),
        "filling": (jpeg[:2] + b"\xff" * 2**22 + jpeg[2:], "image does not decode"),
        "text": (png_with(chunk(b"zTXt", b"a\0\0" + large)), "image does not decode"),
        "profile": (png_with(chunk(b"iCCP", b"a\0\0" + large)), "image does not decode"),
        "chunks": (png_with(after=chunk(b"prVt", b"") * 2**18), "image does not decode"),
        "comments": (screen + b"!\xfe\1a\0" * 2**19 + frame, "image does not decode"),
        "frame": (screen + frame, "too many pixels"),
        "disposal": (screen + b"!\xf9\4\x08\0\0\0\0" + frame, "too many pixels"),
        "strips": (
            tiff((257, 4, 1, 2**20), (273, 4, 2**20, "AT"), (278, 4, 1, 1), after=bytes(2**22)),
            "too many strips",
        ),
        "tile": (tiff((322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, "AT"), (325, 4, 1, 64)), "too many pixels"),
        "tiff": (tiff(), ""),
        "alpha": (encoded("RGBA", (5000, 5000), "PNG"), ""),
        "sixteen": (encoded("I;16", (5000, 5000), "PNG"), ""),
        "webp": (encoded("RGBA", (5000, 5000), "WEBP", method=0), ""),
        "many": (encoded("RGB", (9, 9), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9))] * 99), ""),
    }


def tables(folder):
    """{path: the kinds of its rows}."""
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), pyarrow.array([bytes(140 * 2**20)]))
    some = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64), pyarrow.array([bytes(5 * 2**20)]))
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(2**25, np.int32)), pyarrow.array(["a"]))
    wide = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(2**15, np.int32)), pyarrow.array(["a" * 2**20]))
    lists = pyarrow.ListArray.from_arrays
    nested = pyarrow.table({"jpg": [png(0)], "caption": ["a"]})
    cases = {
        "shared": ({"jpg": shared, "caption": ["a"] * 64}, ["row group too large"]),
        "some": ({"jpg": some, "caption": ["a"] * 64}, ["image does not decode"]),
        "plain": ({"jpg": [bytes(2**28)], "caption": ["a"]}, ["row group too large"]),
        "long": ({"jpg": [b"a"], "caption": lists([0, 2**25], long)}, ["row group too large"]),
        "wide": (
            {"jpg": [png(0), png(1)], "caption": lists([0, 2**15 - 1, 2**15], wide)},
            ["too large", ""],
        ),
        "deep": (nested.replace_schema_metadata({b"huggingface": b'{"info":' + b"[" * 10**5}), [""]),
        "list": (nested.replace_schema_metadata({b"huggingface": b'{"info": {"features": [1]}}'}), [""]),
        "broken": (nested.replace_schema_metadata({b"huggingface": b"\xff{"}), [""]),
    }
    for name, (columns, kinds) in cases.items():
        path, table = folder / f"{name}.parquet", columns
        if isinstance(columns, dict):
            table = pyarrow.table(columns)
        plain = {"use_dictionary": False} if name == "plain" else {}
        parquet.write_table(table, path, compression="zstd", store_schema=not isinstance(columns, dict), **plain)
        assert path.stat().st_size < 2**20
        yield f"parquet:{path}", set(kinds)


def tar_of_holes(path, sizes):
    """A tar whose members are holes, which take no room on the disk."""
    with open(path, "wb") as file:
        for i, size in enumerate(sizes):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size + -size % 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    return f"webdataset:{path}"
