"""Checkpoints: train state, data position, tokenizer and config of a step, saved together by Orbax.

A step is the folder WORKDIR/checkpoints/STEP, which appears only when it is complete.
"""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import config_check, models
from flip_jax.config import Config, ModelConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import vit
from flip_jax.runtime import UserError, hush_orbax, say

_log = logging.getLogger(__name__)
hush_orbax()

LENGTHS = ("total_samples", "optim.cooldown_samples")
# What fine-tuning takes from the model in `init_from`; the image size is the run's own.
IMAGE_TOWER = ("width", "depth", "heads", "patch_size", "pool", "patch_bias", "positions", "pre_norm", "pixel_stats")
# How operating systems and object stores say that they do not take a file.
_STORAGE = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|Permission denied|RESOURCE_EXHAUSTED|"
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE"
)
RESIZED = ("image.pos_embed", "image.patch_kernel")  # what `read_params` resizes for a model that it starts


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; the newest `keep` stay."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        self.directory = _absolute(workdir) / "checkpoints"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir {workdir} cannot be made or written to: {error}; use another folder") from error
        # Naming the processes makes Orbax 0.12 meet at the coordination service; else each of its barriers is a
        # computation on all devices, which may run next to a step and lock it.
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, cleanup_tmp_directories=True, multiprocessing_options=processes
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saving: tuple[int, float] | None = None  # the step, and when its save began

    def latest(self) -> int | None:
        """Finds the newest complete step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        batches: grain.DatasetIterator,
        tokenizer: Tokenizer | None,
        config: Config,
        class_names: tuple[str, ...] = (),
    ):
        """Starts saving `step`; returns when the arrays may be donated again."""
        self.wait()
        needed = sum(array.nbytes for array in jax.tree.leaves(state)) // jax.process_count()
        if "://" not in os.fspath(self.directory) and (free := shutil.disk_usage(self.directory).free) < needed:
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
            if not (reason := _STORAGE.search(f"{error} {error.__cause__}")):
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

    def tokenizer(self) -> Tokenizer | None:
        """Reads the tokenizer of the newest step; None without a step, and for a classifier, which reads no text."""
        return None if self.latest() is None else read_tokenizer(self.directory / str(self.latest()))

    def check_config(self, config: Config):
        """Refuses to resume a run whose newest checkpoint was written with other settings.

        A setting that did not exist yet counts as its default, which is what was done before there was a choice. The
        length may change while the learning rate has not depended on it yet.

        Raises:
          UserError: the settings that differ, both values.
        """
        step, remedy = self.latest() or 0, ""
        recorded = _read_json(self.directory / str(self.latest()), "config")
        written = config_check.flatten(Config()) | config_check.current_names(recorded)
        differences = [
            f"  config.{key}: checkpoint {saved!r}, now {ours!r}"
            for key, saved, ours in _differences(written, config_check.flatten(config))
            if not key.startswith(config_check.RESUMABLE_CHANGES)
            and not (key == "data.train" and self._knows_data())
            and not (key in LENGTHS and step * config.global_batch_size <= _fixed_samples(written, config))
        ]
        if any(key in difference for key in LENGTHS for difference in differences):
            remedy = (
                "\nThe length of a run can change only with config.optim.schedule constant, before the old and the new "
                f"cooldown begin; this run is at step {step}, schedule {written['optim.schedule']}."
            )
        if differences:
            raise UserError(
                f"{self.directory} holds checkpoints of a run with other settings:\n" + "\n".join(differences) + "\n"
                "Use the same settings to resume it, or another --workdir (and config.init_from for its weights)."
                + remedy
            )

    def _knows_data(self) -> bool:
        """Tells whether the newest step says which files it was trained on; then `restore` compares those."""
        states = (self.directory / str(self.latest()) / "data").iterdir()
        return any("sources" in json.loads(path.read_text()) for path in states if path.name.endswith(".json"))

    def check_class_names(self, names: tuple[str, ...]):
        """Raises UserError if the labels of the training data meant other classes when the newest step was saved."""
        saved = read_class_names(self.directory / str(self.latest()))
        if saved is not None and saved != names:
            changed = next((i for i, pair in enumerate(zip(saved, names, strict=False)) if pair[0] != pair[1]), None)
            where = min(len(saved), len(names)) if changed is None else changed
            raise UserError(
                f"the classes of config.data.train have changed since {self.directory} was written, first label "
                f"{where}: {saved[where : where + 1]} then, {names[where : where + 1]} now ({len(saved)} and "
                f"{len(names)} classes). Restore the class folders, or start a new run with config.init_from"
            )

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
            size = 0 if "://" in os.fspath(self.directory) else sum(file.stat().st_size for file in folder.rglob("*"))
            say(f"saved step {step} ({f'{size / 1e9:.3g} GB, ' if size else ''}{time.perf_counter() - begun:.0f} s)")

    def close(self):
        """Waits, and ends the threads."""
        self.wait()
        # Orbax 0.12's own close leaves the thread that removes interrupted saves, which then fails as Python exits.
        self._manager._maybe_await_cleanup_tmp_directory()
        self._manager.close()


def _fixed_samples(written: Mapping[str, Any], config: Config) -> int:
    """Counts the samples during which neither run's learning rate depends on its length (cosine: -1, always)."""
    if written["optim.schedule"] != "constant" or config.optim.schedule != "constant":
        return -1
    old = written["total_samples"] - written["optim.cooldown_samples"]
    return min(old, config.total_samples - config.optim.cooldown_samples)


def _absolute(path: str | os.PathLike) -> epath.Path:
    """Makes a path absolute. UserError if Orbax, which looks for its files by globs, could not read it back."""
    path = epath.Path(path).expanduser()
    path = path if path.is_absolute() else path.absolute()  # which makes a local path of gs://
    if glob.has_magic(os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)!r}: a checkpoint cannot be read from a path with [, * or ?; use another name"
        )
    return path


def newest(path: str) -> epath.Path:
    """Finds the step's folder that `path` means: itself, or the newest step of that workdir.

    Raises:
      UserError: there is no complete checkpoint.
    """
    folder = _absolute(path)
    if (folder / "state").is_dir():
        return folder
    # On object stores, which cannot rename folders, one may be there before it is complete.
    steps = ocp.utils.checkpoint_steps(folder / "checkpoints") if (folder / "checkpoints").is_dir() else ()
    if not steps:
        raise UserError(f"{path} holds no checkpoint: expected a workdir with checkpoints/STEP, or such a STEP folder")
    return folder / "checkpoints" / str(max(steps))


def write(folder: str | os.PathLike, params: Any, tokenizer: Tokenizer, config: Config):
    """Writes a step's folder of weights alone, as `newest` and `read_params` take it.

    Raises:
      UserError: the folder exists.
    """
    folder = _absolute(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; use another folder")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        for item, content in (("tokenizer", tokenizer.to_json()), ("config", config_check.flatten(config))):
            checkpointer.save(folder / item, args=ocp.args.JsonSave(content))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", {"params": params})  # last: it makes the folder a checkpoint


def read_config(step: epath.Path) -> Config:
    """Reads the config of a step's folder."""
    return config_check.from_flat(_read_json(step, "config"))


def check_start(config: Config, step: epath.Path) -> None:
    """Raises UserError, before anything is compiled, where the weights of a step cannot start this run."""
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: models.build(config, nnx.Rngs(0))))[1])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(step / "state").item_metadata["params"]
    _compare(step, {name: part for name, part in params.items() if name != "head"}, saved, config.model)


def with_tower_of(config: Config, step: epath.Path) -> Config:
    """Returns the config of a fine-tuning with the image tower of a step's model."""
    ours, theirs = config.model, read_config(step).model
    image = {key: getattr(theirs.image, key) for key in IMAGE_TOWER}
    taken = [f"{key} {value}" for key, value in image.items() if value != getattr(ours.image, key)]
    if taken:
        _log.info("the image tower of %s: %s", step, ", ".join(taken))
    model = dataclasses.replace(
        ours,
        image=dataclasses.replace(ours.image, **image),
        activation=theirs.activation,
        norm_eps=theirs.norm_eps,
    )
    return config_check.from_flat(config_check.flatten(dataclasses.replace(config, model=model)))


def read_tokenizer(step: epath.Path) -> Tokenizer | None:
    """Reads the tokenizer of a step's folder; None for a classifier, which reads no text."""
    content = _read_json(step, "tokenizer")
    return Tokenizer.from_json(content) if content else None


def read_class_names(step: epath.Path) -> tuple[str, ...] | None:
    """Reads the class names of a classifier's labels, () if it was trained on numbers; None in older checkpoints."""
    return tuple(_read_json(step, "class_names")) if (step / "class_names").exists() else None


def _read_json(step: epath.Path, item: str) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(step / item)


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, saved, ours) of every entry that differs; None where one side has none."""
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            yield name, saved.get(name), ours.get(name)


def read_params(step: epath.Path, params: Any, start_of: ModelConfig | None = None) -> Any:
    """Reads only the weights of a step's folder, laid out as the abstract tree `params` says.

    Where another model, `start_of`, starts from them, weights that belong to an image or patch size are resized to its
    own, and weights that it does not use (a decoder, the text tower of a classifier) are skipped.

    Raises:
      UserError: names or shapes that differ, both sides.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(step / "state").item_metadata["params"]
        unused, resized = _compare(step, params, saved, start_of)
        if unused:
            _log.info("%s: skipped weights this model does not use: %s", step, ", ".join(sorted(unused)))

        def as_saved(path, leaf):
            if (name := _name(path)) not in resized:
                return leaf
            whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            return jax.ShapeDtypeStruct(resized[name], leaf.dtype, sharding=whole)

        def as_ours(path, leaf, value):
            if (name := _name(path)) not in resized:
                return value
            value = vit.resize_weight(start_of.image, name.removeprefix("image."), np.asarray(value))
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

        wanted = {"params": jax.tree_util.tree_map_with_path(as_saved, params)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        restored = checkpointer.restore(step / "state", args=args)["params"]
        return jax.tree_util.tree_map_with_path(as_ours, params, restored)


def _compare(step: epath.Path, params: Any, saved: Any, start_of: ModelConfig | None) -> tuple[set[str], dict]:
    """Finds the parts of `saved` that `params` has no use for, and the shapes of weights to resize.

    Raises:
      UserError: names or shapes that differ otherwise.
    """
    ours, theirs = (
        {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, saved)
    )
    unused: set[str] = set()
    resized = {}
    if start_of:
        unused = {name.partition(".")[0] for name in theirs} - set(params)
        theirs = {name: shape for name, shape in theirs.items() if name.partition(".")[0] not in unused}
        resized = {name: theirs[name] for name in RESIZED if name in theirs and theirs[name] != ours[name]}
    differences = [
        f"  {name}: checkpoint {saved_shape}, model {our_shape} (None: absent)"
        for name, saved_shape, our_shape in _differences(theirs, ours)
        if name not in resized
    ]
    if differences:
        raise UserError(f"The weights in {step} do not fit config.model:\n" + "\n".join(differences))
    return unused, resized


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
