"""Locks in object stores: an object that its holder creates, which fails if there is one, and then keeps renewing."""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable

import fsspec

from flip_jax import lock

RENEWED = 20  # seconds between two renewals


def acquire(path: str, what: str) -> Callable[[], None]:
    """Creates the object and keeps it; returns what ends that. One that nobody renews any more is taken over.

    Stores whose client cannot create an object on condition that there is none have no lock, which is said.

    Raises:
      UserError: another program holds it.
    """
    try:
        filesystem, name = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        print(f"{path}: no lock is held ({error}): nothing else may use the folder", file=sys.stderr)
        return lambda: None
    mine = f"{lock.myself()} ({secrets.token_hex(4)})"
    content = lambda: f"{mine}\n{time.time():.0f}\n".encode()  # noqa: E731
    try:
        filesystem.pipe_file(name, content(), mode="create")
    except FileExistsError:
        holder = _holder(filesystem, name)
        if _alive(filesystem, name):
            raise lock.in_use(what, holder) from None
        print(f"{what} was locked by {holder}, which does not renew it: taken over", file=sys.stderr, flush=True)
        filesystem.rm_file(name)
        try:
            filesystem.pipe_file(name, content(), mode="create")
        except FileExistsError:  # another program was faster
            raise lock.in_use(what, _holder(filesystem, name)) from None
    except (TypeError, NotImplementedError) as error:
        print(f"{path}: this store has no locks ({error}): nothing else may use the folder", file=sys.stderr)
        return lambda: None
    ended = threading.Event()

    def renew():
        while not ended.wait(RENEWED):
            try:
                if (holder := _holder(filesystem, name)) not in (mine, ""):
                    print(f"error: {what} was taken over by {holder}; this program ends", file=sys.stderr, flush=True)
                    os._exit(1)
                filesystem.pipe_file(name, content())
            except Exception as error:  # each store's client has its own kinds
                print(f"{path}: could not be renewed: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()

    def release():
        ended.set()
        thread.join()
        if _holder(filesystem, name) == mine:
            filesystem.rm_file(name)

    return release


def _holder(filesystem, name: str) -> str:
    try:
        return filesystem.cat_file(name).decode(errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return ""


def _alive(filesystem, name: str) -> bool:
    """Tells whether the object was renewed lately by this machine's clock, or is renewed while we look."""
    content = filesystem.cat_file(name)
    try:
        age = time.time() - float(content.splitlines()[1])
    except (ValueError, IndexError):
        age = float("inf")
    if age < 2 * RENEWED:
        return True
    time.sleep(2.5 * RENEWED)  # the clocks may differ
    return filesystem.cat_file(name) != content
