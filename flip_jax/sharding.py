"""The device mesh and the rules that lay logical axes on it. Nothing else in the project names a mesh axis.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also splits parameters and optimizer state, `tensor` splits heads
and the MLP's hidden units.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flip_jax.config import MeshConfig
from flip_jax.runtime import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": None,  # 30,523 divides by no useful number of devices
    "layers": None,  # scanned over
    "norm": None,  # vectors: a gather would cost more than it saves
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices (default: all of the run's) out as data x fsdp x tensor; TPU slices split only `data`.

    Raises:
      UserError: the devices, or those of each slice, do not divide by fsdp * tensor.
    """
    devices = devices or jax.devices()
    on_tpu = devices[0].platform == "tpu"  # on GPUs a node is a slice, and fsdp may span several
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    inner = config.fsdp * config.tensor
    if len(devices) % (slices * inner):
        raise UserError(
            f"config.mesh: fsdp {config.fsdp} x tensor {config.tensor} = {inner} does not divide the "
            f"{len(devices) // slices} devices of {'this run' if slices == 1 else f'each of the {slices} slices'}; "
            "choose sizes whose product does"
        )
    shape = (len(devices) // slices // inner, config.fsdp, config.tensor)
    # jax.make_mesh would refuse sizes that do not match the axes of the machine's torus, such as 8 on 4x4x4 chips.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:  # the network between them is slow: only gathers of embeddings and sums of gradients cross it
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), **options)
    else:
        grid = mesh_utils.create_device_mesh(shape, **options)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """Counts the parts that the global batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Applies the rule of each logical name; a dimension that does not divide by its mesh axis is not split."""
    axes = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES[name] if name else None
        parts = mesh.shape[axis] if isinstance(axis, str) else batch_shards(mesh)
        axes.append(axis if axis and size % parts == 0 else None)
    return PartitionSpec(*axes)


def place(params: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """Lays out abstract parameters by their logical axes: shape, type and sharding of each, as a plain nested dict."""

    def placed(param):
        axes = spec(param.get_metadata()["axes"], param.shape, mesh)
        return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=NamedSharding(mesh, axes))

    return nnx.to_pure_dict(jax.tree.map(placed, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first dimension over the batch axes and keeps the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def to_devices(mesh: Mesh, *local: np.ndarray) -> Iterator[jax.Array]:
    """Yields the global batch, from the rows that each process holds."""
    rows = batch_sharding(mesh)
    return (jax.make_array_from_process_local_data(rows, array) for array in local)


def split(arrays: Any, parts: int) -> Any:
    """Splits [B, ...] into [parts, B / parts, ...]; each part has equally many rows of every device, and none moves."""
    return jax.tree.map(lambda x: _constrain(_split(x, parts), PartitionSpec(None, BATCH)), arrays)


def join(arrays: Any) -> Any:
    """Undoes `split`."""
    return jax.tree.map(lambda x: by_batch(_join(x)), arrays)


def in_turn(function: Callable[[Any], jax.Array], arrays: Any, parts: int) -> jax.Array:
    """Applies a function of rows to one of `parts` of `split` after the other, and joins the results."""
    if parts == 1:
        return function(arrays)
    return _join(jax.lax.map(function, jax.tree.map(lambda x: _split(x, parts), arrays)))


def _split(x, parts):
    x = x.reshape(batch_shards_here(), parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(parts, -1, *x.shape[3:])


def _join(x):
    x = x.reshape(len(x), batch_shards_here(), -1, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(-1, *x.shape[3:])


def device_kind() -> str:
    """Says of what kind the mesh's devices are, which need not exist; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return "" if mesh.empty else mesh.abstract_device.device_kind


def batch_shards_here() -> int:
    """Counts the parts that the batch is split into by the mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def by_batch(x: jax.Array) -> jax.Array:
    """Keeps an activation split by batch only, so that FSDP gathers weights instead of splitting activations."""
    return _constrain(x, PartitionSpec(BATCH))


def whole(x: jax.Array) -> jax.Array:
    """Gathers a parameter that is about to be indexed, which could not be done in parts."""
    return _constrain(x, PartitionSpec())


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
