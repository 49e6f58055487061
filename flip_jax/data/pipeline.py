"""Sources to batches: shuffle, decode, tokenise, batch, prefetch. Every position can be saved and resumed exactly."""

import atexit
import collections
import copy
import functools
import itertools
import logging
import os
import random
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np

from flip_jax.config import Config
from flip_jax.data import sources, transforms
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

PREFETCH = 2  # batches ready before they are asked for
SLICE = 16  # records that a thread decodes at a time
JUDGE_AFTER = 1000  # records, before which the share of bad ones means little
GIVE_UP_AFTER = 10_000  # bad records in a row
NONE_AMONG = 100  # records, without a single one that can be used, at which a source is given up
_ENTRIES = re.compile(r";(?=(?:[\d.]+\*)?\w+:)")
_WEIGHTED = re.compile(r"(?:(\d+\.?\d*)\*)?(.*)", re.DOTALL)


def train_dataset(
    config: Config, tokenizer: Tokenizer | None, *, process_index: int, process_count: int
) -> grain.IterDataset:
    """This process's training batches, without end.

    Each is {"image": uint8 [b, S, S, 3], "text": int32 [b, T], "keys": list[str], "counts": {"read": int, "used": int,
    "bad": {kind: int}}} with b = global_batch_size / process_count. Counts run from the start of training to the end of
    the batch; read = used + all bad. The state of an iterator (JSON) resumes exactly, with any number of threads.
    With `config.finetune.classes` there is "label", int32 [b], in place of "text", and no need of a tokenizer.

    Raises:
      ValueError: settings that do not fit; on iteration, too many bad records.
    """
    rows = _share("config.global_batch_size", config.global_batch_size, process_count)
    mixture = _mixture(config)
    schedules = [sources.Schedule(len(source), config.seed, process_index, process_count) for _, source in mixture]
    fingerprint = {
        "process_index": process_index,
        "process_count": process_count,
        "shards": [len(source) for _, source in mixture],
    }
    return _Batches(config, tokenizer, mixture, schedules, rows, fingerprint)


def _mixture(config):
    """The weight and source of each entry of config.data.train, "WEIGHT*KIND:REST;WEIGHT*KIND:REST"."""
    mixture = []
    for entry in _ENTRIES.split(config.data.train):
        weight, value = _WEIGHTED.fullmatch(entry).groups()
        if weight and not float(weight):
            raise ValueError(f"config.data.train: a weight must be above 0, got {entry!r}")
        mixture.append((float(weight or 1), sources.open_source(value, config.data, "config.data.train")))
    return mixture


def eval_dataset(source: str, config: Config, *, with_text: bool = False) -> Iterator[dict[str, Any]]:
    """One pass over a source in order: this process's rows of batches of config.eval.batch_size.

    Each is {"image": uint8 [b, S, S, 3], "label": int32 [b], -1 for none, "keys": list[str], "mask": bool [b]} and,
    with text, "texts": the captions of each row. `mask` is False for a picture that cannot be used, and where the last
    batch is filled up (key ""). All processes get the same number of batches.

    Raises:
      ValueError: the source cannot be read, or the batch does not divide by the number of processes.
    """
    rows = _share("config.eval.batch_size", config.eval.batch_size, jax.process_count())
    return _eval_batches(sources.open_source(source, config.data), rows, config, with_text)


def _eval_batches(source, rows, config, with_text):
    size, filling = config.model.image.image_size, {"key": ""}
    black = np.zeros((size, size, 3), np.uint8)

    def decode(record):
        try:
            return transforms.decode(record["image"], size, config.data) if "image" in record else None
        except transforms.BadImage:
            return None

    records = sources.in_order(source, iter(range(len(source))))
    with ThreadPoolExecutor(_threads(config), "flip_jax-eval") as pool:
        # Every process goes through all records and takes its share by position, so all know how many there are.
        while chunk := list(itertools.islice(records, rows * jax.process_count())):
            chunk = chunk[jax.process_index() :: jax.process_count()]
            chunk += [filling] * (rows - len(chunk))
            images = list(pool.map(decode, chunk))
            labels = [record.get("label") for record in chunk]
            batch = {
                "image": np.stack([black if image is None else image for image in images]),
                "label": np.array([-1 if label is None else label for label in labels], np.int32),
                "keys": [record["key"] for record in chunk],
                "mask": np.array([image is not None for image in images]),
            }
            yield batch | ({"texts": [record.get("texts", []) for record in chunk]} if with_text else {})


def caption_sample(config: Config, limit: int = 100_000) -> list[str]:
    """At most `limit` captions of the training set, to learn a vocabulary from; the same in every process."""
    mixture, captions = _mixture(config), []
    for _, source in mixture:
        schedule = sources.Schedule(len(source), config.seed)
        records = sources.in_order(source, (schedule[i][0] for i in range(len(source))))
        texts = (text for record in records for text in record.get("texts", []))
        captions += itertools.islice(texts, limit // len(mixture))
    return captions


def make_tokenizer(config: Config, saved: Tokenizer | None = None) -> Tokenizer | None:
    """The tokenizer of a run: its checkpoint's `saved` one, else `config.data.vocab`'s, else one trained on captions.

    None where a classifier is trained, which reads no text.

    Raises:
      UserError: it has more entries than `config.model.text.vocab_size`.
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
    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def __iter__(self):
        iterator = _Prefetched(_BatchIterator(*self._arguments), PREFETCH)
        reference = weakref.ref(iterator)
        atexit.register(lambda: (live := reference()) and live.close())
        return iterator


class _Prefetched(grain.experimental.ThreadPrefetchDatasetIterator):
    def close(self):
        if not self._closed:  # grain's destructor calls it again, at exit without the modules that it needs
            super().close()


class _BatchIterator(grain.DatasetIterator):
    """Its state is the place and the number of records read of each source, and the counts."""

    def __init__(self, config, tokenizer, mixture, schedules, rows, fingerprint):
        super().__init__()
        self._config, self._rows, self._fingerprint = config, rows, fingerprint
        self._weights = [weight for weight, _ in mixture]
        self._pool = ThreadPoolExecutor(_threads(config), "flip_jax-decode")
        prepare = functools.partial(self._pool.submit, _prepare, config=config, tokenizer=tokenizer)
        process = fingerprint["process_index"]
        self._streams = [
            _Stream(source, schedule, f"{config.seed}/{process}", prepare, 2 * _threads(config))
            for (_, source), schedule in zip(mixture, schedules, strict=True)
        ]
        self._bad_in_a_row, self._examples = 0, {}
        self._counts = {"read": 0, "used": 0, "bad": {}}

    def __next__(self):
        rows = []
        while len(rows) < self._rows:
            # The source that is furthest behind its share: the order needs no random numbers, and no state of its own.
            shares = [(stream.read + 1) / weight for stream, weight in zip(self._streams, self._weights, strict=True)]
            key, sample = next(self._streams[shares.index(min(shares))])
            self._counts["read"] += 1
            if isinstance(sample, str):
                self._count_bad(key, sample)
            else:
                rows.append((key, *sample))
                self._counts["used"] += 1
                self._bad_in_a_row = 0
        keys, images, targets = zip(*rows, strict=True)
        counts, name = copy.deepcopy(self._counts), "label" if self._config.finetune.classes else "text"
        return {"image": np.stack(images), name: np.stack(targets), "keys": list(keys), "counts": counts}

    def _count_bad(self, key, kind):
        read, used, kinds = (self._counts[name] for name in ("read", "used", "bad"))
        kinds[kind] = kinds.get(kind, 0) + 1
        self._examples[kind] = key
        self._bad_in_a_row += 1
        limit = self._config.data.max_bad_fraction
        too_many = read >= max(JUDGE_AFTER, 2 * self._rows) and read - used > limit * read
        if too_many or self._bad_in_a_row >= (GIVE_UP_AFTER if used else NONE_AMONG):
            found = ", ".join(f"{count} {kind} (last {self._examples.get(kind)})" for kind, count in kinds.items())
            raise ValueError(
                f"config.data.train {self._config.data.train!r}: {read - used} of {read} records cannot be used: "
                f"{found}. Repair them, or raise config.data.max_bad_fraction ({limit})"
            )

    def get_state(self):
        streams = [{"place": stream.place, "read": stream.read} for stream in self._streams]
        return copy.deepcopy(self._fingerprint | {"streams": streams, "counts": self._counts})

    def set_state(self, state):
        for key, ours in self._fingerprint.items():
            if state[key] != ours:
                raise ValueError(
                    f"the data position was saved with {key} {state[key]}, now it is {ours}, which changes the order "
                    "of samples; use the same processes and shards, or start a new run with config.init_from"
                )
        state = copy.deepcopy(state)
        self._counts = state["counts"]
        for stream, position in zip(self._streams, state["streams"], strict=True):
            stream.go_to(**position)

    def close(self):
        if not self._closed:
            super().close()
            for stream in self._streams:
                stream.close()
            self._pool.shutdown(cancel_futures=True)


class _Stream:
    """The shuffled, decoded records of one source: (key, sample or kind of bad record) each.

    `place` says where the window of records in use began and how many of them are used up.
    """

    def __init__(self, source, schedule, seed, prepare, look_ahead):
        self._source, self._schedule, self._seed = source, schedule, seed
        self._prepare, self._look_ahead = prepare, look_ahead
        self._readable = False
        places = [[i, 0] for i in range(min(source.interleave, schedule.per_epoch))]
        self.go_to({"places": places, "window": 0, "position": 0}, 0)

    def go_to(self, place, read):
        self.place, self.read, self._samples = place, read, self._decoded(place)

    def __next__(self):
        self.place, key, sample = next(self._samples)
        self.read += 1
        return key, sample

    def close(self):
        self._samples.close()

    def _decoded(self, place):
        """(place after it, key, sample or kind of bad record) of each record from a place on."""
        ahead = collections.deque()
        for begin, records in self._slices(**place):
            ahead.append((begin, records, self._prepare(records)))
            if len(ahead) > self._look_ahead:
                begin, records, future = ahead.popleft()
                for i, (record, sample) in enumerate(zip(records, future.result(), strict=True), begin["position"] + 1):
                    yield begin | {"position": i}, record["key"], sample

    def _chunks(self, places):
        """As `readers.interleave`, but gives up before a window is filled with the complaints of unreadable shards."""
        unreadable = 0
        for after, chunk in sources.interleave(self._source, self._schedule, places):
            self._readable = self._readable or not all("bad" in record for record in chunk)
            unreadable += len(chunk)
            if not self._readable and unreadable >= NONE_AMONG:
                last = chunk[-1]
                raise ValueError(
                    f"config.data.train: none of the first {unreadable} records of a source can be used; the last, "
                    f"{last['key']}: {last['bad']}"
                )
            yield after, chunk

    def _slices(self, places, window, position):
        """(place, records) of each slice from a place on; every window of records is shuffled."""
        chunks, begin, coming = self._chunks(places), places, []
        while True:
            while len(coming) < self._source.window:
                places, chunk = next(chunks)
                coming += chunk
            random.Random(f"{self._seed}/{window}").shuffle(coming)
            records, current, begin, coming = coming[position:], begin, places, []
            while records:
                yield {"places": current, "window": window, "position": position}, records[:SLICE]
                position += len(records[:SLICE])
                del records[:SLICE]
                # The next window fills while this one is used up: no wait between them, nor the memory of both.
                while len(coming) < min(position, self._source.window):
                    places, chunk = next(chunks)
                    coming += chunk
            window, position = window + 1, 0


def _prepare(records, config, tokenizer):
    """(image, tokens) of each record, or (image, label), or the kind of a bad one."""
    samples, targets, classes = [], [], config.finetune.classes
    for record in records:
        try:
            if "bad" in record:
                raise transforms.BadImage(record["bad"])
            choices = record["texts"] if not classes else [label for label in (record["label"],) if label is not None]
            if not choices:
                raise transforms.BadImage("no label" if classes else "no text")
            rng = transforms.generator(config.seed, record["epoch"], record["key"])
            target = rng.choice(choices)
            if classes and target >= classes:
                raise transforms.BadImage(f"label above {classes - 1}")
            samples.append(transforms.decode(record["image"], config.model.image.image_size, config.data, rng))
            targets.append(target)
        except transforms.BadImage as error:
            samples.append(str(error))
    found = iter(np.array(targets, np.int32) if classes else tokenizer(targets, config.model.text.context_length))
    return [sample if isinstance(sample, str) else (sample, next(found)) for sample in samples]


def _threads(config):
    return config.data.threads or os.cpu_count() or 1


def _share(key, rows, process_count):
    if rows % process_count:
        raise ValueError(f"{key} {rows} does not divide by the {process_count} processes; use a multiple of that")
    return rows // process_count
