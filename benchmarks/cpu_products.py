"""Measure the matrix products and the attention of step_time.py's CPU model at mask 0, by XLA and by torch in turn.

usage: python -m benchmarks.cpu_products [PEER_PYTHON [ROUNDS]]

In f32 at batch 32. Prints one JSON line each: milliseconds, GFLOP/s and busy cores, medians of ROUNDS (9). PEER_PYTHON
is the Python of an environment with torch. Attention is forward and backward, by each library's own function.
"""

import functools
import json
import math
import statistics
import sys

from benchmarks import turns

BATCH, HEADS, TOKENS, HEAD_DIM = 32, 6, 197, 64
X, H = (BATCH * TOKENS, HEADS * HEAD_DIM), (BATCH * TOKENS, 4 * HEADS * HEAD_DIM)  # tokens, hidden units of the MLP
PER_HEAD, SCORES = (BATCH, HEADS, TOKENS, HEAD_DIM), (BATCH, HEADS, TOKENS, TOKENS)
SQUARE, WIDER = (X[1], X[1]), (X[1], H[1])  # kernels
EINSUMS = {  # subscripts, and the shapes of both operands
    "projection": ("td,de->te", X, SQUARE),
    "projection, gradient of input": ("te,de->td", X, SQUARE),
    "projection, gradient of kernel": ("td,te->de", X, X),
    "mlp1": ("td,de->te", X, WIDER),
    "mlp1, gradient of input": ("te,de->td", H, WIDER),
    "mlp1, gradient of kernel": ("td,te->de", X, H),
    "scores": ("bhtd,bhsd->bhts", PER_HEAD, PER_HEAD),
    "weighted values": ("bhts,bhsd->bhtd", SCORES, PER_HEAD),
    "gradient of keys": ("bhts,bhtd->bhsd", SCORES, PER_HEAD),
}
ATTENTION = "attention, forward and backward"


def flops(name: str) -> float:
    """Count two per combination of an einsum's indices; attention has six products, each as large as the scores."""
    subscripts, left, right = EINSUMS["scores" if name == ATTENTION else name]
    sizes = dict(zip(subscripts.split("->")[0].replace(",", ""), left + right, strict=True))
    return (6 if name == ATTENTION else 1) * 2 * math.prod(sizes.values())


def serve(ones, einsum, attend) -> None:
    """Serve one library, given its ones, its einsum, and its attention of three [B, T, N, D] with the backward pass."""

    def program(function, *shapes):
        operands = [ones(shape) for shape in shapes]
        return lambda times: [function(*operands) for _ in range(times)]

    programs = {
        name: program(functools.partial(einsum, subscripts), *shapes) for name, (subscripts, *shapes) in EINSUMS.items()
    }
    programs[ATTENTION] = program(attend, *3 * [(BATCH, TOKENS, HEADS, HEAD_DIM)])
    turns.serve({}, programs)


def by_xla() -> None:
    import jax
    import jax.numpy as jnp

    einsum = jax.jit(jnp.einsum, static_argnums=0)
    attend = jax.jit(jax.grad(lambda *qkv: jax.nn.dot_product_attention(*qkv).sum(), argnums=(0, 1, 2)))
    ready = jax.block_until_ready
    serve(jnp.ones, lambda *arguments: ready(einsum(*arguments)), lambda *qkv: ready(attend(*qkv)))


def by_torch() -> None:
    import torch

    def attend(*qkv):
        leaves = [x.detach().requires_grad_() for x in qkv]
        attended = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
        attended.transpose(1, 2).sum().backward()

    serve(torch.ones, torch.einsum, attend)


def main(peer_python: str = "", rounds: str = "9") -> None:
    turns.keep_memory()
    sides = {"xla": sys.executable} | ({"torch": peer_python} if peer_python else {})
    workers = {side: turns.Worker([python, "-m", "benchmarks.cpu_products", side]) for side, python in sides.items()}
    try:
        found = {(name, side): [] for name in (*EINSUMS, ATTENTION) for side in workers}
        for _ in range(int(rounds)):
            for name, side in found:
                found[name, side].append(workers[side].turn(name))
    finally:
        for worker in workers.values():
            worker.close()
    for (name, side), measured in found.items():
        seconds, cores = map(statistics.median, zip(*measured, strict=True))
        row = {"product": name, "by": side, "ms": 1e3 * seconds, "gflops": flops(name) / seconds / 1e9, "cores": cores}
        print(json.dumps({key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()}))


if __name__ == "__main__":
    sides = {"xla": by_xla, "torch": by_torch}
    if sys.argv[1:2] and sys.argv[1] in sides:
        sides[sys.argv[1]]()
    else:
        main(*sys.argv[1:])
