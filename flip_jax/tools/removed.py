"""What `flip prepare` did not write: counts by kind, with a few random examples of each, as a page."""

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

from PIL import Image

from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.tools.source_units import SourceUnits

EXAMPLES = 8  # of each kind
SIZE = 128  # pixels of an image on the page


def priority(unit: int, number: int) -> int:
    """Return a random number that is a record's own, so that samples do not depend on the order of units."""
    return int.from_bytes(hashlib.blake2b(f"{unit}/{number}".encode(), digest_size=7).digest())


class Examples:
    """Counts by kind, and of each the places of the `EXAMPLES` records with the least priority."""

    def __init__(self, counts: dict[str, int] | None = None, places: dict[str, list[list[Any]]] | None = None):
        self.counts: Counter[str] = Counter(counts or {})
        self.places = {kind: sorted(some) for kind, some in (places or {}).items()}

    def add(self, kind: str, priority: int, item: int, offset: int, note: str = "") -> None:
        """Count a record, at this place in the source."""
        self.counts[kind] += 1
        self._keep(kind, [[priority, item, offset, note]])

    def merge(self, counts: dict[str, int], places: dict[str, list[list[Any]]]) -> None:
        """Add the counts and examples of a unit."""
        self.counts.update(counts)
        for kind, some in places.items():
            self._keep(kind, some)

    def _keep(self, kind, some: Iterable[list[Any]]):
        self.places[kind] = sorted([*self.places.get(kind, []), *some])[:EXAMPLES]

    def plain(self) -> dict[str, Any]:
        """Return counts and places as `merge` takes them."""
        return {"counts": dict(sorted(self.counts.items())), "places": dict(sorted(self.places.items()))}

    def most_common(self) -> list[tuple[str, int]]:
        """Return kinds and counts, the largest first; ties by name, whatever the order of units was."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))


def page(source: SourceUnits, data: DataConfig, read: int, written: int, groups: dict[str, Examples]) -> str:
    """Return an HTML page of the examples in each group, which are read again; it needs no other file."""
    parts = [f"<h1>{html.escape(source.name)}</h1>\n<p>{read:,} records read, {written:,} written</p>"]
    for name, examples in groups.items():
        for kind, count in examples.most_common():
            parts.append(
                f"<h2>{name}: {count:,} {html.escape(kind)} ({count / max(1, read):.2%})</h2>\n<div class=some>"
            )
            parts += [_figure(source, data, *place[1:]) for place in examples.places.get(kind, ())]
            parts.append("</div>")
    style = (
        "body{font:14px sans-serif;margin:2em}.some{display:flex;flex-wrap:wrap;gap:12px}"
        f"figure{{margin:0;width:{SIZE}px;overflow-wrap:anywhere}}small{{display:block;color:#777}}"
        f".none{{width:{SIZE}px;height:{SIZE}px;background:#eee}}"
    )
    return (
        f"<!doctype html>\n<html><head><meta charset=utf-8><title>flip prepare</title><style>{style}</style></head>"
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _figure(source, data, item, offset, note):
    record = next((record for record, _ in source.source.read([(item, 0)], offset)), {"key": "", "bad": "missing"})
    caption = html.escape(" | ".join(record.get("texts", ()))[:200].encode(errors="replace").decode())
    key = html.escape(record["key"].encode(errors="replace").decode())
    note = f"<b>{html.escape(note)}</b> " if note else ""
    return f"<figure>{_image(record, data)}<figcaption>{note}{caption}<small>{key}</small></figcaption></figure>"


def _image(record, data):
    try:
        if "image" not in record:
            raise transforms.BadImage(record["bad"])
        image = transforms.open_image(record["image"], data)
        image.draft(None, (2 * SIZE, 2 * SIZE))
        pixels = Image.fromarray(transforms.upright_rgb(image))
    except transforms.BadImage as error:
        return f"<div class=none>{html.escape(str(error))}</div>"
    pixels.thumbnail((SIZE, SIZE))  # whole: what is narrow must be seen to be
    jpeg = io.BytesIO()
    pixels.save(jpeg, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
