"""Batches: exact resumption, counts that add up, the same samples whatever the threads, every record once an epoch."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import FIXTURES, REPO, png, samples, write_tar

from flip_jax.config import Config, DataConfig, EvalConfig, FinetuneConfig, ImageConfig, ModelConfig, TextConfig
from flip_jax.data import eval_batches, pipeline, sources, transforms, vocabulary
from flip_jax.data import shards as shard_files
from flip_jax.data.records import END
from flip_jax.runtime import UserError

TOKENIZER = vocabulary.train([f"picture {i}" for i in range(200)], 100)
MODEL = ModelConfig(image=ImageConfig(image_size=16, patch_size=8), text=TextConfig(vocab_size=100, context_length=6))


def config(pattern, rows=8, **data):
    data = {
        "shuffle_window": 70,
        "interleave": 3,
        "workers": 0,
        "threads": 2,
        "train": f"webdataset:{pattern}",
        **data,
    }
    return Config(
        seed=7, global_batch_size=rows, model=MODEL, data=DataConfig(**data), eval=EvalConfig(batch_size=rows)
    )


def batches(settings, count=None, process=(0, 1)):
    dataset = pipeline.train_dataset(settings, TOKENIZER, process_index=process[0], process_count=process[1])
    iterator = iter(dataset)
    return iterator if count is None else list(itertools.islice(iterator, count))


def same(one, other):
    np.testing.assert_array_equal(one["image"], other["image"])
    np.testing.assert_array_equal(one["text"], other["text"])
    return one["keys"] == other["keys"] and one["counts"] == other["counts"]


@pytest.fixture
def shards(tmp_path):
    """Four tars of 3, 70, 20 and 40 samples; some lack a caption, do not decode, or come after a cut."""
    numbers = itertools.count()
    for i, count in enumerate((3, 70, 20, 40)):
        members = [list(samples(1, next(numbers))) for _ in range(count)]
        if i == 1:
            members[5] = members[5][:1]  # only the image
            members[6][0] = (members[6][0][0], b"no picture")
            members[7][0] = (members[7][0][0], png(0)[:90])
            members[8] = members[8][1:]  # no image
            members[9][1] = (members[9][1][0], b"  ")
        path = write_tar(tmp_path / f"{i}.tar", itertools.chain(*members))
    os.truncate(path, os.path.getsize(path) - 15_000)
    return f"{tmp_path}/*.tar"


def test_batches_hold_the_samples_that_their_keys_name(shards):
    settings = config(shards)
    for batch in batches(settings, 20):
        assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["text"].shape == (8, 6) and batch["text"].dtype == np.int32
        for key, image, text in zip(batch["keys"], batch["image"], batch["text"], strict=True):
            number = int(key.rpartition("/")[2])
            np.testing.assert_array_equal(text, TOKENIZER([f"picture {number}"], 6)[0])
            crops = []
            for epoch in range(4):
                rng = transforms.generator(7, epoch, key)
                rng.choice([""])
                crops.append(transforms.decode(png(number), 16, settings.data, rng))
            assert any(np.array_equal(image, crop) for crop in crops)


def test_resuming_at_every_batch_gives_the_same_rest(shards):
    settings = config(shards)
    iterator, states, truth = batches(settings), [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(iterator.get_state(), sort_keys=True)))
        truth.append(next(iterator))
    other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, threads=1))
    for i in range(36):
        resumed = batches(other)
        resumed.set_state(states[i])
        assert resumed.get_state() == states[i]
        assert same(next(resumed), truth[i])
        if i % 4:
            continue
        # And again from what the resumed iterator saves, as a run does that is stopped more than once.
        again = batches(settings)
        again.set_state(json.loads(json.dumps(resumed.get_state())))
        assert all(same(next(again), batch) for batch in truth[i + 1 : i + 4])
    for i in (30, 2, 17):
        iterator.set_state(states[i])
        assert same(next(iterator), truth[i]) and same(next(iterator), truth[i + 1])


def test_neither_order_nor_pixels_depend_on_threads(shards):
    one, four = (batches(config(shards, threads=threads), 30) for threads in (1, 4))
    assert all(same(a, b) for a, b in zip(one, four, strict=True))


def test_the_seed_changes_order_and_crops(shards):
    one, other = (batches(dataclasses.replace(config(shards), seed=seed), 3) for seed in (0, 1))
    assert [b["keys"] for b in one] != [b["keys"] for b in other]
    assert [b["keys"] for b in batches(dataclasses.replace(config(shards), seed=0), 3)] == [b["keys"] for b in one]


def test_bad_records_are_counted_by_kind_and_the_sum_is_right(shards):
    iterator = batches(config(shards, max_bad_fraction=0.5))
    used = 0
    for _ in range(60):
        batch = next(iterator)
        used += len(batch["keys"])
        counts = batch["counts"]
        assert counts["used"] == used and counts["read"] == used + sum(counts["bad"].values())
    passes = counts["bad"]["tar cut short"]
    assert passes >= 3
    kinds = {"no text": 2, "image does not decode": 2, "no image": 1, "tar cut short": 1}
    assert counts["bad"].keys() == kinds.keys()
    for kind, number in kinds.items():
        assert abs(counts["bad"][kind] - number * passes) <= 2 * number


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_read_every_record_once_an_epoch(tmp_path, processes):
    numbers = itertools.count()
    for i in range(7):
        write_tar(tmp_path / f"{i}.tar", itertools.chain(*(samples(1, next(numbers)) for _ in range(6))))
    settings, seen = config(f"{tmp_path}/*.tar", rows=6, shuffle_window=1, interleave=1), []
    for p in range(processes):
        mine = len(range(p, 7, processes)) * 6
        found = [key for batch in batches(settings, 2 * mine * processes // 6, (p, processes)) for key in batch["keys"]]
        assert len(set(found[:mine])) == mine
        seen += [found[:mine], found[mine : 2 * mine]]
    for epoch in (0, 1):
        assert sorted(itertools.chain(*seen[epoch::2])) == sorted(f"{i // 6}.tar/{i:05}" for i in range(42))


def test_the_window_shuffles(tmp_path):
    write_tar(tmp_path / "0.tar", samples(128))
    keys = [key for batch in batches(config(f"{tmp_path}/0.tar", shuffle_window=128), 32) for key in batch["keys"]]
    first, second = np.array([int(key[-5:]) for key in keys]).reshape(2, 128)
    assert sorted(first) == sorted(second) == list(range(128))
    for one, other in ((first, np.arange(128)), (second, np.arange(128)), (first, second)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.3


def test_one_of_several_captions_is_drawn(monkeypatch):
    monkeypatch.setitem(sources.KINDS, "toy", f"{__name__}:Toy")
    drawn = Counter()
    for batch in batches(config("", train="toy:x"), 60):
        drawn.update(map(tuple, batch["text"][:, :3].tolist()))
    assert len(drawn) == 3 and min(drawn.values()) > 100


class Toy:
    """A source whose records all have the same image and three captions."""

    window, interleave, at_once, class_names = 64, 2, 64, None

    def __init__(self, rest, data):
        pass

    def __len__(self):
        return 100

    def read(self, picks, offset=0):
        for index, epoch in picks:
            texts = ["picture 1", "picture 2", "picture 3"]
            yield {"key": str(index), "epoch": epoch, "image": png(0), "texts": texts, "label": None}, END


def test_too_many_bad_records_stop_the_run_with_their_counts(tmp_path):
    members = [member for i in range(50) for member in samples(1, i)][: 3 * 40] + [
        (f"{i:05}.txt", b"x") for i in range(40, 50)
    ]
    write_tar(tmp_path / "0.tar", members)
    pattern = f"{tmp_path}/0.tar"
    with pytest.raises(
        UserError,
        match=r"of 1\d\d\d records cannot be used: \d+ no image \(last 0.tar/0004\d\).*max_bad_fraction \(0.1\)",
    ):
        for _ in batches(config(pattern)):
            pass
    assert len(batches(config(pattern, max_bad_fraction=0.3), 200)) == 200
    write_tar(tmp_path / "0.tar", [("1.txt", b"x"), ("2.png", b"x")])
    with pytest.raises(UserError, match="100 of 100 records cannot be used: .* no image .* no text"):
        next(batches(config(pattern, max_bad_fraction=1.0)))


def test_shards_that_vanish_are_counted(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", samples(30, start=30 * i))
    iterator = batches(config(f"{tmp_path}/*.tar", shuffle_window=1, interleave=1))
    next(iterator)
    os.remove(tmp_path / "1.tar")
    last = [next(iterator) for _ in range(60)][-1]
    assert last["counts"]["bad"]["unreadable shard"] > 0
    for i in (0, 2):
        os.remove(tmp_path / f"{i}.tar")
    with pytest.raises(UserError, match="unreadable shard"):
        for _ in iterator:
            pass


def test_settings_that_do_not_fit_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="config.global_batch_size 8 does not divide by the 3 processes"):
        batches(config(shards), process=(0, 3))
    with pytest.raises(UserError, match="4 shards for 8 processes"):
        batches(config(shards), process=(0, 8))
    with pytest.raises(UserError, match="config.data.train 'webdataset:/nowhere/0.tar'"):
        batches(config("/nowhere/0.tar"))
    state = batches(config(shards)).get_state()
    with pytest.raises(UserError, match="saved with process_count 1, now it is 2.*config.init_from"):
        batches(config(shards), process=(0, 2)).set_state(state)
    write_tar(tmp_path / "new.tar", samples(1))
    with pytest.raises(UserError, match="saved with shards .4., now it is .5."):
        batches(config(shards)).set_state(state)


def two_sources(shards, tmp_path, weight="3", **data):
    write_tar(tmp_path / "other" / "more.tar", samples(30, start=500))
    return config(f"{shards};{weight}*webdataset:{tmp_path}/other/more.tar", **data)


def test_several_sources_are_mixed_by_their_weights(shards, tmp_path):
    (tmp_path / "other").mkdir()
    settings = two_sources(shards, tmp_path, max_bad_fraction=0.5)
    read, from_other = 0, 0
    for batch in batches(settings, 30):
        from_other += sum(key.startswith("more.tar/") for key in batch["keys"])
        read = batch["counts"]["read"]
        assert abs(from_other - 0.75 * read) <= 1
    assert read > 240  # bad ones among them


def test_a_mixture_resumes_exactly(shards, tmp_path):
    (tmp_path / "other").mkdir()
    settings = two_sources(shards, tmp_path)
    iterator, states, truth = batches(settings), [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(iterator.get_state())))
        truth.append(next(iterator))
    for i in (0, 7, 13, 28):
        resumed = batches(settings)
        resumed.set_state(states[i])
        assert all(same(next(resumed), batch) for batch in truth[i : i + 2])


def test_a_mixture_of_a_bad_weight_or_source_is_refused(shards, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="config.data.train: a weight must be above 0, got '0.0[*]webdataset"):
        batches(two_sources(shards, tmp_path, weight="0.0"))
    with pytest.raises(UserError, match="config.data.train .*got '1.2.3[*]webdataset"):
        batches(two_sources(shards, tmp_path, weight="1.2.3"))


@pytest.mark.parametrize("member", ["txt", "png"])
def test_the_run_stops_at_once_where_nothing_can_be_used(tmp_path, member):
    members = [(f"{i}.{name}", b"no picture") for i in range(20) for name in {"txt", member}]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match="(no image|100 image does not decode)"):
        next(batches(config(f"{tmp_path}/0.tar", max_bad_fraction=1.0, shuffle_window=10_000)))


def test_errors_of_the_threads_reach_the_caller(shards, monkeypatch):
    monkeypatch.setattr(transforms, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(batches(config(shards)))


# A parser, a target, a crop: what may go wrong in them is a bug, never a bad record or a shard to be read again.
@pytest.mark.parametrize(
    "owner, name",
    [
        (shard_files, "sample"),
        (shard_files, "_parse_header"),
        (shard_files.WebDataset, "_samples"),
        (transforms, "generator"),
        (transforms, "train_window"),
        (transforms, "_upright"),
        (transforms, "resize"),
    ],
)
@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError])
def test_our_own_errors_are_raised_and_never_counted(shards, monkeypatch, owner, name, error):
    def broken(*arguments, **keywords):
        raise error("a bug")

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(error, match="a bug"):
        next(batches(config(shards, max_bad_fraction=1.0)))


def test_labels_are_the_target_of_a_classifier(shards):
    settings = dataclasses.replace(config(shards, max_bad_fraction=1.0), finetune=FinetuneConfig(classes=6))
    batch = list(itertools.islice(pipeline.train_dataset(settings, None, process_index=0, process_count=1), 30))[-1]
    assert "text" not in batch and batch["label"].dtype == np.int32
    assert batch["label"].tolist() == [int(key[-5:]) % 7 for key in batch["keys"]]
    assert batch["counts"]["bad"]["label above 5"] > 0 and batch["counts"]["bad"]["no label"] > 0


@pytest.mark.parametrize(
    "end", ["", "raise SystemExit(3)", "iterator.close()", "iterator.set_state(iterator.get_state())"]
)
def test_the_interpreter_exits_at_once_and_silently(shards, end):
    folders = f"import sys; sys.path[:0] = {[str(REPO / 'tests'), str(REPO / 'tests' / 'data')]}\n"
    program = folders + f"from test_pipeline import *\niterator = batches(config({shards!r}))\nnext(iterator)\n{end}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.returncode == (3 if "Exit" in end else 0)
    assert all("tar cut short" in line for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_gives_every_image_once_and_all_processes_as_many_batches(shards, monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    settings, seen, lengths = config(shards, rows=12), [], []
    for p in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=p: p)
        mine = list(eval_batches.eval_dataset(settings.data.train, settings, with_text=True))
        lengths.append(len(mine))
        for batch in mine:
            rows = 12 // processes
            assert batch["image"].shape == (rows, 16, 16, 3) and batch["label"].dtype == np.int32
            assert batch["mask"].shape == (rows,) and batch["mask"].dtype == bool
            seen += zip(batch["keys"], batch["mask"], batch["label"], batch["image"], batch["texts"], strict=True)
    assert len(set(lengths)) == 1
    real = {key: (label, image, texts) for key, mask, label, image, texts in seen if mask}
    unusable = sorted(key for key, mask, *_ in seen if key and not mask)
    assert len(real) == sum(mask for _, mask, *_ in seen)
    assert unusable == ["1.tar/00009", "1.tar/00010", "1.tar/00011", "3.tar"]
    assert {key for key in real if not key.startswith("3")} == {
        f"{shard}.tar/{i:05}" for shard, first, last in ((0, 0, 3), (1, 3, 73), (2, 73, 93)) for i in range(first, last)
    } - set(unusable)
    for key, (label, image, texts) in real.items():
        number = int(key[-5:])
        assert label == (-1 if number == 8 else number % 7)
        np.testing.assert_array_equal(image, transforms.decode(png(number), 16, settings.data))
        assert texts == ([] if number in (8, 12) else [f"picture {number}"])
    assert "texts" not in next(eval_batches.eval_dataset(settings.data.train, settings))


def test_evaluation_batches_must_divide_by_the_processes(shards, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 5)
    with pytest.raises(UserError, match="config.eval.batch_size 8 does not divide by the 5 processes"):
        eval_batches.eval_dataset(f"webdataset:{shards}", config(shards))


def test_the_caption_sample_is_bounded_and_always_the_same(shards):
    settings = config(shards)
    whole = vocabulary.caption_sample(settings)
    truth = {f"picture {i}" for i in range(133)}
    assert len(whole) == len(set(whole)) > 110 and set(whole) < truth
    assert vocabulary.caption_sample(settings, 10) == whole[:10]


@pytest.mark.parametrize(
    "kind, extension, bad",
    [
        ("webdataset", "tar", {"no text": 1}),
        ("tfrecord", "tfrecord", {"no text": 1}),
        ("parquet", "parquet", {"no text": 1, "no image": 4}),
    ],
)
def test_shards_that_img2dataset_wrote_are_used_completely(downloaded, kind, extension, bad):
    """With a window as large as an epoch and batches of all its usable records, each batch holds every one of them."""
    usable = {key: link.color for key, link in downloaded.items() if link.texts}
    rows = len(usable)
    assert rows == 19
    source = f"{kind}:{FIXTURES}/img2dataset/{kind}/{{00000..00001}}.{extension}"
    window = rows + sum(bad.values())
    iterator = batches(config("", rows=rows, train=source, shuffle_window=window, interleave=2))
    for epoch in (1, 2, 3):
        batch = next(iterator)
        keys = [key.rpartition("/")[2] for key in batch["keys"]]
        assert sorted(keys) == sorted(usable)
        for key, image in zip(keys, batch["image"], strict=True):
            # Y and Cb are rounded to integers, and JPEG of quality 95 quantizes their means to steps of 1/4: they
            # differ by at most 0.63, and blue, Y + 1.772 Cb, by 0.63 + 1.772 x 0.63 + 0.5 = 2.3 after rounding. Some
            # images were encoded so twice.
            np.testing.assert_allclose(image, np.broadcast_to(usable[key], image.shape), rtol=0, atol=5)
        counts = batch["counts"]
        assert counts["used"] == epoch * rows and counts["read"] == counts["used"] + sum(counts["bad"].values())
        # Bad records at the end of the epoch's order are counted with the next batch.
        for name, number in bad.items():
            assert (epoch - 1) * number <= counts["bad"].get(name, 0) <= epoch * number
        assert counts["bad"].keys() <= bad.keys()
