"""Matrix products and attention of a block of step_time.py's CPU model at mask 0, by XLA and by torch, in turn.

usage: python -m benchmarks.cpu_products [PEER_PYTHON [ROUNDS]]

f32, batch 32. Each is a line: milliseconds, GFLOP/s and how many cores were busy, medians of ROUNDS (9). PEER_PYTHON is
that of an environment with torch. Attention is forward and backward, by each library's own function.
"""

import json
import math
import os
import sys

import numpy as np

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
    """Of the products: two for each index of an einsum, and attention has six, as large as the scores."""
    subscripts, *shapes = EINSUMS["scores" if name == ATTENTION else name]
    sizes = {
        index: size
        for indices, shape in zip(subscripts.split("->")[0].split(","), shapes, strict=True)
        for index, size in zip(indices, shape, strict=True)
    }
    return (6 if name == ATTENTION else 1) * 2 * math.prod(sizes.values())


def by_xla() -> None:
    import jax
    import jax.numpy as jnp

    def program(function, *shapes):
        compiled, operands = jax.jit(function), [jnp.ones(shape) for shape in shapes]
        return lambda times: [jax.block_until_ready(compiled(*operands)) for _ in range(times)]

    programs = {
        name: program(lambda a, b, subscripts=subscripts: jnp.einsum(subscripts, a, b), *shapes)
        for name, (subscripts, *shapes) in EINSUMS.items()
    }
    by_token = (BATCH, TOKENS, HEADS, HEAD_DIM)
    loss = jax.grad(lambda *qkv: jax.nn.dot_product_attention(*qkv).sum(), argnums=(0, 1, 2))
    programs[ATTENTION] = program(loss, by_token, by_token, by_token)
    turns.serve({}, programs)


def by_torch() -> None:
    import torch

    def program(function, *shapes):
        operands = [torch.ones(shape) for shape in shapes]
        return lambda times: [function(*operands) for _ in range(times)]

    programs = {
        name: program(lambda a, b, subscripts=subscripts: torch.einsum(subscripts, a, b), *shapes)
        for name, (subscripts, *shapes) in EINSUMS.items()
    }

    def attend(*qkv_BxTxNxD):
        leaves = [x.detach().requires_grad_() for x in qkv_BxTxNxD]
        attended = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
        attended.transpose(1, 2).sum().backward()

    by_token = (BATCH, TOKENS, HEADS, HEAD_DIM)
    programs[ATTENTION] = program(attend, by_token, by_token, by_token)
    turns.serve({}, programs)


def main(peer_python: str = "", rounds: str = "9") -> None:
    for key, value in turns.HEAP.items():
        os.environ.setdefault(key, value)
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
        seconds, cores = np.median(measured, axis=0)
        row = {"product": name, "by": side, "ms": 1e3 * seconds, "gflops": flops(name) / seconds / 1e9, "cores": cores}
        print(json.dumps({key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()}))


if __name__ == "__main__":
    {"xla": by_xla, "torch": by_torch}.get("".join(sys.argv[1:2]), lambda: main(*sys.argv[1:]))()
