"""Keep results of benchmarks as JSON lines, and write pages whose hand-written ends stay."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np


def read(path: pathlib.Path) -> list[dict]:
    """Return the results in a file of JSON lines; none if the file is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: pathlib.Path, results: Iterable[dict]) -> None:
    """Append a line for each result."""
    with path.open("a") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)


def mean_and_spread(values: Sequence[float]) -> str:
    """Format "mean ± standard deviation"; a single value has no deviation."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def write(path: pathlib.Path, text: str) -> None:
    """Write a page and keep everything from the first "## " heading of the old one."""
    _, mark, kept = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    part = path.with_suffix(".part")  # a page interrupted while it is written must not lose its rows
    part.write_text(text + mark + kept)
    part.replace(path)
