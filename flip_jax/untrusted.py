"""Files and texts that a stranger may have made: bounded reads, and texts that a terminal or a page cannot obey."""

import os
import re
import stat
from typing import Any

from flip_jax.runtime import UserError

MAX_SETTINGS = 2**26  # bytes of a file of settings, names or results

# What moves the cursor, colours, hides or reverses text: control characters but newline and tab, and Unicode's marks
# of direction.
_CONTROLS = (
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
)
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~#!]")


def read_file(path: str | os.PathLike, limit: int = MAX_SETTINGS) -> bytes:
    """Reads a file.

    Raises:
      UserError: it is a pipe, device, socket or folder, which might never end, or has more than `limit` bytes.
      OSError: it cannot be read.
    """
    # A pipe that nobody writes to would block `open` itself.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{os.fspath(path)} is not a regular file; copy its content into one")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{os.fspath(path)} has more than the {limit:,} bytes that are read; use a smaller file")
    return content


def plain(text: str) -> str:
    """Escapes what a terminal obeys rather than shows, and what cannot be encoded."""
    return text.translate(_ESCAPES).encode(errors="backslashreplace").decode()


def markdown(value: Any) -> str:
    """Escapes what Markdown obeys, for one line of text or a cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(plain(str(value)).split()))


def code(value: Any) -> str:
    """Formats a value as code in Markdown, also in a table."""
    return "`" + " ".join(plain(str(value)).split()).replace("`", "'").replace("|", r"\|") + "`"
