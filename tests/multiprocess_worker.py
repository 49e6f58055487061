"""One of several processes with eight CPU devices in all: trains three steps; the first writes losses and parameters.

usage: multiprocess_worker.py COORDINATOR PROCESSES PROCESS_ID OUT.npz
"""

import sys

import helpers
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from helpers import with_noise
from jax.experimental import multihost_utils

from flip_jax import sharding, train_step
from flip_jax.config import MeshConfig

coordinator, processes, process, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(coordinator, processes, process)
mesh = sharding.make_mesh(MeshConfig(fsdp=2))
with jax.set_mesh(mesh):
    program = train_step.make_program(helpers.CONFIG, mesh)
    state, losses = program.init(), []
    whole = multihost_utils.process_allgather(state.params, tiled=True)
    state = state._replace(params=jax.tree.map(with_noise, whole, program.state.params))
    for step in range(3):
        count = helpers.CONFIG.global_batch_size // processes
        own = slice(count * process, count * (process + 1))
        rows = (array[own] for array in helpers.batch(seed=step))
        state, report = program.step(state, *sharding.to_devices(mesh, *rows))
        losses.append(float(report["loss"]))
    params = multihost_utils.process_allgather(state.params, tiled=True)
if process == 0:
    np.savez(out, losses=losses, **flatten_dict(params, sep="/"))
