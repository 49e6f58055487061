"""Sources to batches: shuffle, decode, tokenize, batch, prefetch. Every position can be saved and resumed exactly."""

import atexit
import copy
import functools
import itertools
import logging
import os
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from flip_jax.config import Config
from flip_jax.data import sources, stream, transforms
from flip_jax.data.records import BadRecord, Record
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
    the batch; read = used + all bad. The state of an iterator (JSON) resumes exactly, with any number of threads.
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
    return _Batches(config, _make_target(config, tokenizer), mixture, schedules, rows, identity)


def open_mixture(config: Config) -> list[tuple[float, Any]]:
    """Opens the sources of config.data.train, "WEIGHT*KIND:REST;WEIGHT*KIND:REST", each with its weight."""
    mixture = []
    for entry in _ENTRIES.split(config.data.train):
        weight, value = _WEIGHTED.fullmatch(entry).groups()
        if weight and not float(weight):
            raise UserError(f"config.data.train: a weight must be above 0, got {entry!r}")
        mixture.append((float(weight or 1), sources.open_source(value, config.data, "config.data.train")))
    return mixture


def _described(config, mixture):
    """Returns what identifies each source, so that a run resumes with the same files under any root."""
    entries = [_WEIGHTED.fullmatch(entry).groups() for entry in _ENTRIES.split(config.data.train)]
    return [
        {"weight": float(weight or 1), "kind": value.partition(":")[0], **getattr(source, "fingerprint", dict)()}
        for (weight, value), (_, source) in zip(entries, mixture, strict=True)
    ]


def caption_sample(config: Config, limit: int = 100_000) -> list[str]:
    """Reads at most `limit` captions of the training data to learn a vocabulary from, the same in every process."""
    mixture, captions = open_mixture(config), []
    for _, source in mixture:
        schedule = sources.Schedule(len(source), config.seed)
        records = sources.in_order(source, (schedule[i][0] for i in range(len(source))))
        texts = (text for record in records for text in record.get("texts", []))
        captions += itertools.islice(texts, limit // len(mixture))
    return captions


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
      UserError: the tokenizer has more entries than `config.model.text.vocab_size`.
    """
    if config.finetune.classes:
        return None
    size = config.model.text.vocab_size
    if saved:
        tokenizer = saved
    elif config.data.vocab:
        tokenizer = Tokenizer.from_vocab(config.data.vocab)
    else:
        _log.info("config.data.vocab is empty: training a WordPiece of at most %d entries on the captions", size)
        tokenizer = Tokenizer.train(caption_sample(config), size)
    if tokenizer.vocab_size > size:
        raise UserError(
            f"config.model.text.vocab_size {size} is less than the tokenizer's {tokenizer.vocab_size} entries "
            f"({config.data.vocab}); raise it to at least {tokenizer.vocab_size}"
        )
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
            super().close()


class _BatchIterator(grain.DatasetIterator):
    """Mixes the sources and counts their records. Its state is each source's place and the counts."""

    def __init__(self, config, target, mixture, schedules, rows, identity):
        super().__init__()
        self._config, self._target, self._rows, self._identity = config, target, rows, identity
        self._weights = [weight for weight, _ in mixture]
        self._pool = ThreadPoolExecutor(threads(config), "flip_jax-decode")
        prepare = functools.partial(self._pool.submit, _prepare, config=config, target=target)
        process = identity["process_index"]
        says_captions = target.name == "text" and not process
        self._streams = [
            stream.Stream(source, schedule, f"{config.seed}/{process}", prepare, 2 * threads(config), says_captions)
            for (_, source), schedule in zip(mixture, schedules, strict=True)
        ]
        self._bad_in_a_row, self._examples = 0, {}
        self._distinct: set[str] | None = set()  # keys, until they are as many as a batch has
        self._counts = {"read": 0, "used": 0, "bad": {}}

    def __next__(self):
        rows = []
        while len(rows) < self._rows:
            # Read the source that is furthest behind its share: this needs no random numbers and no state of its own.
            shares = [(one.read + 1) / weight for one, weight in zip(self._streams, self._weights, strict=True)]
            key, sample = next(self._streams[shares.index(min(shares))])
            self._counts["read"] += 1
            if isinstance(sample, str):
                self._count_bad(key, sample)
            else:
                rows.append((key, *sample))
                self._counts["used"] += 1
                self._bad_in_a_row = 0
        keys, images, targets = zip(*rows, strict=True)
        self._warn_of_few(keys)
        batch = {"image": np.stack(images), self._target.name: np.stack(targets)}
        return batch | {"keys": list(keys), "counts": copy.deepcopy(self._counts)}

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
        return copy.deepcopy(self._identity | {"streams": streams, "counts": self._counts})

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
        for one, position in zip(self._streams, state["streams"], strict=True):
            one.go_to(**position)

    def close(self):
        if not self._closed:
            super().close()
            for one in self._streams:
                one.close()
            self._pool.shutdown(cancel_futures=True)


class _Target(NamedTuple):
    """The part of a record that an image is paired with in training."""

    name: str  # its key in a batch
    choices: Callable[[Record], list]  # what may be drawn as the target of a record; BadRecord if there is nothing
    encode: Callable[[list], np.ndarray]  # the targets that were drawn, as an array with one row each


def _make_target(config, tokenizer):
    """Decides what an image is paired with; the batches below never ask whether a classifier is trained."""
    classes = config.finetune.classes

    def captions(record):
        if not record["texts"]:
            raise BadRecord("no text")
        return record["texts"]

    def labels(record):
        if record["label"] is None:
            raise BadRecord("no label")
        if not 0 <= record["label"] < classes:
            raise BadRecord("label below 0" if record["label"] < 0 else f"label above {classes - 1}")
        return [record["label"]]

    if classes:
        return _Target("label", labels, functools.partial(np.array, dtype=np.int32))
    return _Target("text", captions, functools.partial(tokenizer, length=config.model.text.context_length))


def _prepare(records, config, target):
    """Returns (image, target) of each record, or the kind of a bad one."""
    samples, drawn = [], []
    for record in records:
        try:
            if "bad" in record:
                raise BadRecord(record["bad"])
            choices = target.choices(record)
            rng = transforms.generator(config.seed, record["epoch"], record["key"])
            choice = rng.choice(choices)
            samples.append(transforms.decode(record["image"], config.model.image.image_size, config.data, rng))
            drawn.append(choice)
        except BadRecord as error:
            samples.append(str(error))
    encoded = iter(target.encode(drawn))  # all at once; bad records have no row
    return [sample if isinstance(sample, str) else (sample, next(encoded)) for sample in samples]


def threads(config):
    return config.data.threads or os.cpu_count() or 1


def share(key, rows, process_count):
    if rows % process_count:
        raise UserError(f"{key} {rows} does not divide by the {process_count} processes; use a multiple of that")
    return rows // process_count
