"""Sources to batches: shuffle, decode, tokenize, batch, prefetch. Every position can be saved and resumed exactly."""

import atexit
import copy
import logging
import os
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from flip_jax.config import Config
from flip_jax.data import samples, sources, stream
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

PREFETCH = 2  # batches that are ready ahead of the training step
JUDGE_AFTER = 1000  # records; among fewer, the share of bad ones means little
GIVE_UP_AFTER = 10_000  # bad records in a row
_ENTRIES = re.compile(r";(?=(?:[\d.]+\*)?\w+:)")  # a semicolon inside a path separates nothing
_WEIGHTED = re.compile(r"(?:(\d+\.?\d*)\*)?(.*)", re.DOTALL)


def train_dataset(
    config: Config, tokenizer: Tokenizer | None, *, process_index: int, process_count: int
) -> grain.IterDataset:
    """Makes this process's training batches, without end.

    Each is {"image": uint8 [b, S, S, 3], "text": int32 [b, T], "keys": list[str], "counts": {"read": int, "used": int,
    "bad": {kind: int}}} with b = global_batch_size / process_count. Counts run from the start of training to the end of
    the batch; read = used + all bad. The state of an iterator (JSON) resumes exactly, with any number of threads or
    `config.data.workers`. Workers lend the memory of a batch: it is used again once nothing refers to its arrays.
    With `config.finetune.classes`, "label", int32 [b], replaces "text", and no tokenizer is needed.

    Raises:
      UserError: settings that do not fit; on iteration, too many bad records.
    """
    rows = share("config.global_batch_size", config.global_batch_size, process_count)
    mixture = open_mixture(config)
    for _, source in mixture:
        if (columns := getattr(source, "without_captions", "")) and not config.finetune.classes:
            raise UserError(
                f"config.data.train has no captions (config.data.captions {', '.join(config.data.captions)}): {columns}"
            )
    schedules = [sources.Schedule(len(source), config.seed, process_index, process_count) for _, source in mixture]
    identity = {
        "process_index": process_index,
        "process_count": process_count,
        "shards": [len(source) for _, source in mixture],
        "sources": _described(config, mixture),
    }
    return _Batches(config, tokenizer, worker_count(config), mixture, schedules, rows, identity)


def open_mixture(config: Config) -> list[tuple[float, Any]]:
    """Opens the sources of config.data.train, "WEIGHT*KIND:REST;WEIGHT*KIND:REST", each with its weight."""
    mixture = []
    for weight, value in entries(config):
        if not weight:
            raise UserError(f"config.data.train: a weight must be above 0, got {f'{weight}*{value}'!r}")
        mixture.append((weight, sources.open_source(value, config.data, "config.data.train")))
    return mixture


def entries(config: Config) -> list[tuple[float, str]]:
    """Lists the weights and sources that config.data.train names."""
    found = [_WEIGHTED.fullmatch(entry).groups() for entry in _ENTRIES.split(config.data.train)]
    return [(float(weight or 1), value) for weight, value in found]


def _described(config, mixture):
    """Returns what identifies each source, so that a run resumes with the same files under any root."""
    return [
        {"weight": weight, "kind": value.partition(":")[0], **getattr(source, "fingerprint", dict)()}
        for (weight, value), (_, source) in zip(entries(config), mixture, strict=True)
    ]


def problems(config: Config) -> list[str]:
    """Returns the reason why config.data.train cannot be opened; nothing where it can."""
    try:
        open_mixture(config)
    except UserError as error:
        return [str(error)]
    return []


def make_tokenizer(config: Config, saved: Tokenizer | None = None) -> Tokenizer | None:
    """Chooses a run's tokenizer: the `saved` one of its checkpoint, that of `config.data.vocab`, or a new one.

    None if a classifier is trained, which reads no text.

    Raises:
      UserError: the tokenizer has more entries than `config.model.text.vocab_size`, or `mask_counts` is of another one.
    """
    if config.finetune.classes:
        return None
    size = config.model.text.vocab_size
    tokenizer = saved
    if not tokenizer:
        from flip_jax.data import vocabulary  # only a new run needs it

        tokenizer = vocabulary.make(config)
    if tokenizer.vocab_size > size:
        raise UserError(
            f"config.model.text.vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size} entries "
            f"({config.data.vocab}); raise it to at least {tokenizer.vocab_size}"
        )
    if config.model.text.mask_counts:
        from flip_jax.data import token_counts  # few runs need it

        token_counts.check(config.model.text, tokenizer)
    return tokenizer


class _Batches(grain.IterDataset):
    """The data set whose iterators Grain prefetches, and Orbax saves and restores."""

    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def __iter__(self):
        iterator = _Prefetched(_BatchIterator(*self._arguments), PREFETCH)
        # The interpreter waits for our pools' threads at exit, before any destructor runs. A weak reference, so that
        # this does not keep the iterator alive.
        reference = weakref.ref(iterator)
        atexit.register(lambda: (live := reference()) and live.close())
        return iterator


class _Prefetched(grain.experimental.ThreadPrefetchDatasetIterator):
    """Grain's prefetching, closed once only: its destructor closes again at exit, when its modules are gone."""

    def close(self):
        if not self._closed:
            self._parent.maker.close()  # so that the thread that prefetches waits for nothing
            super().close()


class _BatchIterator(grain.DatasetIterator):
    """Mixes the sources and counts their records. Its state is each source's place and the counts."""

    def __init__(self, config, tokenizer, workers, mixture, schedules, rows, identity):
        super().__init__()
        self._config, self._tokenizer, self._rows, self._identity = config, tokenizer, rows, identity
        self._workers, self._mixture, self._schedules = workers, mixture, schedules
        self._weights = [weight for weight, _ in mixture]
        self._bad_in_a_row, self._examples = 0, {}
        self._distinct: set[str] | None = set()  # keys, until they are as many as a batch has
        self._counts = {"read": 0, "used": 0, "bad": {}}
        self._open([{} for _ in mixture])

    def _open(self, positions):
        """Makes the streams, each from its position on; nothing is read, and no worker started, before it is used."""
        config, process = self._config, self._identity["process_index"]
        opened = [source for _, source in self._mixture]
        target = samples.make_target(config, self._tokenizer)
        if self._workers:
            from flip_jax.data import workers  # only a run with workers needs it

            values = [value for _, value in entries(config)]
            self.maker = workers.Workers(self._workers, config, self._tokenizer, values, opened, self._rows)
            opened = self.maker.sources
        else:
            self.maker = _Threads(config, target)
        says_captions = target.name == "text" and not process
        self._streams = [
            stream.Stream(source, schedule, f"{config.seed}/{process}", self.maker, says_captions, **position)
            for source, schedule, position in zip(opened, self._schedules, positions, strict=True)
        ]

    def __next__(self):
        keys, made = [], []
        current, several = self._streams[0], len(self._streams) > 1
        while len(keys) < self._rows:
            if several:
                # Read the source furthest behind its share: this needs no random numbers and no state of its own.
                shares = [(one.read + 1) / weight for one, weight in zip(self._streams, self._weights, strict=True)]
                current = self._streams[shares.index(min(shares))]
            key, sample = next(current)
            self._counts["read"] += 1
            if isinstance(sample, str):
                self._count_bad(key, sample)
            else:
                keys.append(key)
                made.append(sample)
                self._counts["used"] += 1
                self._bad_in_a_row = 0
        self._warn_of_few(keys)
        return self.maker.stack(made) | {"keys": keys, "counts": copy.deepcopy(self._counts)}

    def _warn_of_few(self, keys):
        """Warns once where a batch is larger than the source: it then compares images with themselves."""
        if self._distinct is None:
            return
        self._distinct.update(keys)
        if self._counts["used"] >= 4 * self._rows or len(self._distinct) >= self._rows:
            # After four batches nearly all records were seen at least once, whatever the window is.
            if len(self._distinct) < 0.9 * self._rows:
                _log.warning(
                    "config.global_batch_size: this process's %d samples of a batch are more than the %d usable "
                    "records of its share of config.data.train; lower it, or add data",
                    self._rows,
                    len(self._distinct),
                )
            self._distinct = None

    def _count_bad(self, key, kind):
        """Counts a bad record. UserError if there are too many."""
        read, used, kinds = (self._counts[name] for name in ("read", "used", "bad"))
        kinds[kind] = kinds.get(kind, 0) + 1
        self._examples[kind] = key
        self._bad_in_a_row += 1
        limit = self._config.data.max_bad_fraction
        too_many = read >= max(JUDGE_AFTER, 2 * self._rows) and read - used > limit * read
        if too_many or self._bad_in_a_row >= (GIVE_UP_AFTER if used else stream.NONE_AMONG):
            found = ", ".join(f"{count} {kind} (last {self._examples.get(kind)})" for kind, count in kinds.items())
            raise UserError(
                f"config.data.train {self._config.data.train!r}: {read - used} of {read} records cannot be used: "
                f"{found}. Repair them, or raise config.data.max_bad_fraction ({limit})"
            )

    def get_state(self):
        streams = [{"place": one.place, "read": one.read} for one in self._streams]
        return self._identity | {"streams": streams, "counts": copy.deepcopy(self._counts)}  # the others never change

    def set_state(self, state):
        # A place means the same records only in the same list of shards, dealt to the same number of processes.
        for key, ours in self._identity.items():
            if key == "sources":
                from flip_jax.data import fingerprint  # only a run that is resumed needs it

                fingerprint.compare(state.get(key, ours), ours)  # earlier versions saved none
            elif state[key] != ours:
                raise UserError(
                    f"the data position was saved with {key} {state[key]}, now it is {ours}, which changes the order "
                    "of samples; use the same processes and shards, or start a new run with config.init_from"
                )
        state = copy.deepcopy(state)
        self._counts = state["counts"]
        self._stop()
        self._open(state["streams"])

    def close(self):
        if not self._closed:
            super().close()
            self._stop()

    def _stop(self):
        self.maker.close()
        for one in self._streams:
            one.close()


class _Threads:
    """Makes samples in threads, which wait for one that takes long. `workers.Workers` does the same in processes."""

    def __init__(self, config, target):
        self._config, self._target, self.look_ahead = config, target, 2 * threads(config)
        self._pool = ThreadPoolExecutor(threads(config), "flip_jax-decode")

    def prepare(self, records):
        """Returns the future of each record's sample, or of the kind of a bad one."""
        return self._pool.submit(samples.prepare, records, self._config, self._target)

    def stack(self, made):
        """Returns the arrays of a batch of samples."""
        images, targets = zip(*made, strict=True)
        return {"image": np.stack(images), self._target.name: np.stack(targets)}

    def close(self):
        self._pool.shutdown(cancel_futures=True)


def worker_count(config: Config) -> int:
    """Returns how many worker processes read and decode; 0: threads of this process do."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    if config.data.workers == "auto":
        return cores - 1 if cores > 4 else 0
    if config.data.workers and not cores:
        raise UserError(f"config.data.workers {config.data.workers}: worker processes need Linux; use 0, threads")
    return int(config.data.workers)


def threads(config):
    return config.data.threads or os.cpu_count() or 1


def share(key, rows, process_count):
    if rows % process_count:
        raise UserError(f"{key} {rows} does not divide by the {process_count} processes; use a multiple of that")
    return rows // process_count
