"""Files and texts that a stranger may have made: bounded reads, and texts that a terminal or a page cannot obey."""

import os
import re
import stat
from collections.abc import Iterator
from typing import Any, TextIO

from flip_jax.runtime import UserError, is_remote

MAX_SETTINGS = 2**26  # bytes of a file of settings, names or results
MAX_LINE = 2**24  # characters
ITEMS = ("state",)  # of a step that hold more than that

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
# An underscore within a word is none of Markdown's marks.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~#!]|(?<![^\W_])_|_(?![^\W_])")


def read_file(path: str | os.PathLike, limit: int = MAX_SETTINGS) -> bytes:
    """Reads a file.

    Raises:
      UserError: it is a pipe or device, which might never end, or has more than `limit` bytes.
      OSError: it cannot be read.
    """
    # A pipe that nobody writes to would block `open` itself.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{os.fspath(path)} is not a regular file; copy its content into one")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{os.fspath(path)} has more than the {limit:,} bytes that are read; use a smaller file")
    return content


def lines(text: TextIO, path: str) -> Iterator[str]:
    """Yields the lines of a text, as it does itself. UserError for one that would fill the memory."""
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise UserError(f"{path} has a line of more than {MAX_LINE:,} characters; it is no text, or is damaged")
        yield line


def check_folder(folder: str | os.PathLike) -> None:
    """Checks that the files of a step's folder can be read without waiting for ever or filling the memory.

    Raises:
      UserError: a file that is no regular one, or settings or names of more than `MAX_SETTINGS` bytes.
    """
    if not is_remote(folder):
        for place, _, names in os.walk(os.fspath(folder)):
            item = os.path.relpath(place, folder).partition(os.sep)[0]
            for path in (os.path.join(place, name) for name in names):
                found = os.stat(path)
                if not stat.S_ISREG(found.st_mode):
                    raise UserError(f"{path} is not a regular file: the checkpoint is damaged; use another step")
                if item not in ITEMS and found.st_size > MAX_SETTINGS:
                    raise UserError(
                        f"{path} has {found.st_size:,} bytes, at most {MAX_SETTINGS:,} are read: the checkpoint is "
                        "damaged; use another step"
                    )


def plain(text: str, lines: bool = True) -> str:
    """Escapes what a terminal obeys rather than shows, and what cannot be encoded; without `lines`, makes one line."""
    text = text if lines else " ".join(text.split())
    return text.translate(_ESCAPES).encode(errors="backslashreplace").decode()


def markdown(value: Any) -> str:
    """Escapes what Markdown obeys, for one line of text or a cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", plain(str(value), lines=False))


def code(value: Any) -> str:
    """Formats a value as code in Markdown, also in a table."""
    return "`" + plain(str(value), lines=False).replace("`", "'").replace("|", r"\|") + "`"
