"""Measure the recall and the time of `flip search` with its approximate index, next to the exact search.

usage: python -m benchmarks.search_recall [--rows=100000] [--width=512] [--queries=200] [--top=20]

Needs usearch. The rows are unit vectors around as many centres as there are hundreds of rows; a query lies between a
row and a random vector, with a cosine of about 0.4 to the row, as texts lie to images. Prints JSON.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from flip_jax.tools import approximate
from flip_jax.tools import index as index_lib


def unit(x):
    """Return vectors of length 1."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write(folder, embedding_NxE, rows_per_part=10_000):
    """Write embeddings as `flip embed` does."""
    parts = {}
    for first in range(0, len(embedding_NxE), rows_per_part):
        some, name = embedding_NxE[first : first + rows_per_part], index_lib.part_name(first // rows_per_part, 0)
        keys = [str(first + i) for i in range(len(some))]
        columns = {"key": keys, "texts": [[key] for key in keys], "item": [0] * len(keys), "offset": [0] * len(keys)}
        index_lib.write_part(index_lib.part_path(folder, name), columns, some, {})
        parts[name] = len(some)
    settings = {"rows": len(embedding_NxE), "embed_dim": embedding_NxE.shape[1], "parts": parts}
    index_lib.write_text(folder / index_lib.INDEX, json.dumps(settings))


def measure(folder, arguments):
    """Return the measured figures."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, arguments.rows // 100), arguments.width))
    rows = unit(
        centres[rng.integers(0, len(centres), arguments.rows)] + rng.normal(size=(arguments.rows, arguments.width))
    )
    picked = rows[rng.integers(0, len(rows), arguments.queries)]
    queries = unit(0.4 * picked + 0.9 * unit(rng.normal(size=picked.shape)))
    write(folder, rows)
    index, found, seconds = index_lib.Index(folder), {}, {}
    searches = {
        "exact": lambda: index.nearest(queries, arguments.top),
        "first approximate": lambda: approximate.nearest(folder, index, queries, arguments.top),
        "approximate": lambda: approximate.nearest(folder, index, queries, arguments.top),
    }
    for name, search in searches.items():
        start = time.perf_counter()
        found[name] = [{hit.key for hit in hits} for hits in search()]
        seconds[name] = round(time.perf_counter() - start, 2)
    right = [len(a & b) / len(b) for a, b in zip(found["approximate"], found["exact"], strict=True)]
    return {"recall": round(float(np.mean(right)), 4), "least": min(right), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="embeddings")
    parser.add_argument("--width", type=int, default=512, help="of an embedding")
    parser.add_argument("--queries", type=int, default=200, help="searched together")
    parser.add_argument("--top", type=int, default=20, help="hits per query")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(vars(arguments) | measure(pathlib.Path(folder), arguments)), flush=True)


if __name__ == "__main__":
    main()
