"""Checkpoints: train state, data position, tokenizer and config of a step, saved together by Orbax.

A step is the folder WORKDIR/checkpoints/STEP, which appears only when it is complete, synced and has its manifest.
"""

import contextlib
import glob
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from flip_jax import config_check, manifest
from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError, hush_orbax, is_remote, lost_another, say

hush_orbax()

# How operating systems and object stores say that they do not take a file.
_STORAGE = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|Permission denied|RESOURCE_EXHAUSTED|"
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE"
)


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; the newest `keep` stay."""

    def __init__(self, workdir: str | os.PathLike, keep: int, strict: bool = False):
        self.directory = absolute(workdir) / "checkpoints"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be made or written to: {error}; use another folder") from None
        if manifest.complete(self.directory):
            from flip_jax import damage

            damage.set_aside(self.directory, strict)
        # Naming the processes makes Orbax 0.12 meet at the coordination service; else each of its barriers is a
        # computation on all devices, which may run next to a step and lock it.
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,  # older steps are removed by ours, which leaves none half removed
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=processes,
            temporary_path_class=_finishing(self.directory, keep),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        # `Termination` asks JAX when to stop, by its own count, which questions by the number of the step would upset.
        self._manager.reached_preemption = lambda step: False
        self._saving: tuple[int, float] | None = None  # the step, and when its save began

    def latest(self) -> int | None:
        """Finds the newest whole step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        batches: grain.DatasetIterator,
        tokenizer: Tokenizer | None,
        config: Config,
        class_names: tuple[str, ...] = (),
        run: Config | None = None,
    ):
        """Starts saving `step`, of the stage with `config` of a `run`; returns when the arrays may be donated again."""
        self.wait()
        needed = sum(array.nbytes for array in jax.tree.leaves(state)) // jax.process_count()
        if not is_remote(self.directory) and (free := shutil.disk_usage(self.directory).free) < needed:
            raise UserError(
                f"step {step} could not be saved in {self.directory}: it takes up to {needed / 1e9:.3g} GB, and "
                f"{free / 1e9:.3g} GB are free. Make room, then run the same command again"
            )
        say(f"saving step {step} ...")
        begun = time.perf_counter()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            data=grain.checkpoint.CheckpointSave(batches),
            tokenizer=ocp.args.JsonSave(tokenizer.to_json() if tokenizer else {}),
            config=ocp.args.JsonSave(config_check.flatten(config)),
            class_names=ocp.args.JsonSave(list(class_names)),
            **({"run": ocp.args.JsonSave(config_check.flatten(run))} if run and run.stages else {}),
        )
        with self._storing(step):
            self._manager.save(step, args=items)
        self._saving = step, begun

    @contextlib.contextmanager
    def _storing(self, step: int) -> Iterator[None]:
        """Turns the storage's refusals, of which Orbax raises several kinds, into a UserError."""
        try:
            yield
        except Exception as error:
            if lost_another(error) or not (reason := _STORAGE.search(f"{error} {error.__cause__}")):
                raise
            raise UserError(
                f"step {step} could not be saved in {self.directory}: {reason[0]}. Make room or give access, then run "
                "the same command again: it resumes from the newest step that is complete"
            ) from error

    def restore(self, state: Any, batches: grain.DatasetIterator) -> Any:
        """Reads the newest step's state, laid out as the abstract `state`, and moves `batches` to its position."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(state._asdict()), data=grain.checkpoint.CheckpointRestore(batches)
        )
        return type(state)(**self._manager.restore(self.latest(), args=args)["state"])

    def say_saved(self):
        """Says so if the save in progress is complete; does not wait for it."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Returns when all that was started is saved."""
        while self._saving and self._manager.is_saving_in_progress():
            time.sleep(0.05)  # Ctrl-C here lets the save end; within a join Python 3.11 takes the thread for ended
        with self._storing(self._saving[0] if self._saving else 0):
            self._manager.wait_until_finished()  # raises the error of a save that failed
        if self._saving:
            (step, begun), self._saving = self._saving, None
            folder = pathlib.Path(self.directory / str(step))
            # Listing a bucket would take seconds.
            files = () if is_remote(self.directory) else folder.rglob("*")
            size = sum(file.stat().st_size for file in files)
            say(f"saved step {step} ({f'{size / 1e9:.3g} GB, ' if size else ''}{time.perf_counter() - begun:.0f} s)")

    def close(self):
        """Waits, and ends the threads."""
        self.wait()
        # Orbax 0.12's own close leaves the thread that removes interrupted saves, which then fails as Python exits.
        self._manager._maybe_await_cleanup_tmp_directory()
        self._manager.close()


def _finishing(directory: epath.Path, keep: int) -> type[ocp.path.atomicity_types.TemporaryPath]:
    """Returns how Orbax completes a step in `directory`, of which `keep` stay, with our manifest as its last file."""
    parent: Any = ocp.path.atomicity_defaults.get_default_temporary_path_class(directory)

    class Finishing(parent):
        async def finalize(self):  # in the first process, when all have written
            written, final = self.get(), self.get_final()
            if final.parent != directory:  # an item of the step
                return await super().finalize()
            self._checkpoint_metadata_store.wait_until_finished()
            manifest.write(written)
            if written == final:  # an object store, which cannot rename folders
                await super().finalize()
            else:
                written.rename(final)
                manifest.sync_folder(directory)
            for old in manifest.complete(directory)[:-keep]:
                manifest.remove(directory / str(old))

    return Finishing


def absolute(path: str | os.PathLike) -> epath.Path:
    """Makes a path absolute. UserError if Orbax, which looks for its files by globs, could not read it back."""
    path = epath.Path(path).expanduser()
    path = path if path.is_absolute() else path.absolute()  # which makes a local path of gs://
    if glob.has_magic(os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)!r}: a checkpoint cannot be read from a path with [, * or ?; use another name"
        )
    return path
