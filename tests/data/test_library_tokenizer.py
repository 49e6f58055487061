"""Any tokenizer.json as data.vocab: what it adds to a text, how a row is completed, and what a text tower refuses."""

import json

import numpy as np
import pytest
import tokenizers
from helpers import FIXTURES
from tokenizers import models, pre_tokenizers, processors

from flip_jax.config import TextConfig
from flip_jax.data import vocabulary
from flip_jax.data.library_tokenizer import LibraryTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

UNIGRAM = FIXTURES / "transformers" / "siglip" / "tokenizer.json"
BYTES = FIXTURES / "transformers" / "siglip2" / "tokenizer.json"
TEXTS = ["the sting", "", "A photo of THE cat", "over and over " * 8]


def word_piece(path, pad=0, post=True, **named):
    """Write BERT's kind: [CLS] a fox [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens = [*special[1 : pad + 1], "[PAD]", *special[pad + 1 :], "a", "fox", "##es"]
    vocab = {token: i for i, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if post:
        ends = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
        library.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    library.add_special_tokens(special)
    library.save(str(path))
    if named:
        (path.parent / "tokenizer_config.json").write_text(json.dumps(named))
    return path


@pytest.mark.parametrize("kind", ["Unigram", "BPE", "WordPiece"])
@pytest.mark.parametrize("length", [3, 8, 40])
def test_rows_are_those_of_the_library_truncated_and_padded(kind, length, tmp_path):
    path = {"Unigram": UNIGRAM, "BPE": BYTES}.get(kind) or word_piece(tmp_path / "tokenizer.json")
    pool = "first" if kind == "WordPiece" else "final"
    tokenizer = vocabulary.read(path, TextConfig(pool=pool))
    library = tokenizers.Tokenizer.from_file(str(path))
    fill = {"Unigram": 1, "BPE": 0, "WordPiece": 0}[kind]
    assert (tokenizer.kind, tokenizer.fill) == (kind, fill)
    assert tokenizer.vocab_size == library.get_vocab_size()
    library.enable_truncation(length)
    library.enable_padding(length=length, pad_id=fill)
    truth = [encoding.ids for encoding in library.encode_batch(TEXTS)]
    for made in (tokenizer, Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))):
        rows = made(TEXTS, length)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, truth)


def test_the_end_of_a_text_is_known():
    assert vocabulary.read(UNIGRAM, TextConfig(pool="last", causal=True)).end() == 1
    assert LibraryTokenizer(json.loads(BYTES.read_text())).end() == 1


def test_tokenizer_config_may_name_the_ends(tmp_path):
    plain = word_piece(tmp_path / "tokenizer.json", post=False)
    with pytest.raises(UserError, match="'last' reads the token that ends a text, but its post_processor adds none"):
        vocabulary.read(plain, TextConfig(pool="last"))
    ends = {"bos_token": "[CLS]", "eos_token": {"content": "[SEP]"}, "add_bos_token": False, "add_eos_token": True}
    word_piece(plain, post=False, **ends)
    tokenizer = vocabulary.read(plain, TextConfig(pool="last"))
    assert tokenizer.end() == 3 and tokenizer(["a foxes"], 6).tolist() == [[4, 5, 6, 3, 0, 0]]
    (tmp_path / "tokenizer_config.json").write_text("[")  # not read, and not needed
    assert vocabulary.read(plain, TextConfig(pool="first")).end() is None


@pytest.mark.parametrize(
    "pad, text, message",
    [
        (1, {"pool": "mean"}, "its padding must have the id 0 for .* but has 1"),
        (1, {"mask_padding": True}, "its padding must have the id 0"),
        (1, {"mask_ratio": 0.5}, "its padding must have the id 0"),
        (0, {"pool": "mean"}, None),
        (1, {"pool": "first"}, None),
        (2, {"pool": "final"}, None),
    ],
)
def test_padding_that_does_not_fit_the_text_tower_is_refused(pad, text, message, tmp_path):
    path = word_piece(tmp_path / "tokenizer.json", pad)
    if message:
        with pytest.raises(UserError, match=message):
            vocabulary.read(path, TextConfig(**text))
    else:
        assert vocabulary.read(path, TextConfig(**text)).fill == (pad if text["pool"] == "final" else 0)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in ("{", "{}", '{"model": {"type": "BPE"}}', '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(UserError, match="config.data.vocab .*tokenizer.json"):
            vocabulary.read(path)
    without = json.loads(BYTES.read_text())
    for token in without["added_tokens"]:
        token["content"] = token["content"].replace("<pad>", "<x>")
    without["model"]["vocab"]["<x>"] = without["model"]["vocab"].pop("<pad>")
    path.write_text(json.dumps(without))
    with pytest.raises(UserError, match="its padding must have any id for .*'final'.* it has none"):
        vocabulary.read(path, TextConfig(pool="final"))
