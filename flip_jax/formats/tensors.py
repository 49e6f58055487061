"""Arrays in safetensors files: one file, or several with an index that says which array is where."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from flip_jax import untrusted
from flip_jax.runtime import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file; more go into several
READ = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensors:
    """The arrays of a model's files by name; their shapes are known and their values read when asked for, as f32.

    Raises:
      UserError: a file is damaged or missing, or holds an array twice.
    """

    def __init__(self, files: Sequence[pathlib.Path]):
        self._files: dict[str, tuple[pathlib.Path, Any]] = {}
        for path in files:
            if path.suffix in PICKLES:
                raise UserError(f"{path} is a file of PyTorch, which can run code and is not read; safetensors is")
            try:
                # The library checks that the header and the size of the file agree.
                file = safetensors.safe_open(path, framework="numpy")
                names = list(file.keys())
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(
                    f"{path}: {error}; it must be a whole safetensors file: if it was downloaded, delete it, and "
                    "download it again"
                ) from None
            for name in names:
                if name in self._files:
                    raise UserError(f"{path} and {self._files[name][0].name} both hold {name}: one of them is wrong")
                self._files[name] = path, file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, (_, file) in self._files.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads an array, or a part of it, as f32; UserError for other numbers than floats, and for any not finite."""
        path, file = self._files[name]
        dtype = file.get_slice(name).get_dtype()
        if dtype not in READ:
            raise UserError(f"{path}: {name} is of type {dtype}; only {', '.join(READ)} are read")
        try:
            array = file.get_slice(name)[index] if index else file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from None
        array = np.asarray(array).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds values that are not finite: {name}")
        return array


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files of a folder's weights: model.safetensors, or those that its index names.

    Raises:
      UserError: there are none (the message names pickles, if there are any), or the index names files elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}{pickles(os.listdir(folder))}")
    names = indexed(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {missing[0]}, which its {INDEX} names: download or copy the folder again")
    return [folder / name for name in names]


def indexed(folder: pathlib.Path) -> list[str]:
    """Lists the files that a folder's index names; UserError if one of them may be elsewhere."""
    places = read_object(folder / INDEX, "an index of safetensors files").get("weight_map")
    if not (isinstance(places, Mapping) and places and all(isinstance(x, str) for x in places.values())):
        raise UserError(f"{folder / INDEX} has no weight_map, which says in which file each array is")
    names = sorted(set(places.values()))
    if wrong := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]:
        raise UserError(f"{folder / INDEX} names {wrong[0]!r}; only safetensors files of its own folder are read")
    return names


def pickles(names: Sequence[str]) -> str:
    """Says which of these files are pickles and what to do about them; empty if none is."""
    found = sorted(name for name in names if name.endswith(PICKLES))
    if not found:
        return ""
    return (
        f", only {', '.join(found[:3])}: files of PyTorch can run code and are not read. Write safetensors from them, "
        "model.save_pretrained(FOLDER, safe_serialization=True), or use another revision that has them"
    )


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], shard: int = SHARD) -> None:
    """Writes arrays as model.safetensors, or as files of at most `shard` bytes and their index."""
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if parts[-1] and size + array.nbytes > shard:
            parts, size = [*parts, {}], 0
        parts[-1][name] = array
        size += array.nbytes
    names = [WEIGHTS]
    if len(parts) > 1:
        names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save(folder / name, part)
    if len(parts) > 1:
        places = {array: name for name, part in zip(names, parts, strict=True) for array in part}
        total = sum(array.nbytes for array in arrays.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, as readable as any other new one: safetensors' own only their owner can read."""
    path.touch()
    mode = path.stat().st_mode
    # Marked as PyTorch's, as transformers asks for; the content does not depend on it.
    try:
        save_file({name: np.asarray(value, order="C") for name, value in arrays.items()}, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)


def read_object(path: pathlib.Path, what: str) -> dict[str, Any]:
    """Reads a JSON file that holds settings by name; UserError if it is something else than `what`."""
    try:
        content = json.loads(untrusted.read_file(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; it must be {what}, JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a group of settings, got {type(content).__name__}; it must be {what}")
    return content


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file as people read it."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
