"""Compile FLIP L/16 at 65,536 for 256 TPU v3 cores with each setting that saves memory: one JSON line each.

python -m benchmarks.memory_levers        (pip install libtpu; no TPU is needed; one or two minutes per line)

The last line is for the loss alone, forward and backward, of 1,048,576 pairs.
"""

import importlib
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import config_check, losses, sharding
from flip_jax.config import MeshConfig
from flip_jax.tools import aot

TOPOLOGY = "v3:16x8"
LEVERS = (
    "model.remat=none",
    "model.remat=dots",
    "model.remat=names",
    "model.remat=full",
    "model.remat=dots,mesh.fsdp=8",
    "model.remat=names,mesh.fsdp=8",
    "model.remat=full,mesh.fsdp=8",
    "model.remat=names,optim.mu_dtype=bfloat16",
    "model.remat=dots,microbatches=4",
    "model.remat=names,microbatches=4",
)
PAIRS, WIDTH = 2**20, 768


def loss_bytes() -> int:
    """Return a device's temporaries for the loss of `PAIRS` pairs and its gradients."""
    mesh = sharding.make_mesh(MeshConfig(), aot.devices(TOPOLOGY))
    rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    embeddings = jax.ShapeDtypeStruct((PAIRS, WIDTH), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(losses.info_nce, argnums=(0, 1, 2)))
        return step.lower(embeddings, embeddings, scale).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    recipe = importlib.import_module("configs.flip_l16")
    for levers in LEVERS:
        result = aot.analyse(config_check.from_config_dict(recipe.get_config(f"microbatches=1,{levers}")), TOPOLOGY)
        row = {"levers": levers, "fits": result["fits"], "gib": round(result["memory"]["peak"] / aot.GIB, 2)}
        row |= {"compile_seconds": round(result["compile_seconds"])}
        if "least_seconds" in result:
            row |= {
                "least_ms": round(1e3 * result["least_seconds"]),
                "bound_by": result["bound_by"],
                "recompute": round(result["flops"] / result["model_flops"], 2),
                "wire_gb": round(sum(c["wire_bytes"] for c in result["collectives"]) / 1e9, 2),
            }
        print(json.dumps(row), flush=True)
    print(json.dumps({"loss_pairs": PAIRS, "temporaries_gib": round(loss_bytes() / aot.GIB, 3)}), flush=True)


if __name__ == "__main__":
    main()
