"""Locks on the folders that runs and commands write to, so that a second one is refused.

On a disk it is a lock of the system on a file, which ends with its process however that ends; a line in it tells who
holds it. An object store has no such locks; see `lease`.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator

from flip_jax import runtime
from flip_jax.runtime import UserError

NAME = "lock"


@contextlib.contextmanager
def hold(path: str | os.PathLike, what: str, together: bool = False) -> Iterator[None]:
    """Holds the lock at `path`, whose folder is made if it is missing; `what` is what it protects.

    Of the processes of a run, which hold it `together`, the first one does so, and all are refused if it is.

    Raises:
      UserError: another program holds it, or the folder cannot be written to.
    """
    path, refused = os.path.expanduser(path), []
    release: Callable[[], None] = lambda: None  # noqa: E731
    try:
        if not (together and sys.modules["jax"].process_index()):
            if runtime.is_remote(path):
                from flip_jax import lease

                release = lease.acquire(path, what)
            else:
                release = _acquire(path, what)
    except UserError as error:
        refused = [str(error)]
    if refused := runtime.gather("lock", refused) if together else refused:
        raise UserError(refused[0])
    runtime.at_end.append(release)
    try:
        yield
    finally:
        runtime.at_end.remove(release)
        release()


def _acquire(path: str, what: str) -> Callable[[], None]:
    locked = False
    while not locked:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            file = open(path, "a+")
        except OSError as error:
            raise UserError(f"{what} cannot be made or written to: {error}; use another folder") from None
        holder = _line(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise in_use(what, holder) from None
            print(f"{path}: this file system has no locks ({error.strerror}): nothing else may use it", file=sys.stderr)
        # The holder may have removed the file after it was opened here.
        locked = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    if holder:
        print(f"{what} was locked by {holder}, which has ended: taken over", file=sys.stderr, flush=True)
    file.truncate(0)
    print(myself(), file=file, flush=True)

    def release():
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone
            os.unlink(path)
        file.close()

    return release


def _line(file) -> str:
    file.seek(0)
    return file.read(200).strip()


def myself() -> str:
    """Says which process this is."""
    return f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"


def in_use(what: str, holder: str) -> UserError:
    """Makes the error of a program that is refused."""
    holder = holder or "another program"
    return UserError(f"{what} is in use by {holder}: wait until it has ended, or use another folder")
