"""Measure what checksums cost: saving, checking and restoring the state of a recipe, in turns.

python -m benchmarks.checksum_cost WORKDIR --config=configs/flip_l16.py --config.model.image.depth=12

Prints the seconds of each turn, by the clock and of the CPUs: where other programs run as well, the latter tell more. A
run that resumes checks the step and then restores it, so the files are read from the disk once: "cold" turns first drop
them from the page cache.
"""

import argparse
import os
import pathlib
import time

import grain
import jax
import numpy as np
from etils import epath

from flip_jax import checkpoint, config_check, damage, manifest, memory, sharding, train_step

TURNS = 3


def drop(folder: pathlib.Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(function, *arguments) -> np.ndarray:
    """Return how long a call takes, by the clock and in CPU seconds of all threads."""
    before = np.array([time.perf_counter(), time.process_time()])
    jax.block_until_ready(function(*arguments))
    return np.array([time.perf_counter(), time.process_time()]) - before


def main() -> None:
    """Save a state of random numbers, then check and restore it in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="an empty folder for the step")
    arguments, settings = parser.parse_known_args()
    config = memory.resolved(config_check.read_recipe(settings), remat="none", microbatches=1)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    rng = np.random.default_rng(0)

    def fill(like):
        values = rng.random(like.shape, np.float32) if like.ndim else np.zeros((), np.float32)
        return jax.device_put(values.astype(like.dtype), like.sharding)

    with jax.set_mesh(mesh):
        abstract = train_step.make_program(config, mesh).state
        checkpoints = checkpoint.Checkpoints(arguments.workdir, 1)
        batches = iter(grain.MapDataset.range(9).to_iter_dataset())
        state = jax.tree.map(fill, abstract)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        print(f"state of {size / 1e9:.2f} GB", flush=True)
        before = time.perf_counter()
        checkpoints.save(1, state, batches, None, config)
        print(f"save: {time.perf_counter() - before:.2f} s until training goes on", flush=True)
        checkpoints.wait()
        print(f"save: {time.perf_counter() - before:.2f} s in all", flush=True)
        del state
        step = epath.Path(checkpoints.directory / "1")
        (step / manifest.NAME).unlink()
        print(f"of which the manifest: {seconds(manifest.write, step)[0]:.2f} s, read back and synced", flush=True)
        for kind in ("warm", "cold"):
            for _ in range(TURNS):
                times = {}
                for name, function, given in (
                    ("check", damage.problems, (step,)),
                    ("restore", checkpoints.restore, (abstract, batches)),
                    ("restore alone", checkpoints.restore, (abstract, batches)),
                ):
                    if kind == "cold" and name != "restore":
                        drop(pathlib.Path(step))
                    times[name] = seconds(function, *given)
                found = ", ".join(f"{name} {wall:.2f} s ({cpu:.2f} s of CPU)" for name, (wall, cpu) in times.items())
                wall, cpu = (times["check"] + times["restore"]) / times["restore alone"] - 1
                print(f"{kind}: {found}: the check adds {wall:.1%} ({cpu:.1%} of CPU)", flush=True)
        checkpoints.close()


if __name__ == "__main__":
    main()
