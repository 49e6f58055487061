"""Word pieces and byte pairs against those recorded from the official tokenizers, and what a trained one promises."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import FIXTURES, REPO

from flip_jax.data import vocabulary
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

WORDS = "red green blue square circle frame of the a photo drawing small large".split()
CAPTIONS = [f"A {a} {b}, {c}." for a in WORDS for b in WORDS for c in WORDS]


def test_recorded_captions_have_the_same_ids(recorded):
    fixture = json.loads((recorded / "tokenization.json").read_text())
    tokenizer = vocabulary.read(recorded / "vocab_bert_base.txt")
    assert tokenizer.vocab_size == 30_522
    captions = [entry["caption"] for entry in fixture["captions"]]
    assert len(captions) == 206
    truth = np.array([entry["ids"] for entry in fixture["captions"]], np.int32)
    ours = tokenizer(captions, fixture["max_len"])
    differences = [c for c, a, b in zip(captions, ours, truth, strict=True) if not np.array_equal(a, b)]
    assert not differences
    np.testing.assert_array_equal(ours != 0, [np.array(entry["is_valid"], bool) for entry in fixture["captions"]])
    again = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    np.testing.assert_array_equal(again(captions, 8), truth[:, :8])


@pytest.mark.parametrize("packed", [False, True])
def test_byte_pairs_are_open_clips(tmp_path, packed):
    """Recorded by fixtures/record_clip_bpe.py with the head of CLIP's vocabulary."""
    recording, path = json.loads((FIXTURES / "clip_bpe.json").read_text()), FIXTURES / "clip_bpe.txt"
    if packed:
        path = tmp_path / "any name"
        path.write_bytes(gzip.compress((FIXTURES / "clip_bpe.txt").read_bytes()))
    tokenizer = vocabulary.read(path)
    assert tokenizer.vocab_size == recording["vocab_size"] == 512 + 400 + 2
    texts = [row["text"] * row["times"] for row in recording["captions"]]
    assert len(texts) > 60 and max(map(len, texts)) >= 10_000 and "" in texts
    truth, length = np.array([row["ids"] for row in recording["captions"]], np.int32), recording["length"]
    again = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    for each in (tokenizer, again):
        ours = each(texts, length)
        assert ours.dtype == np.int32 and each.vocab_size == tokenizer.vocab_size
        assert not [text for text, a, b in zip(texts, ours, truth, strict=True) if not np.array_equal(a, b)]


def test_byte_pairs_that_are_cut_keep_the_end():
    tokenizer = vocabulary.read(FIXTURES / "clip_bpe.txt")
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    whole = tokenizer(["the &amp; the"], 8)[0].tolist()
    assert whole[0] == start and whole[4:] == [end, 0, 0, 0] and whole[1] == whole[3]
    for length in range(1, 5):
        expected = [*whole[: length - 1], end]
        assert tokenizer(["the &amp; the", ""], length).tolist()[0] == expected
    assert tokenizer([""], 3).tolist() == [[start, end, 0]]
    assert tokenizer([], 3).shape == (0, 3)


def test_the_whole_vocabulary_of_clip_has_49408_entries(tmp_path):
    first = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    merges = [f"{a} {b}" for a in first for b in first] + [
        f"{a}{b} {c}" for a in first for b in first for c in first[:9]
    ]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    assert len(merges) > 262_144 and vocabulary.read(tmp_path / "merges.txt").vocab_size == 49_408


def test_long_and_empty_captions_and_entities(recorded):
    tokenizer = vocabulary.read(recorded / "vocab_bert_base.txt")
    cat, amp, semicolon, and_ = tokenizer(["cat amp ; &"], 4)[0].tolist()
    assert tokenizer(["&amp; cat"], 5)[0].tolist() == [and_, amp, semicolon, cat, 0]  # the official one does not decode
    long = ["cat " * 2500, "c" * 10_000, "&amp;" * 2000, "\u732b" * 10_000, " " * 10_000, "cat" + "\u200b" * 10_000]
    ids = tokenizer(long, 32)
    assert (ids[0] == cat).all() and ids[1].tolist() == [100] + [0] * 31
    assert ids[2].tolist() == ([and_, amp, semicolon] * 11)[:32] and len(set(ids[3])) == 1
    assert not ids[4].any() and ids[5].tolist() == [cat] + [0] * 31


def test_a_tokenizer_saved_before_there_were_kinds_loads():
    saved = Tokenizer({"[PAD]": 0, "[UNK]": 1, "cat": 2}).to_json()
    minimal = {"version": "1.0", "model": {"type": "WordPiece", "vocab": saved["model"]["vocab"]}}
    for content in (saved, minimal):
        assert Tokenizer.from_json(content)(["a cat"], 3).tolist() == [[1, 2, 0]]


def test_words_are_measured_in_bytes(recorded):
    tokenizer = vocabulary.read(recorded / "vocab_bert_base.txt")
    unknown = [100, 0]
    for text, known in (("a" * 100, True), ("a" * 101, False), ("ж" * 50, True), ("ж" * 51, False), ("é" * 100, True)):
        ids = tokenizer([text], 2)[0].tolist()
        assert (ids != unknown) == known, text
    assert tokenizer(["한" * 12], 40)[0, :2].tolist() == unknown  # 12 syllables are 108 bytes of letters
    assert tokenizer(["ж" * 60 + "," + "ж" * 30 + " cat"], 4)[0, :2].tolist() == [100, 1010]


def test_rows_are_cut_and_padded():
    tokenizer = Tokenizer({"[PAD]": 0, "[UNK]": 1, "cat": 2, "##s": 3, "[": 4, "]": 5, "cl": 6})
    ids = tokenizer(["cats CATS  cät", "", " \t\n", "dog [CLS] cats", "cat\u200bs"], 5)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[2, 3, 2, 3, 2], [0] * 5, [0] * 5, [1, 4, 6, 3, 5], [2, 3, 0, 0, 0]]
    assert tokenizer([], 5).shape == (0, 5)


def test_a_trained_vocabulary_covers_its_captions():
    tokenizer = vocabulary.train(CAPTIONS, 100)
    vocab = tokenizer.to_json()["model"]["vocab"]
    assert tokenizer.vocab_size == len(vocab) <= 100 and (vocab["[PAD]"], vocab["[UNK]"]) == (0, 1)
    assert set(vocab.values()) == set(range(len(vocab)))
    ids = tokenizer(CAPTIONS, 16)
    assert not (ids == 1).any()
    assert vocab["square"] in tokenizer(["a Square"], 4)  # frequent words are one piece
    pieces = {i: token for token, i in vocab.items()}
    text = "".join(f" {pieces[i]}" for i in tokenizer(["The red circle."], 16)[0] if i).replace(" ##", "")
    assert text == " the red circle ."
    assert tokenizer(["[PAD]"], 8)[0, 0] == 1  # nothing special: a bracket, which no caption had


def test_rare_characters_give_way_in_a_small_vocabulary():
    captions = CAPTIONS + [chr(c) + "x" for c in range(0x4E00, 0x5200)]
    tokenizer = vocabulary.train(captions, 120)
    assert tokenizer.vocab_size <= 120
    assert not (tokenizer(CAPTIONS, 16) == 1).any() and tokenizer(["\u5100"], 2).tolist() == [[1, 0]]


def test_the_same_captions_give_the_same_vocabulary_in_every_process():
    captions = CAPTIONS + ["élan", "αβγ δε", "жук жаба"]
    program = (
        "import json, sys; from flip_jax.data import vocabulary\n"
        "print(json.dumps(vocabulary.train(json.load(sys.stdin), 90).to_json()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(captions),
        capture_output=True,
        text=True,
        cwd=REPO,
        check=True,
    )
    assert json.loads(other.stdout) == vocabulary.train(captions, 90).to_json()


def test_a_file_that_is_not_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "pair.txt").write_text("#version: 0.2\na b\nab cd\n")
    (tmp_path / "three.txt").write_text("#version: 0.2\na b c\n")
    packed = gzip.compress(b"#version: 0.2\na b\n" * 100)
    (tmp_path / "cut.gz").write_bytes(packed[:-12])
    (tmp_path / "damaged.gz").write_bytes(packed[:15] + b"\xff\xff\xff" + packed[18:])
    (tmp_path / "good.txt").write_text("[PAD]\n[UNK]\ncat\n")
    assert vocabulary.read(tmp_path / "good.txt")(["cat"], 1).tolist() == [[2]]
    for name, message in (
        ("gone.txt", "No such file"),
        ("words.txt", r"\[PAD\] must be the first of its 2 WordPiece tokens"),
        ("binary.txt", "can't decode"),
        ("pair.txt", "merge 2, 'ab cd', does not join two earlier tokens"),
        ("three.txt", "merge 1, 'a b c', does not join two"),
        ("cut.gz", "ended before"),
        ("damaged.gz", ""),
        ("", "Is a directory"),
    ):
        with pytest.raises(UserError, match=rf"config.data.vocab .*{name}.*{message}.*one is trained on the captions"):
            vocabulary.read(tmp_path / name)
