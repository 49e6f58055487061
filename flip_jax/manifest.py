"""The manifest of a step's folder: size and crc32c of each file, written last. `damage` compares them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
from etils import epath

from flip_jax.runtime import is_remote

NAME = "manifest.json"
ORBAX = "commit_success.txt"  # ends a step in object stores, and in earlier versions everywhere
CHUNK = 2**16  # bytes; more would not stay in the processor's cache between reading and summing


def write(step: epath.Path) -> None:
    """Writes the manifest of a finished folder, and syncs all its files and folders if it is on a disk."""
    # Of an object store, epath lists folders without their gs://.
    folders = {
        os.fspath(path).partition(os.fspath(step).rpartition("://")[2])[2]: files for path, _, files in step.walk()
    }
    names = [f"{folder}/{file}".lstrip("/") for folder, files in folders.items() for file in files]
    with ThreadPoolExecutor() as pool:
        measured = pool.map(lambda name: measure(step / name, sync=True), names)
    (step / NAME).write_text(json.dumps(dict(zip(names, measured, strict=True))))
    measure(step / NAME, sync=True)
    for folder in folders:
        sync_folder(step / folder.lstrip("/"))


def measure(file: epath.Path, sync: bool = False) -> list[int]:
    """Returns size and crc32c of a file."""
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size, crc = size + len(chunk), google_crc32c.extend(crc, chunk)
        if sync and not is_remote(file):
            os.fsync(stream.fileno())
    return [size, crc]


def sync_folder(path: epath.Path) -> None:
    """Makes sure that the names in a folder are on its disk; object stores do so by themselves."""
    if not is_remote(path):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete(folder: epath.Path) -> list[int]:
    """Lists the steps in a folder. An object store cannot rename folders, so there a step may not be complete yet."""
    steps = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(int(s.name) for s in steps if not is_remote(s) or any((s / last).exists() for last in (NAME, ORBAX)))


def remove(step: epath.Path) -> None:
    """Removes a step, which no longer counts as complete before the first file goes."""
    if not is_remote(step):
        step = step.rename(f"{step}.orbax-checkpoint-tmp")  # what a kill leaves of it, Orbax removes at the next start
    for last in (NAME, ORBAX):
        (step / last).unlink(missing_ok=True)
    step.rmtree()
