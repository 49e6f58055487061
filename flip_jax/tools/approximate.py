"""Approximate search in the folder that `flip embed` wrote, for more rows than can be read for each search.

A graph of all embeddings in half precision (the HNSW of usearch) is made at the first search and kept in the folder. It
holds 2 bytes for each number, and is mapped, not read.
"""

import hashlib
import json
import os
import pathlib

import numpy as np
from tqdm import tqdm

from flip_jax.runtime import UserError
from flip_jax.tools.index import Hit, Index, temporary

EXPANSION_ADD, EXPANSION_SEARCH = 128, 512  # nodes looked at: as usearch does by default, and eight times that


def is_installed() -> bool:
    """Tell whether usearch is."""
    try:
        import usearch.index  # noqa: F401
    except ImportError:
        return False
    return True


def graph_path(folder: pathlib.Path, index: Index) -> pathlib.Path:
    """Return the file of the graph, whose name depends on what was embedded by which model."""
    content = json.dumps(index.settings, sort_keys=True).encode()
    return folder / f"approximate-{hashlib.blake2b(content, digest_size=8).hexdigest()}.usearch"


def load(folder: pathlib.Path, index: Index):
    """Open the graph, or make it; UserError if it is damaged."""
    from usearch.index import Index as Graph

    path = graph_path(folder, index)
    if not path.exists():
        for old in folder.glob("approximate-*.usearch"):  # of other embeddings
            old.unlink()
        graph = Graph(ndim=index.settings["embed_dim"], metric="ip", dtype="f16", expansion_add=EXPANSION_ADD)
        first = 0
        with tqdm(desc="approximate index", total=index.settings["rows"], unit=" rows", mininterval=1) as bar:
            for block_NxE in index.blocks():
                rows = np.arange(first, first + len(block_NxE), dtype=np.uint64)
                graph.add(rows, block_NxE.astype(np.float32))
                first += len(block_NxE)
                bar.update(len(block_NxE))
        graph.save(os.fspath(temporary(path)))
        os.replace(temporary(path), path)
    try:
        graph = Graph.restore(os.fspath(path), view=True)
    except Exception as error:  # usearch's own kinds for a file that it did not write
        raise UserError(f"{path} is damaged: delete it, and the next search makes it again") from error
    if graph is None or len(graph) != index.settings["rows"]:
        raise UserError(f"{path} is damaged: delete it, and the next search makes it again")
    graph.expansion_search = EXPANSION_SEARCH  # type: ignore[misc]  # its setter follows another property
    return graph


def nearest(folder: pathlib.Path, index: Index, query_QxE: np.ndarray, top: int) -> list[list[Hit]]:
    """Return most of the `top` rows with the largest inner product with each query, best first.

    Scores are of embeddings in half precision, right within 0.001 for vectors of length 1.
    """
    matches = load(folder, index).search(np.atleast_2d(query_QxE).astype(np.float32), min(top, index.settings["rows"]))
    row_QxK = np.asarray(matches.keys).astype(np.int64).reshape(len(query_QxE), -1)
    return index.hits(1 - np.asarray(matches.distances).reshape(row_QxK.shape), row_QxK)
