"""What benchmarks keep and show: results as JSON lines, figures with their spread, pages with hand-written ends."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np


def read(path: pathlib.Path) -> list[dict]:
    """The results in a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: pathlib.Path, results: Iterable[dict]) -> None:
    """Adds a line for each result."""
    with path.open("a") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)


def mean_and_spread(values: Sequence[float]) -> str:
    """ "mean ± standard deviation", of which one value alone has none."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def write(path: pathlib.Path, text: str) -> None:
    """Writes a page; what followed the first "## " heading of an older one is kept."""
    _, mark, kept = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    path.write_text(text + mark + kept)
