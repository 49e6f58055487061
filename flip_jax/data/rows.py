"""The rows of CSV and TSV files."""

import csv
from collections.abc import Iterable, Iterator


def rows(text: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """The rows of the lines of a file, but empty ones; [""] for a line with a field above csv.field_size_limit.

    A quote that is left open, or closed before the field ends, is read with its line alone and swallows no other row.
    """
    text, again, taken = iter(text), [], []

    def lines():
        while line := again.pop() if again else next(text, ""):
            taken.append(line)
            yield line

    while True:
        taken.clear()
        try:
            row = next(csv.reader(lines(), delimiter=delimiter, strict=True), None)
        except csv.Error:
            again += reversed(taken[1:])
            try:
                row = next(csv.reader(taken[:1], delimiter=delimiter))
            except csv.Error:
                row = [""]
        if row is None:
            return
        if row:
            yield row
