"""Worker processes: the same batches as with threads, whatever dies, and nothing left behind."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPO, environment, png, samples, write_samples, write_tar

from flip_jax.config import Config, DataConfig, FinetuneConfig, ImageConfig, ModelConfig, TextConfig
from flip_jax.data import pipeline, records, stream, vocabulary, workers
from flip_jax.runtime import UserError

TOKENIZER = vocabulary.train([f"picture {i}" for i in range(200)], 100)
MODEL = ModelConfig(image=ImageConfig(image_size=16, patch_size=8), text=TextConfig(vocab_size=100, context_length=6))


def batches(train, workers, classes=0, **data):
    data = {"shuffle_window": 30, "interleave": 3, "threads": 2, "max_bad_fraction": 0.5, **data}
    config = Config(
        seed=7,
        global_batch_size=8,
        model=MODEL,
        finetune=FinetuneConfig(classes=classes),
        data=DataConfig(train=train, workers=workers, **data),
    )
    tokenizer = None if classes else TOKENIZER
    return iter(pipeline.train_dataset(config, tokenizer, process_index=0, process_count=1))


def same(one, other):
    """Compares all that is in two batches."""
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], np.ndarray):
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype
        else:
            assert one[name] == other[name], name
    return True


def alive(iterator):
    """The worker processes of now."""
    return [worker._process for worker in iterator._parent.maker._workers if worker._process]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def shards(tmp_path):
    """Three tars, of which one has records that cannot be used."""
    members = list(samples(40))
    members[15:18] = [("00005.png", b"no picture"), ("00005.txt", b"picture 5"), ("00006.txt", b"picture 6")]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", samples(70, 40))
    write_tar(tmp_path / "2.tar", samples(3, 110))
    return f"webdataset:{tmp_path}/{{0..2}}.tar"


@pytest.mark.parametrize("chunk", [2**24, 1500])
def test_windows_that_end_early_lose_nothing_and_resume(shards, monkeypatch, chunk):
    """Records of some 500 bytes end a chunk after three of them, and a window of 30 after about ten."""
    monkeypatch.setattr(stream, "MIN_HELD", 0)
    monkeypatch.setattr(stream, "MEAN_HELD", 5000 // 30)
    monkeypatch.setattr(records, "MAX_CHUNK", chunk)
    truth, states, iterator = [], [], batches(shards, 0)
    for _ in range(28):
        truth.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert states[9]["streams"][0]["place"]["window"] >= 4 * (chunk < 2**24)
    keys = {key for batch in truth for key in batch["keys"]}
    while len(keys) < 111 and states[-1]["counts"]["read"] < 1000:  # the small shard comes again and again
        keys.update(next(iterator)["keys"])
        states.append(iterator.get_state())
    assert len(keys) == 111
    for place in (0, 5, 13, 22):
        resumed = batches(shards, 0)
        resumed.set_state(states[place])
        assert all(same(batch, next(resumed)) for batch in truth[place + 1 :])
        resumed.close()
    if chunk == 2**24:  # a worker does not see what was patched here
        two = batches(shards, 2)
        assert all(same(batch, next(two)) for batch in truth)
        two.close()
    iterator.close()


def test_killed_workers_change_nothing_and_any_number_resumes(shards, caplog):
    truth, states, iterator = [], [], batches(shards, 0)
    for _ in range(16):
        truth.append(next(iterator))
        states.append(json.loads(json.dumps(iterator.get_state())))
    assert truth[-1]["counts"]["bad"]["image does not decode"]
    two = batches(shards, 2)
    found = []  # kept, so that no memory may be used again
    for i, state in enumerate(states):
        if i % 4 == 1:
            os.kill(alive(two)[i // 4 % 2].pid, signal.SIGKILL)
        found.append(next(two))
        assert two.get_state() == state
    assert all(map(same, found, truth))
    assert 3 <= sum("died (SIGKILL) and is replaced" in line for line in caplog.messages) <= 4
    assert sum("captions come from text file" in line for line in caplog.messages) <= 2  # of either iterator
    iterator.set_state(states[3])  # threads from a place of workers ...
    assert same(next(iterator), truth[4])
    two.set_state(states[9])  # ... and workers again, with their window's memory given back
    assert same(next(two), truth[10])
    ended = alive(two)
    two.close()
    assert len(ended) == 2 and not any(is_running(process.pid) for process in ended)


def test_memory_is_used_again(shards):
    iterator = batches(shards, 1)
    store, sizes = iterator._parent.maker._store, []
    for _ in range(60):
        next(iterator)
        sizes.append(os.fstat(store).st_blocks * 512)
    assert len(iterator._parent.maker._maps) <= pipeline.PREFETCH + 3
    assert max(sizes[40:]) <= 1.2 * max(sizes[10:30])  # 240 records later
    iterator.close()


@pytest.mark.parametrize("classes", [0, 7])
def test_every_kind_of_source_is_read_as_threads_read_it(shards, tmp_path, classes):
    """A CSV and a folder, whose rows workers do not hold, next to shards; captions need not be text."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(60):
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(png(i))
    rows = [f"images/a/{i}.png\t{'' if i == 7 else f'picture {i}'}\t{i % 7}" for i in range(60)]
    content = "\n".join(["filepath\ttitle\tlabel", *rows]).encode().replace(b"picture 9", b"picture \xff")
    (tmp_path / "rows.tsv").write_bytes(content)
    other = f"folder:{tmp_path}/images" if classes else f"csv:{tmp_path}/rows.tsv"
    one, two = (batches(f"{shards};2*{other}", workers, classes) for workers in (0, 1))
    pairs = list(itertools.islice(zip(one, two, strict=True), 10))
    assert all(same(*pair) for pair in pairs)
    if not classes:
        assert {"caption is not UTF-8", "no text"} <= pairs[-1][0]["counts"]["bad"].keys()
    two.close()


def test_what_workers_refuse_or_break_reaches_the_caller(tmp_path, monkeypatch):
    write_tar(tmp_path / "bad.tar", [(f"{i}.png", b"no picture") for i in range(200)])
    errors = []
    for count in (0, 1):
        with pytest.raises(UserError) as error:
            next(batches(f"webdataset:{tmp_path}/bad.tar", count))
        errors.append(str(error.value))
    assert errors[0] == errors[1] and "100 no text" in errors[0]
    iterator = batches(f"webdataset:{tmp_path}/bad.tar", 1)
    with pytest.raises(RuntimeError, match="in a worker:\n(?s:.*)KeyError"):
        iterator._parent.maker.prepare([{"key": "a record of another form"}]).result()
    iterator.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="config.data.workers: worker 0 did not start: exit status 1"):
        next(batches(f"webdataset:{tmp_path}/bad.tar", 1))


def test_a_record_that_takes_too_long_is_counted_and_the_rest_goes_on(tmp_path, monkeypatch):
    """An image whose decoder, in Python, takes more than a second of processor time."""
    content = b"P3 1200 1200 255\n" + b"7 " * (3 * 1200 * 1200)
    write_tar(tmp_path / "0.tar", [*samples(20), ("slow.ppm", content), ("slow.txt", b"picture"), *samples(20, 20)])
    monkeypatch.setattr(workers, "TOO_SLOW", 0.3)
    iterator = batches(f"webdataset:{tmp_path}/0.tar", 1)
    found = list(itertools.islice(iterator, 5))
    assert found[-1]["counts"]["bad"] == {"too slow": 1}
    assert len({key for batch in found for key in batch["keys"]}) == 40
    iterator.close()


def test_a_record_that_ends_its_decoder_twice_is_counted(tmp_path, monkeypatch, caplog):
    """By a decoder that crashes, which workers get from a module that Python imports at its start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes\n"
        "from flip_jax.data import transforms\n"
        "decode = transforms.decode\n"
        "def crash(data, *rest):\n"
        "    return ctypes.string_at(0) if data == b'crash' else decode(data, *rest)\n"  # in this very thread
        "transforms.decode = crash\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write_tar(tmp_path / "0.tar", [*samples(20), ("x.png", b"crash"), ("x.txt", b"picture"), *samples(20, 20)])
    iterator = batches(f"webdataset:{tmp_path}/0.tar", 1)
    found = list(itertools.islice(iterator, 5))
    assert found[-1]["counts"]["bad"] == {"ends the decoder": 1}
    assert len({key for batch in found for key in batch["keys"]}) == 40
    assert "died (SIGSEGV) and is replaced" in caplog.text
    iterator.close()


def test_a_worker_that_dies_again_and_again_ends_the_run(shards, monkeypatch):
    monkeypatch.setattr(workers, "DEATHS", 1)
    iterator = batches(shards, 1)
    next(iterator)
    os.kill(alive(iterator)[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="worker 0 died 1 times at one request, the last time of SIGKILL"):
        list(itertools.islice(iterator, 30))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_trains(shards, number):
    code = (
        "import signal, sys; sys.path.insert(0, 'tests')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells have what they start with & ignore it
        "from data.test_workers import alive, batches\n"
        f"iterator = batches({shards!r}, 2)\n"
        "next(iterator)\n"
        "print(*(process.pid for process in alive(iterator)), flush=True)\n"
        "for batch in iterator: pass\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        process.send_signal(number)
        process.wait(20)
    waited = time.time()
    while any(map(is_running, pids)) and time.time() < waited + 10:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_worker_imports_neither_jax_nor_grain():
    code = "import sys, flip_jax.data.worker_process; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "flip_jax.data.transforms" in loaded and not {"jax", "jaxlib", "grain", "flax"} & set(loaded)


def test_auto_uses_all_cores_but_one_of_more_than_four(monkeypatch):
    for cores, count in ((2, 0), (4, 0), (5, 4), (96, 95)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert pipeline.worker_count(Config()) == count
    assert pipeline.worker_count(dataclasses.replace(Config(), data=DataConfig(workers=3))) == 3
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pipeline.worker_count(Config()) == 0


def test_workers_are_refused_where_they_cannot_be(shards, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="config.data.workers 3: worker processes need Linux; use 0"):
        batches(shards, 3)


def test_captions_drawn_from_several_keys_are_those_of_threads(tmp_path):
    texts = [json.dumps({"caption": f"picture {i}", "synthetic": f"picture {100 + i}"}).encode() for i in range(40)]
    write_samples(tmp_path / "0.tar", [{"png": png(i), "json": text} for i, text in enumerate(texts)])
    captions = ("0.5*caption", "0.5*synthetic")
    one, two, first = (
        batches(f"webdataset:{tmp_path}/0.tar", workers, captions=captions[:keys])
        for workers, keys in ((0, 2), (1, 2), (0, 1))
    )
    pairs = list(itertools.islice(zip(one, two, first, strict=True), 10))
    assert all(same(mixed, by_worker) for mixed, by_worker, _ in pairs)
    same_text = [np.all(mixed["text"] == alone["text"], axis=1) for mixed, _, alone in pairs]
    assert 0.2 < np.mean(same_text) < 0.8
    two.close()
