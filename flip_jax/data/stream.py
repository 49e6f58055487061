"""The shuffled, decoded records of one source, from a position that can be saved and resumed exactly."""

import collections
import logging
import random

from flip_jax.data import sources
from flip_jax.data.records import held, take
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

SLICE = 32  # records that a thread decodes at a time, fewer if they are large
MEAN_HELD, MIN_HELD = 100 * 2**10, 2**28  # bytes of a window: for each of its records; at least
NONE_AMONG = 100  # records of which none can be used, at the start of a run


class Stream:
    """The shuffled, decoded records of one source: (key, sample or kind of bad record) each.

    Records are shuffled in windows. A window can be read again from where it began, and its shuffle depends on its
    number alone, so the whole state is `place`: where the window in use began ("places", one per shard that is being
    read), its number ("window"), and how many of its records are used up ("position"). `read` counts all records.
    """

    def __init__(self, source, schedule, seed, maker, says_captions, place=None, read=0):
        self._source, self._schedule, self._seed, self._maker = source, schedule, seed, maker
        self._readable, self._says = False, says_captions
        places = [[i, 0] for i in range(min(source.interleave, schedule.per_epoch))]
        self._begin = place or {"places": places, "window": 0, "position": 0}
        self._position, self.read = self._begin["position"], read
        self._samples = self._decoded(self._begin)

    @property
    def place(self):
        return self._begin | {"position": self._position}

    def __next__(self):
        self._begin, self._position, key, sample = next(self._samples)
        self.read += 1
        return key, sample

    def close(self):
        self._samples.close()

    def _decoded(self, place):
        """Yields (place of its slice, position after it, key, sample or kind of bad record) of each record.

        Slices are decoded in parallel and used in order, so threads change neither the order nor the pixels.
        """
        ahead = collections.deque()
        for begin, records in self._slices(**place):
            ahead.append((begin, records, self._maker.prepare(records)))
            if len(ahead) > self._maker.look_ahead:
                begin, records, future = ahead.popleft()
                for i, (record, sample) in enumerate(zip(records, future.result(), strict=True), begin["position"] + 1):
                    yield begin, i, record["key"], sample

    def _slices(self, places, window, position):
        """Yields (place, records) of each slice from a place on."""
        chunks = self._chunks(places)
        # The next window: where it begins, its records read so far, and their bytes, which may end it early.
        begin, coming, size = places, [], 0
        most = max(MIN_HELD, MEAN_HELD * self._source.window)

        def fill(length):
            nonlocal places, size
            while len(coming) < length and size < most:
                places, chunk = next(chunks)
                coming.extend(chunk)
                size += sum(map(held, chunk))

        while True:
            fill(self._source.window)
            random.Random(f"{self._seed}/{window}").shuffle(coming)
            records, current = coming[position:], begin  # a resumed window skips what was used up before
            begin, coming, size = places, [], 0
            while records:
                some = take(iter(records), SLICE)
                yield {"places": current, "window": window, "position": position}, some
                position += len(some)
                del records[: len(some)]
                # The next window fills at the pace at which this one empties: the loader never waits for a whole
                # window, and never holds two.
                fill(min(position, self._source.window))
            window, position = window + 1, 0

    def _chunks(self, places):
        """Interleaves the source's shards, but gives up when the first records are all unreadable.

        Otherwise a window would first have to fill with one bad record per shard.
        """
        unreadable = 0
        for after, chunk in sources.interleave(self._source, self._schedule, places):
            self._readable = self._readable or not all("bad" in record for record in chunk)
            if self._says and (record := next((record for record in chunk if record.get("texts")), None)):
                _log.info("config.data.train: %s", sources.describe_captions(self._source, record))
                self._says = False
            unreadable += len(chunk)
            if not self._readable and unreadable >= NONE_AMONG:
                last = chunk[-1]
                why = f" ({last['why']})" if "why" in last else ""
                raise UserError(
                    f"config.data.train: none of the first {unreadable} records of a source can be used; the last, "
                    f"{last['key']}: {last['bad']}{why}. Check its path and format with `flip inspect`"
                )
            yield after, chunk
