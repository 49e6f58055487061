"""The members of a tar, from any of them on."""

import re
from collections.abc import Iterator
from typing import BinaryIO

MAX_NAME = 2**20  # bytes
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's rule: the key ends at the first dot
_PAX = re.compile(rb"^\d+ (path|size)=(.*)$", re.MULTILINE)


class Damaged(Exception):
    """(kind, details): a shard of which nothing more can be read, however often one tries."""


def members(file: BinaryIO, offset: int) -> Iterator[tuple[str, str, bool, int, int]]:
    """(key, extension, whether it is a plain file in the archive, size, offset after it) of each member of a sample.

    The file stands at the member's data. The standard library takes three times as long, as much as to decode a small
    picture. Key "" says that the sample before is whole. Damaged where the tar ends without its end mark, a header is
    damaged, or it is no tar.
    """
    extended, ended = {}, False
    while True:
        file.seek(offset)
        block = file.read(512)
        if not block.strip(b"\0") and (ended or len(block) == 512):
            if len(block) < 512:
                return
            if not ended:
                yield "", "", True, 0, offset
            # A zeroed header looks like the end mark, and tars may be joined: the end is where nothing follows.
            offset, ended = offset + 512, True
            continue
        ended = False
        kind = block[156:157]
        try:
            size = int.from_bytes(block[125:136]) if block[124:125] == b"\x80" else _octal(block[124:136])
            size = size if kind in b"xgLK" else int(extended.get(b"size", size))
            checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
            if size < 0 or len(block) < 512 or _octal(block[148:156]) != checksum:
                raise ValueError
        except ValueError:
            if not block:  # only the end mark is missing: the sample before is whole
                yield "", "", True, 0, offset
            if offset or len(block) < 512:
                raise Damaged("tar cut short", f"at byte {offset}") from None
            raise Damaged("unreadable shard", "not a tar file") from None
        offset += 512 if kind in b"123456" else 512 + (size + 511) // 512 * 512
        if kind in b"xL":  # what does not fit in the header of the next member
            body = file.read(min(size, MAX_NAME))
            extended |= dict(_PAX.findall(body)) if kind == b"x" else {b"path": body}
        elif kind not in b"gK":
            name, prefix = block[:100], block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
            name = extended.get(b"path", prefix + b"/" + name if prefix else name).partition(b"\0")[0]
            name = name.decode(errors="replace")
            if match := _NAME.fullmatch(name):
                safe = kind in b"\x0007" and not name.startswith("/") and ".." not in name.split("/")
                yield match[1], match[2].lower(), safe, size, offset
            extended = {}


def _octal(field):
    return int(field.partition(b"\0")[0].strip() or b"0", 8)
