"""Runs `flip prepare` in this process, and reads what it wrote."""

import tarfile

from flip_jax.config import DataConfig
from flip_jax.data import sources
from flip_jax.tools import prepare as prepare_tool
from flip_jax.tools import units
from flip_jax.tools.source_units import SourceUnits


def prepare(source, out, shards=4, shortest_side=None, seed=0, crew=units.HERE, **filters):
    settings = {"source": source, "shards": shards, "shortest_side": shortest_side, "seed": seed, **filters}
    cut = SourceUnits(source, sources.open_source(source, DataConfig()), DataConfig())
    return prepare_tool.prepare(cut, DataConfig(), out, settings, crew)


def contents(folder):
    """{name: bytes} of each tar of a folder, read by the standard library."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append({member.name: tar.extractfile(member).read() for member in tar})
    return found
