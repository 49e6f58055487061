"""The program of a worker process, `workers` has its counterpart. It imports little: neither JAX nor Grain."""

import ctypes
import dataclasses
import functools
import logging
import mmap
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import msgpack
import numpy as np

from flip_jax.config import Config
from flip_jax.data import indexed, samples, sources
from flip_jax.data.records import held, is_last, take_chunk
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

# The memory that all processes share has batches from 0 on, then a mark of each worker, then the tapes.
MARKS, TAPE = 2**47, 2**48  # where marks begin, and where the first tape does; the bytes of a tape
# Not pickle or marshal: a decoder that a hostile image took over can send nothing but data. Keys may hold surrogates.
pack = functools.partial(msgpack.packb, unicode_errors="surrogatepass")
unpack = functools.partial(msgpack.unpackb, strict_map_key=False, unicode_errors="surrogatepass")
_FREE = 3  # fallocate: punch a hole, keep the size


class Layout:
    """Where in its `size` bytes a batch has its images and its targets."""

    def __init__(self, config, rows):
        size = config.model.image.image_size
        self._image = (rows, size, size, 3)
        self._target = (rows,) if config.finetune.classes else (rows, config.model.text.context_length)
        self._name = "label" if config.finetune.classes else "text"
        self._begin = pages(int(np.prod(self._image)))
        self.size = pages(self._begin + 4 * int(np.prod(self._target)))

    def arrays(self, array):
        """Returns the parts of a batch's bytes as its arrays."""
        image, target = array[: np.prod(self._image)], array[self._begin :][: 4 * np.prod(self._target)]
        return {"image": image.reshape(self._image), self._name: target.view(np.int32).reshape(self._target)}


def pages(size):
    """Rounds a number of bytes up to whole pages, the least that the system gives back."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class _Server:
    """Answers the requests of one worker process, those of each channel in a thread of its own."""

    def __init__(self, store, index, settings):
        self._store, self._mark = store, MARKS + 8 * index
        self._config = config = _restored(Config, settings["config"])
        tokenizer = Tokenizer.from_json(settings["tokenizer"]) if settings["tokenizer"] else None
        self._target = samples.make_target(config, tokenizer)
        self._sources = [
            kind and sources.class_of(kind)(paths, sources.with_keys(config.data, kind))
            for kind, paths in (described or ("", ()) for described in settings["sources"])
        ]
        self._layout, self._too_slow = Layout(config, settings["rows"]), settings["too_slow"]
        self._begin = self._tape = settings["tape"] * TAPE
        self._tape_lock, self._decoder = threading.Lock(), threading.Lock()
        self._readers, self._made, self._lines = {}, {}, []
        self._batch = functools.cache(self._map)
        self._libc = ctypes.CDLL(None, use_errno=True)
        logging.basicConfig(level=logging.WARNING, handlers=[_Lines(self._lines)], force=True)
        logging.getLogger("flip_jax").setLevel(logging.INFO)

    def serve(self, end: Connection) -> None:
        """Answers requests until the other end is closed, and then ends the process."""
        try:
            while True:
                kind, *request = unpack(end.recv_bytes())
                error, answer, used = "", None, []
                try:
                    answer = getattr(self, kind)(*request, used)
                except UserError as raised:
                    error, answer = "UserError", str(raised)
                except Exception:
                    error = traceback.format_exc()
                lines = [self._lines.pop(0) for _ in range(len(self._lines))]
                end.send_bytes(pack((error, answer, lines)))
                for at, size in used:  # only now: if this process had died, another would have had to read them
                    if self._libc.fallocate(self._store, _FREE, ctypes.c_int64(at), ctypes.c_int64(pages(size))):
                        raise RuntimeError(f"memory cannot be freed: {os.strerror(ctypes.get_errno())}")
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def read(self, reader, wanted, offset, _):
        """Reads a chunk to the tape, and returns its records without their bytes, each with the offset after it."""
        at, reading = self._readers.pop(tuple(reader), (None, None))
        if at != offset:
            source = self._sources[reader[0]]
            reading = source.read(wanted, offset) if source else indexed.load(wanted, self._config.data)
        chunk, says = [], True
        for record, offset in take_chunk(reading):
            if "bad" in record:
                chunk.append((record, offset))
                continue
            blob = pack(record)
            with self._tape_lock:
                if self._tape + len(blob) > self._begin + TAPE:
                    self._tape = self._begin  # freed long ago
                place, self._tape = self._tape, self._tape + pages(len(blob))
            os.pwrite(self._store, blob, place)
            short = {"key": record["key"], "at": (place, len(blob)), "size": held(record)}
            if says and record["texts"]:  # an example, which is logged
                short |= {"texts": record["texts"], "caption": record["caption"]}
                says = False
            chunk.append((short, offset))
        if not is_last(chunk):
            self._readers[tuple(reader)] = (chunk[-1][1], reading)
        return chunk

    def prepare(self, numbers, records, used):
        """Makes samples and keeps them. Returns the kinds of bad ones, None for others."""
        with self._decoder:
            made = samples.prepare(self._load(records), self._config, self._target)
        for number, record, sample in zip(numbers, records, made, strict=True):
            if not isinstance(sample, str):
                self._made[number] = (*sample, record["at"])
            elif "at" in record:
                used.append(record["at"])
        return [sample if isinstance(sample, str) else None for sample in made]

    def _load(self, records):
        """Yields the records with their bytes, each after noting which it is; one that takes too long ends us."""
        for record in records:
            if "at" in record:
                at, size = record["at"]
                os.pwrite(self._store, at.to_bytes(8, "little"), self._mark)
                # Nothing in Python can interrupt a decoder, but the system's default for this timer's signal does.
                signal.setitimer(signal.ITIMER_PROF, self._too_slow)
                record = unpack(os.pread(self._store, size, at))
            yield record
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.pwrite(self._store, bytes(8), self._mark)

    def put(self, place, rows, numbers, records, used):
        """Copies samples to rows of a batch. Without `records` returns False where an earlier process made some."""
        missing = [i for i, number in enumerate(numbers) if number not in self._made]
        if missing and not records:
            return False
        if missing:
            self.prepare([numbers[i] for i in missing], [records[i] for i in missing], used)
        images, targets = self._batch(place)
        for row, number in zip(rows, numbers, strict=True):
            images[row], targets[row], at = self._made[number]
            used.append(at)
        for number in numbers:
            del self._made[number]
        return True

    def _map(self, place):
        size = self._layout.size
        mapped = mmap.mmap(self._store, size, offset=place * size)
        return tuple(self._layout.arrays(np.frombuffer(mapped, np.uint8)).values())


def _restored(kind, values):
    """Undoes dataclasses.asdict. `config_check` would import JAX."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    groups = {key: _restored(types[key], value) for key, value in values.items() if isinstance(value, dict)}
    tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return kind(**values | groups | tuples)


class _Lines(logging.Handler):
    """Keeps what is logged for the main process, which gets it with the next answer."""

    def __init__(self, lines):
        super().__init__()
        self._lines = lines

    def emit(self, record):
        self._lines.append((record.name, record.levelno, record.getMessage()))


def main() -> None:
    """Serves the channels whose file descriptors are arguments."""
    store, index, *numbers = map(int, sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the main process decides when training ends
    ends = [Connection(number) for number in numbers]
    server = _Server(store, index, unpack(ends[0].recv_bytes()))
    ends[0].send_bytes(b"ready")
    for end in ends[1:]:
        threading.Thread(target=server.serve, args=(end,), daemon=True).start()
    server.serve(ends[0])


if __name__ == "__main__":
    main()
