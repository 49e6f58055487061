"""Count what an optimized HLO module does on one device: matrix FLOPs, memory traffic, collectives, large arrays.

XLA's own cost analysis counts the body of a loop once; here it is multiplied by the loop's trip count. The parser is
written for `jax.stages.Compiled.as_text()` on CPUs and for what XLA dumps as "after_codegen" for TPUs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = ("slices",)  # the axes of a collective that crosses the data center's network

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w*computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
# These move nothing, or their traffic is counted inside them or at their other half; a TPU's custom calls are
# bookkeeping.
_FREE = "parameter constant tuple get-tuple-element bitcast while conditional call custom-call async-start".split()


class Instruction(NamedTuple):
    """One line of a computation; `shape` is its type as text, `rest` everything after the operands' opening bracket."""

    name: str
    root: bool
    shape: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])


class Collective(NamedTuple):
    """All collectives of one kind over the same mesh axes in one step; bytes are per device, of the larger side."""

    op: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    wire_bytes: float  # the least that a device must send


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                body = self.computations[header[2]] = {}
                if header[1]:
                    self.entry = header[2]
            elif found := _INSTRUCTION.match(line):
                body[found[2]] = Instruction(found[2], bool(found[1]), *found.groups()[2:])

    def walk(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yield (computation, instruction, runs per step, whether it is inside a fusion) for everything that runs."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, name, times, fused):
        for instruction in self.computations[name].values():
            yield name, instruction, times, fused
            inside = fused or instruction.op not in ("while", "conditional", "call", "async-start")
            trips = self._trips(instruction) if instruction.op == "while" else 1
            for called in _called(instruction):
                yield from self._walk(called, times * trips, inside)

    def _trips(self, loop: Instruction) -> int:
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        # A scan counts from 0 to the one integer that its condition compares with.
        condition = self.computations[re.search(r"condition=%([\w.-]+)", loop.rest)[1]]
        names = [condition, *(self.computations[c] for i in condition.values() for c in _called(i))]
        limits = {
            int(i.rest.split(")")[0]) for c in names for i in c.values() if i.op == "constant" and "s32" in i.shape
        }
        return limits.pop() if len(limits) == 1 else 1

    def flops(self) -> tuple[float, float]:
        """Return the operations of all matrix products, and the same weighted by bf16 passes (6 for "highest")."""
        total = passes = 0.0
        for name, instruction, times, _ in self.walk():
            if instruction.op in ("dot", "convolution"):
                count = times * self._product(self.computations[name], instruction)
                total += count
                passes += count * (6 if "operand_precision={highest" in instruction.rest else 1)
        return total, passes

    def _product(self, body, product):
        left, right, out = (_dims(s) for s in (*(body[o].shape for o in product.operands[:2]), product.shape))
        if product.op == "dot":
            return 2 * math.prod(out) * math.prod(left[d] for d in _ints(product.rest, "lhs_contracting_dims"))
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
        size = [
            dict(zip(label, dims, strict=True)) for label, dims in zip(labels.groups(), (left, right, out), strict=True)
        ]
        groups = re.search(r"batch_group_count=(\d+)", product.rest)
        count = 2 * size[0]["b"] * size[1]["i"] * size[1]["o"] // (int(groups[1]) if groups else 1)
        window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{(.*?)\}", product.rest) or [""])[0]))
        for d in sorted(set(labels[1]) - {"b", "f"}):
            value = {key: text.split("x")[int(d)] for key, text in window.items()}
            stride, by, dilate = (int(value.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
            start = int(value.get("pad", "0_0").split("_")[0])
            at = np.arange(size[2][d])[:, None] * stride + np.arange(size[1][d])[None] * by - start
            count *= int(np.sum((at >= 0) & (at <= (size[0][d] - 1) * dilate) & (at % dilate == 0)))
        return count

    def hbm_bytes(self) -> float:
        """Return the bytes read from and written to main memory, without arrays that stay in on-chip memory."""
        total = 0
        for name, instruction, times, fused in self.walk():
            if not fused and instruction.op not in _FREE and not instruction.op.endswith("-done"):
                total += times * self._traffic(self.computations[name], instruction)
        return total

    def _traffic(self, body, instruction):
        if instruction.op == "fusion":
            inner = self.computations[_called(instruction)[0]]
            parts = (self._read(inner, n) for n in range(len(instruction.operands)))
            whole = (_hbm(body[o].shape) for o in instruction.operands)
            read = sum(size if part is None else min(size, part) for size, part in zip(whole, parts, strict=True))
            return read + min(_hbm(instruction.shape), self._written(inner))
        if instruction.op in ("slice", "dynamic-slice", "gather"):
            part = instruction.shape
            return min(_hbm(body[instruction.operands[0]].shape), nbytes(part)) + _hbm(part)
        if instruction.op == "dynamic-update-slice":
            return 2 * _hbm(body[instruction.operands[1]].shape)
        if instruction.op == "async-update":  # TPU7x's SparseCores change a layout: the type has both sides
            return _hbm(instruction.shape)
        shapes = instruction.shape.split(", ")[0] if instruction.op.endswith("-start") else instruction.shape
        return _hbm(shapes) + sum(_hbm(body[o].shape) for o in instruction.operands)

    def _read(self, body, parameter):
        """Return the bytes that a fusion reads of a parameter: only the slices, if it is only sliced.

        None: it returns the parameter itself, perhaps in another layout.
        """
        names = [i.name for i in body.values() if i.op == "parameter" and int(i.rest.split(")")[0]) == parameter]
        total = 0
        for user in body.values():
            for n, operand in enumerate(user.operands):
                if operand not in names:
                    continue
                inside = self._read(self.computations[_called(user)[0]], n) if user.op == "fusion" else None
                if user.op in ("bitcast", "copy", "fusion") and inside is None:
                    names.append(user.name)
                elif user.op == "fusion":
                    total += inside
                elif user.op in ("slice", "dynamic-slice", "gather") and n == 0:
                    total += nbytes(user.shape)
                elif user.op != "dynamic-update-slice" or n != 0:  # it writes in place, so it does not read
                    return math.inf
        return None if any(i.root and i.name in names for i in body.values()) else total

    def _written(self, body, name=None):
        """Return the bytes that a fusion writes: only the update, if an array is updated in place."""
        instruction = body[name] if name else next(i for i in body.values() if i.root)
        if instruction.op in ("tuple", "bitcast"):
            return sum(self._written(body, operand) for operand in instruction.operands)
        if instruction.op == "dynamic-update-slice":
            return nbytes(body[instruction.operands[1]].shape)
        if instruction.op == "fusion":
            return self._written(self.computations[_called(instruction)[0]])
        return nbytes(instruction.shape)

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """Sum up a step's collectives by kind and axes of `mesh` (name to size, as in `Mesh.shape`).

        Those between TPU slices have the axes `BETWEEN_SLICES`.
        """
        found: dict[tuple, list] = {}
        chains = set()
        for name, instruction, times, _ in self.walk():
            moved = _between_slices(instruction) or self._within_slice(name, instruction, mesh, chains)
            if not moved:
                continue
            op, axes, parties, size = moved
            share = 1 if op == "collective-permute" else (2 if op == "all-reduce" else 1) * (1 - 1 / parties)
            total = found.setdefault((op, axes), [0, 0, 0.0])
            for n, value in enumerate((times, times * size, times * size * share)):
                total[n] += value
        return [Collective(*key, *total) for key, total in sorted(found.items())]

    def _within_slice(self, name, instruction, mesh, chains):
        """Return (kind, mesh axes, members, bytes of the larger side); None if not a collective or counted before."""
        # On TPUs a reduce-scatter is an all-reduce inside a fusion that keeps one part.
        scattered = instruction.op == "all-reduce" and name.startswith("all-reduce-scatter")
        op = "reduce-scatter" if scattered else instruction.op.removesuffix("-start")
        if op not in COLLECTIVES:
            return None
        # An asynchronous collective is repeated in every fusion that it overlaps with.
        if chain := re.search(r'chain_id="(\d+)"', instruction.rest):
            if chain[1] in chains:
                return None
            chains.add(chain[1])
        sent = sum(nbytes(self.computations[name][o].shape) for o in instruction.operands)
        size = max(sent, nbytes(instruction.shape) - (sent if instruction.op.endswith("-start") else 0))
        members = groups(instruction.rest, math.prod(mesh.values()))
        coordinates = np.unravel_index(members, tuple(mesh.values()))
        axes = tuple(axis for axis, c in zip(mesh, coordinates, strict=True) if (c != c[:, :1]).any())
        return op, axes, members.shape[1], size

    def largest(self, count: int = 5) -> list[tuple[int, str, str]]:
        """Return (bytes, type and shape, operation of the model) of the largest computed arrays in main memory."""
        found = {}
        for _, instruction, _, fused in self.walk():
            if fused or instruction.op in _FREE:
                continue
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            for dtype, dims, layout in _ARRAY.findall(instruction.shape):
                size = _hbm(f"{dtype}[{dims}]{{{layout}}}")
                found.setdefault((size, f"{dtype}[{dims}]"), source[1] if source else instruction.name)
        return [(*key, found[key]) for key in sorted(found, reverse=True)[:count]]


def _between_slices(instruction: Instruction) -> tuple[str, tuple[str, ...], int, int] | None:
    """`Module._within_slice` for collectives between slices, which are transfers between hosts."""
    if instruction.op not in ("send", "recv"):
        return None
    transfer = re.search(r'_xla_megascale_target="\{([\d,:]+)\}.*_transfer_type="(\w+)"', instruction.rest)
    op = transfer and transfer[2].lower().replace("_", "-")
    if not transfer or instruction.op != ("recv" if op == "all-gather" else "send"):
        return None
    ranges = (part.split(":") for part in transfer[1].split(","))
    slices = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
    return op, BETWEEN_SLICES, slices, nbytes(_ARRAY.search(instruction.shape)[0])


def groups(attributes: str, devices: int) -> np.ndarray:
    """Parse the devices that a collective joins, [groups, members], from any of the forms that XLA writes."""
    if found := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", attributes
    ):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", found[1]), strict=True)
        ids = _iota(found[2], found[3], devices).reshape([int(size) for size in sizes])
        over = [names.index(name) for name in re.findall(r"'(\w+)'", found[4])]
        return np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, math.prod(ids.shape[n] for n in over))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(found[3], found[4], devices).reshape(int(found[1]), int(found[2]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    return np.arange(devices)[None]


def _iota(shape, order, devices):
    ids = np.arange(devices)
    if shape:
        ids = ids.reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in order.split(",")]).ravel() if order else ids.ravel()


def nbytes(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple, given as HLO text."""
    return sum(_size(*array) for array in _ARRAY.findall(shape))


def _hbm(shape: str) -> int:
    """`nbytes` without arrays whose layout names a memory space other than main memory, S(0)."""
    return sum(_size(*array) for array in _ARRAY.findall(shape) if "S(" not in array[2])


def _size(dtype, dims, _):
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _ARRAY.match(shape)[2].split(",") if d]


def _ints(text: str, key: str) -> list[int]:
    return [int(n) for n in re.search(key + r"=\{([\d,]*)\}", text)[1].split(",") if n]


def _called(instruction: Instruction) -> list[str]:
    return [name for names in _CALLED.findall(instruction.rest) for name in re.findall(r"%([\w.-]+)", names)]
