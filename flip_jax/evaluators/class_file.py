"""A file of class names: one per line, or JSON."""

import json
import pathlib
import re
from typing import Any

from flip_jax import untrusted
from flip_jax.data import classes
from flip_jax.runtime import UserError

WANTED = (
    'config.eval.classnames must be a file with one name per line or JSON: a list of names, {"NUMBER OR FOLDER": '
    '"NAME", ...} or [["FOLDER", "NAME"], ...]'
)
NUMBERED = re.compile(r"(\d+|n\d{8})[\s,:;.)]+\S")  # a line that begins with a number or a WordNet id


def read(file: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the class names in a file, and what its source calls the classes, () if the file does not say.

    Raises:
      UserError: the file cannot be read or understood; the message has the place and the reason.
    """

    def refuse(reason):
        return UserError(f"{file!r} {reason}. {WANTED}")

    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise refuse("is not a file")
    try:
        content = untrusted.read_file(path)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refuse(
            f"cannot be read: line {line} is not UTF-8 (Latin-1 or UTF-16?); save it as UTF-8, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from None
    if text.lstrip()[:1] not in ("[", "{"):
        return _lines(text, refuse), ()
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"cannot be read: it begins like JSON, but {error}") from None
    own, names = _entries(parsed, refuse)
    if not names or not all(isinstance(name, str) and name.strip() for name in (*names, *own)):
        raise refuse("has entries that are not strings, or no names")
    return tuple(names), tuple(own)


def _lines(text, refuse):
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text.rstrip())]
    if "" in lines:
        raise refuse(f"has no name in line {lines.index('') + 1}, which would shift the classes after it: remove it")
    starts = [match[1] for match in map(NUMBERED.match, lines) if match]
    counted = classes.are_numbers(starts) and [int(start) - int(starts[0]) for start in starts] == [*range(len(lines))]
    if len(lines) > 1 and len(starts) == len(lines) and (counted or not any(start.isdigit() for start in starts)):
        raise refuse(f"has {starts[0]!r} before the first name, and more before the others: leave only the names")
    return tuple(lines)


def _entries(parsed: Any, refuse: Any) -> tuple[list[Any], list[Any]]:
    """Returns what the source calls the classes, [] if the JSON does not say, and their names."""
    if isinstance(parsed, list):
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in parsed):
            return [], parsed
        own, names = ([entry[i] for entry in parsed] for i in (0, 1))
        return _by_number([str(key) if type(key) is int else key for key in own], names, refuse)
    values = list(parsed.values())
    if all(type(value) is int for value in values):  # torchvision's class_to_idx: names to numbers
        return _by_number([str(value) for value in values], list(parsed), refuse)
    own, names = _by_number(list(parsed), values, refuse)
    if names and not own and all(isinstance(name, list) and len(name) == 2 for name in names):
        return [name[0] for name in names], [name[1] for name in names]  # Keras: number to [WordNet id, name]
    return own, names


def _by_number(own, names, refuse):
    """Sorts entries by what the source calls them, if these are numbers; the numbers from 0 on need not be kept."""
    if not (all(isinstance(name, str) for name in own) and classes.are_numbers(own)):
        return own, names
    numbers = sorted(int(name) for name in own)
    if len(set(numbers)) < len(numbers):
        raise refuse("has the same number twice")
    ordered = [name for _, name in sorted(zip(map(int, own), names, strict=True), key=lambda pair: pair[0])]
    return ([] if numbers == [*range(len(numbers))] else [str(number) for number in numbers]), ordered
