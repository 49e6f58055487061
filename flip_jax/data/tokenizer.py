"""Strings to token ids: WordPiece as in BERT's uncased tokenizer, and CLIP's byte pairs."""

import gzip
import html
import io
import json
import pathlib
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from flip_jax.runtime import UserError

MAX_WORD_BYTES = 100  # of UTF-8; longer words are unknown
MAX_VOCAB_CHARACTERS, MAX_ID = 2**26, 2**24  # of a file after unpacking; of tokens
CLIP_MERGES = 48_894  # used of the 262,144 in CLIP's file; with 2 x 256 bytes and two special tokens they make 49,408
CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
_CLIP_WORDS = rf"{'|'.join(CLIP_SPECIAL)}|'[sſt]|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
_CJK = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"


class Tokenizer:
    """Turns strings into rows of word-piece ids, as tensorflow-text's BertTokenizer(lower_case=True) does.

    Captions hold no special tokens: "[CLS]" is three words. An empty caption is all zeros. `vocab` is token -> id,
    with "[PAD]" as 0, and with "[UNK]". UserError if it has neither.
    """

    def __init__(self, vocab: Mapping[str, int]):
        if vocab.get("[PAD]") != 0 or "[UNK]" not in vocab:
            raise UserError(f"[PAD] must be the first of its {len(vocab)} WordPiece tokens, and [UNK] another one")
        model = models.WordPiece(dict(vocab), unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_BYTES)
        self.vocab_size, self._unknown = max(vocab.values()) + 1, vocab["[UNK]"]
        self._library = tokenizers.Tokenizer(model)
        # Finishes NFKC case folding (see `_words`), removes combining marks, and makes control characters spaces.
        ignorable, mark, control = r"\p{Default_Ignorable_Code_Point}", r"\p{Mn}", r"[\p{Cc}\p{Cf}]"
        replacements = [normalizers.Replace(Regex(a), b) for a, b in ((ignorable, ""), (mark, ""), (control, " "))]
        self._library.normalizer = normalizers.Sequence([replacements[0], normalizers.NFD(), *replacements[1:]])
        # Each punctuation mark and ideograph is a word.
        alone = Regex(rf"[!-/:-@\[-`{{-~\p{{P}}{_CJK}]")
        splits = [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(alone, "isolated")]
        self._library.pre_tokenizer = pre_tokenizers.Sequence(splits)

    @classmethod
    def from_vocab(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a vocabulary file in UTF-8, gzipped or not; its first line tells the kind.

        WordPiece has one token per line; CLIP's byte pairs have a header with "#version", then one merge per line.
        UserError if the file is missing or is neither.
        """
        from flip_jax import untrusted

        try:
            data: Any = io.BytesIO(untrusted.read_file(path))
            if data.getvalue()[:2] == b"\x1f\x8b":
                data = gzip.GzipFile(fileobj=data)
            content = io.TextIOWrapper(data, "utf-8").read(MAX_VOCAB_CHARACTERS + 1)
            if len(content) > MAX_VOCAB_CHARACTERS:
                raise UserError(f"more than {MAX_VOCAB_CHARACTERS} characters")
            lines = content.removesuffix("\n").split("\n")
            if "#version" in lines[0]:
                return ClipTokenizer([line.split() for line in lines[1 : 1 + CLIP_MERGES]])
            return cls({token: i for i, token in enumerate(lines)})
        except (UserError, OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise UserError(
                f"config.data.vocab {str(path)!r}: {error}. It names a WordPiece vocabulary with one token per line, "
                "or CLIP's bpe_simple_vocab_16e6.txt.gz; if empty, one is trained on the captions"
            ) from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a vocabulary of at most `vocab_size` tokens, always the same one from the same captions."""
        tokenizer = cls({"[PAD]": 0, "[UNK]": 1})
        words = [word for caption in captions for word in tokenizer._words(caption)]
        # Characters take at most half of the vocabulary: each may need two tokens, one for the start of a word.
        common = sorted(Counter("".join(words)).items(), key=lambda item: (-item[1], item[0]))
        first = {character for character, _ in common[: (vocab_size - 2) // 4]}
        later = {f"##{character}" for word in set(words) for character in word[1:] if character in first}
        # The trainer numbers characters in the order of a hash table, which differs between runs, and breaks ties by
        # number. Special tokens have fixed numbers.
        special = ["[PAD]", "[UNK]", *sorted(first), *sorted(later)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, limit_alphabet=0, show_progress=False
        )
        tokenizer._library.train_from_iterator(words, trainer)
        return cls(tokenizer._library.get_vocab())

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the `tokenizers` library's own JSON file."""
        return json.loads(self._library.to_str())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tokenizer":
        """Restores a tokenizer of either kind from its `to_json`. UserError if it is damaged."""
        match content:
            case {"model": {"type": "BPE", "merges": list(merges)}} if all(isinstance(pair, list) for pair in merges):
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
        for word in self._words(text)[:length]:
            # The library would count characters, the official tokenizer counts bytes.
            too_long = len(word.encode()) > MAX_WORD_BYTES
            ids += [self._unknown] if too_long else [token.id for token in self._library.model.tokenize(word)]
        return ids[:length]

    def _words(self, text):
        if not text.isascii():
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        normal = self._library.normalizer.normalize_str(text.lower())
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normal)]


class ClipTokenizer(Tokenizer):
    """Turns strings into rows of byte-pair ids, as open_clip's SimpleTokenizer does: start, text, end, zeros.

    A text that is too long loses its last tokens but keeps the end; an empty text is start and end. `merges` are pairs
    of tokens, most frequent first. UserError if a part of a merge is neither a byte nor made by an earlier merge.
    """

    def __init__(self, merges: Sequence[Sequence[str]]):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = range(0x100, 0x100 + 256 - len(printable))  # stand for unprintable bytes
        characters = [chr(code) for code in (*printable, *others)]
        vocab = {token: i for i, token in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
        for number, merge in enumerate(merges, 1):
            if len(merge) != 2 or not all(isinstance(part, str) and part in vocab for part in merge):
                raise UserError(f"merge {number}, {' '.join(map(str, merge))!r}, does not join two earlier tokens")
            vocab["".join(merge)] = len(vocab)
        self._special = {token: len(vocab) + i for i, token in enumerate(CLIP_SPECIAL)}
        self.vocab_size = len(vocab) + len(CLIP_SPECIAL)
        pairs = [(first, second) for first, second in merges]
        self._library = tokenizers.Tokenizer(models.BPE(vocab | self._special, pairs, end_of_word_suffix="</w>"))
        words = pre_tokenizers.Split(Regex(_CLIP_WORDS), "removed", invert=True)
        to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._library.pre_tokenizer = pre_tokenizers.Sequence([words, to_characters])

    def _ids(self, text, length):
        start, end = self._special.values()
        ids = [start]
        for word in self._words(text)[:length]:
            special = self._special.get(word)
            ids += [token.id for token in self._library.model.tokenize(word)] if special is None else [special]
        return [*ids[: length - 1], end]

    def _words(self, text):
        if not (text.isascii() and text.isprintable()) or "&" in text:
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(" ".join(text.split()).lower())]
