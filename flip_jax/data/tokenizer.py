"""Strings to token ids: WordPiece as in BERT's uncased tokenizer."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from flip_jax.runtime import UserError

MAX_WORD_BYTES = 100  # of UTF-8; longer words are unknown
MAX_ID = 2**24
_CJK = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"


class Tokenizer:
    """Turns strings into rows of word-piece ids, as tensorflow-text's BertTokenizer(lower_case=True) does.

    Captions hold no special tokens: "[CLS]" is three words. An empty caption is all zeros. `vocab` is token -> id,
    with "[PAD]" as 0, and with "[UNK]". UserError if it has neither.
    """

    kind = "WordPiece"

    def __init__(self, vocab: Mapping[str, int]):
        if vocab.get("[PAD]") != 0 or "[UNK]" not in vocab:
            raise UserError(f"[PAD] must be the first of its {len(vocab)} WordPiece tokens, and [UNK] another one")
        model = models.WordPiece(dict(vocab), unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_BYTES)
        self.vocab_size, self._unknown = max(vocab.values()) + 1, vocab["[UNK]"]
        self.library = tokenizers.Tokenizer(model)
        # Finishes NFKC case folding (see `words`), removes combining marks, and makes control characters spaces.
        ignorable, mark, control = r"\p{Default_Ignorable_Code_Point}", r"\p{Mn}", r"[\p{Cc}\p{Cf}]"
        replacements = [normalizers.Replace(Regex(a), b) for a, b in ((ignorable, ""), (mark, ""), (control, " "))]
        self.library.normalizer = normalizers.Sequence([replacements[0], normalizers.NFD(), *replacements[1:]])
        # Each punctuation mark and ideograph is a word.
        alone = Regex(rf"[!-/:-@\[-`{{-~\p{{P}}{_CJK}]")
        splits = [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(alone, "isolated")]
        self.library.pre_tokenizer = pre_tokenizers.Sequence(splits)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the `tokenizers` library's own JSON file."""
        return json.loads(self.library.to_str())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tokenizer":
        """Restores a tokenizer of either kind from its `to_json`. UserError if it is damaged."""
        match content:
            case {"library": dict(library), "fill": int(fill)}:
                from flip_jax.data.library_tokenizer import LibraryTokenizer

                return LibraryTokenizer(library, fill)
            case {"model": {"type": "BPE", "merges": list(merges)}} if all(isinstance(pair, list) for pair in merges):
                from flip_jax.data.clip_tokenizer import ClipTokenizer  # FLIP itself uses WordPiece

                return ClipTokenizer(merges)
            case {"model": {"vocab": dict(vocab)}} if all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values()):
                return cls(vocab)
        raise UserError(
            f"the tokenizer of the checkpoint is damaged: it needs merges, or a vocabulary with ids in [0, {MAX_ID}); "
            "use another step"
        )

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns token ids, int32 [len(texts), length], truncated or padded with 0."""
        tokens = np.zeros((len(texts), length), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._ids(text, length)
            row[: len(ids)] = ids
        return tokens

    def _ids(self, text, length):
        ids = []
        for word in self.words(text)[:length]:
            # The library would count characters, the official tokenizer counts bytes.
            too_long = len(word.encode()) > MAX_WORD_BYTES
            ids += [self._unknown] if too_long else [token.id for token in self.library.model.tokenize(word)]
        return ids[:length]

    def words(self, text: str) -> list[str]:
        """Splits a text into the words whose pieces are looked up."""
        if not text.isascii():
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        normal = self.library.normalizer.normalize_str(text.lower())
        return [word for word, _ in self.library.pre_tokenizer.pre_tokenize_str(normal)]
