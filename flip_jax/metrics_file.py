"""The metrics that a run has written: metrics.jsonl, or metrics-000001.jsonl and so on in an object store."""

import json
import math
import re

from etils import epath

from flip_jax import manifest
from flip_jax.runtime import say


def read(workdir: epath.Path) -> list[dict[str, float]]:
    """Reads the metrics of a run, in the order written; a line that a kill cut short or that is damaged is skipped."""
    return [line for path in _files(workdir) for line in map(_parse, _lines(path)) if line]


def drop_after(workdir: epath.Path, step: int) -> None:
    """Removes the lines of steps after `step`, which are trained again, and damaged lines, which it counts."""
    for path in _files(workdir):
        parsed = [(line, _parse(line)) for line in _lines(path)]
        if bad := sum(not content for _, content in parsed):
            say(f"{path}: dropped {bad} damaged line{'s' * (bad > 1)} of {len(parsed)}")
        kept = b"".join(line + b"\n" for line, content in parsed if content and content["step"] <= step)
        if kept != path.read_bytes():
            _replace(path, kept)


def _files(workdir: epath.Path) -> list[epath.Path]:
    """Lists the files in the order written."""
    ours = (path for path in workdir.glob("metrics*.jsonl") if re.fullmatch(r"metrics(-\d{6,})?.jsonl", path.name))
    return sorted(ours, key=lambda path: (len(path.name), path.name))


def _lines(path: epath.Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line]


def _parse(line: bytes) -> dict[str, float] | None:
    """Reads a line of metrics; None for one that was cut short by a kill or is damaged otherwise."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(content, dict) and all(type(value) in (int, float) for value in content.values())
    return content if numbers and math.isfinite(content.get("step", math.nan)) else None


def _replace(path: epath.Path, content: bytes) -> None:
    """Replaces a file in one go, so that a kill leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    manifest.measure(new, sync=True)
    new.replace(path)
