"""The memory of a machine whose CPUs are the devices: what is free, and what a run holds outside of its step."""

import pathlib
import re

import jax
from jax.sharding import Mesh

from flip_jax import memory
from flip_jax.config import Config
from flip_jax.train_step import Program

RECORD = 64 * 1024  # bytes of an encoded record in the shuffle window, a generous mean


def held_bytes(config: Config, program: Program, mesh: Mesh) -> float:
    """Bytes that a run holds outside of its step, as a device's share.

    These are the batch that was assembled and the next one, the state that is being saved, and the shuffle window.
    """
    local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    window = config.data.shuffle_window * RECORD / max(local, 1)
    return 2 * memory.image_bytes(config, mesh) + memory.tree_bytes(program.state) + window


def available(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that processes of this machine or container can still take: the least of what Linux says, else None."""

    def read(path):
        return path.read_text() if path.is_file() else ""

    found = [1024 * int(kib) for kib in re.findall(r"^MemAvailable: *(\d+) kB", read(root / "proc/meminfo"), re.M)]
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup" / ("memory" if controllers else "")  # version 1 or 2
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        # The limits of all groups above hold, too. In a container its own group may be mounted as the top one.
        inner = folder / path.strip("/")
        for group in (inner, *(parent for parent in inner.parents if parent.is_relative_to(folder))):
            most, used = (read(group / name).strip() for name in names)
            if most.isdigit() and used.isdigit():
                # Pages of files are given back when memory is short.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", read(group / "memory.stat"), re.M)
                found.append(max(int(most) - int(used) + (int(cached[1]) if cached else 0), 0))
    return min(found, default=None)
