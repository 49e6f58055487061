"""Counts of a corpus: the file that holds them, which tokenizer they are of, and the runs that may use them."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from helpers import CONFIG, model_with

from flip_jax import config_check, masking, saved_config, train
from flip_jax.config import DataConfig, TextConfig
from flip_jax.data import token_counts
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

WORDS = Tokenizer({word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "red", "green", "square"])})
OTHERS = Tokenizer({word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "red", "square", "green"])})


@pytest.fixture
def counted(tmp_path):
    """A file in which "a" occurs 900 times, "red" 100 times, and "green" never; and a config that names it."""
    path = tmp_path / "counts.json"
    path.write_text(token_counts.to_text(WORDS, {2: 900, 3: 100, 5: 4}))
    model = model_with(text_mask="frequency", text_mask_ratio=0.5, text_mask_counts=str(path))
    return path, dataclasses.replace(CONFIG, model=model)


def test_tokens_are_counted_without_padding():
    assert token_counts.of(WORDS, ["A red square", "a blue one", ""]) == [2, 3, 5, 2, 1, 1]


def test_each_id_has_its_count_and_unseen_ones_count_as_seen_once(counted):
    path, config = counted
    assert json.loads(path.read_text())["counts"] == [0, 0, 900, 100, 0, 4]
    counts = token_counts.per_token(config.model.text)
    np.testing.assert_array_equal(counts, [1, 1, 900, 100, 1, 4] + [1] * 58)
    few = dataclasses.replace(config.model.text, vocab_size=3)
    np.testing.assert_array_equal(token_counts.per_token(few), counts[:3])


def test_a_run_resumes_with_the_same_counts_only(counted):
    path, config = counted
    before = token_counts.identified(config)
    assert before.model.text.mask_counts.startswith(f"{path}#") and before == token_counts.identified(before)
    np.testing.assert_array_equal(token_counts.per_token(before.model.text), token_counts.per_token(config.model.text))
    path.write_text(token_counts.to_text(WORDS, {2: 900, 3: 101, 5: 4}))
    after = token_counts.identified(config)
    flat = [config_check.flatten(one) for one in (before, after)]
    changes = list(saved_config.changes(None, *flat))  # no step is looked at for this setting
    key = "model.text.mask_counts"
    assert changes == [(key, flat[0][key], flat[1][key])] and flat[0][key] != flat[1][key]
    with pytest.raises(UserError, match=r"mask_counts '.*counts.json' has changed since the run began"):
        token_counts.per_token(before.model.text)


def test_counts_of_another_tokenizer_are_refused(counted, shards, tmp_path):
    _, config = counted
    token_counts.check(config.model.text, Tokenizer.from_json(WORDS.to_json()))
    message = (
        r"config.model.text.mask_counts '.*counts.json' counts tokens of another tokenizer, WordPiece of 6 entries "
        r"\(\w{16}\), the run has WordPiece of 6 entries \(\w{16}\); count with `flip inspect SOURCE --counts=FILE"
    )
    with pytest.raises(UserError, match=message):
        token_counts.check(config.model.text, OTHERS)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\nred\nsquare\ngreen\n")
    data = DataConfig(train=f"webdataset:{shards}/{{00000..00001}}.tar", vocab=str(tmp_path / "vocab.txt"))
    with pytest.raises(UserError, match=message):
        train.train(dataclasses.replace(config, data=data), tmp_path / "run")


def test_counts_without_a_mask_that_uses_them_are_refused(counted):
    path, config = counted
    text = dataclasses.replace(config.model.text, mask="random")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    with pytest.raises(UserError, match=f"mask_counts '{path}' is for config.model.text.mask 'frequency', got"):
        token_counts.identified(config)


GOOD = {"tokenizer": "0", "vocab_size": 3, "counts": [0, 1, 2]}


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "Expecting value"),
        ("[" * 10_000, "recursion"),
        ("[1, 2]", "holds no counts"),
        (json.dumps(GOOD | {"counts": [0, 1]}), "holds no counts"),
        (json.dumps(GOOD | {"counts": [0, 1, -2]}), "holds no counts"),
        (json.dumps(GOOD | {"counts": [0, 1, True]}), "holds no counts"),
        (json.dumps(GOOD | {"counts": [0, 1, 10**400]}), "holds no counts"),
        (json.dumps(GOOD | {"tokenizer": 0}), "holds no counts"),
    ],
)
def test_files_without_counts_are_refused(tmp_path, content, problem):
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"mask_counts '{path}'.*{problem}.*`flip inspect SOURCE --counts=FILE` writes"):
        token_counts.per_token(TextConfig(mask_counts=str(path)))


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("pipe", "not a regular file"), ("none", "No such file"), ("", "directory")):
        with pytest.raises(UserError, match=f"{name}.*{problem}"):
            token_counts.per_token(TextConfig(mask_counts=str(tmp_path / name)))


def test_counts_of_a_corpus_take_the_place_of_the_batchs(tmp_path):
    """Given the noise, exactly as NumPy chooses; however many parts the batch is encoded in."""
    key, rng, path = jax.random.key(5), np.random.default_rng(3), tmp_path / "counts.json"
    words = Tokenizer({word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(59))])})
    counts = rng.zipf(1.3, 61) % 10**6
    path.write_text(token_counts.to_text(words, dict(enumerate(counts.tolist()))))
    settings = {"text_mask": "frequency", "text_mask_ratio": 0.5, "text_mask_counts": str(path)}
    model = model_with(text_context_length=16, **settings)
    tokens = rng.integers(1, 61, (64, 16)).astype(np.int32)
    tokens[np.arange(16)[None] >= rng.integers(1, 17, 64)[:, None]] = 0
    exponential = np.asarray(jax.random.exponential(jax.random.fold_in(key, 1), (64, 16)))
    score = np.where(tokens == 0, np.inf, exponential * np.sqrt(np.maximum(counts, 1).astype(np.float32))[tokens])
    expected = np.sort(np.argsort(score, axis=1, kind="stable")[:, :8], axis=1)
    for microbatches in (1, 4):
        view = masking.see(model, key, np.zeros((64, 32, 32, 3), np.uint8), tokens, microbatches)
        np.testing.assert_array_equal(view.token_position_BxK, expected)
    # In the corpus one word is nine times as frequent as another, in the batch they are equally so.
    path.write_text(token_counts.to_text(words, {2: 900, 3: 100}))
    pairs = np.tile(np.array([[2, 3]], np.int32), (4000, 1))
    kept, _ = masking.see_text(dataclasses.replace(model.text, context_length=2), key, pairs)
    assert np.mean(np.asarray(kept) == 3) == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 4000))
