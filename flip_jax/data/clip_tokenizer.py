"""Strings to token ids by CLIP's byte pairs."""

import html
from collections.abc import Sequence

import ftfy
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

MERGES = 48_894  # used of the 262,144 in CLIP's file; with 2 x 256 bytes and two special tokens they make 49,408
SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = rf"{'|'.join(SPECIAL)}|'[sſt]|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


class ClipTokenizer(Tokenizer):
    """Turns strings into rows of byte-pair ids, as open_clip's SimpleTokenizer does: start, text, end, zeros.

    A text that is too long loses its last tokens but keeps the end; an empty text is start and end. `merges` are pairs
    of tokens, most frequent first. UserError if a part of a merge is neither a byte nor made by an earlier merge.
    """

    kind = "CLIP's byte pairs"

    def __init__(self, merges: Sequence[Sequence[str]]):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = range(0x100, 0x100 + 256 - len(printable))  # stand for unprintable bytes
        characters = [chr(code) for code in (*printable, *others)]
        vocab = {token: i for i, token in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
        for number, merge in enumerate(merges, 1):
            if len(merge) != 2 or not all(isinstance(part, str) and part in vocab for part in merge):
                raise UserError(f"merge {number}, {' '.join(map(str, merge))!r}, does not join two earlier tokens")
            vocab["".join(merge)] = len(vocab)
        self._special = {token: len(vocab) + i for i, token in enumerate(SPECIAL)}
        self.vocab_size = len(vocab) + len(SPECIAL)
        pairs = [(first, second) for first, second in merges]
        self.library = tokenizers.Tokenizer(models.BPE(vocab | self._special, pairs, end_of_word_suffix="</w>"))
        words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
        to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.library.pre_tokenizer = pre_tokenizers.Sequence([words, to_characters])

    def _ids(self, text, length):
        start, end = self._special.values()
        ids = [start]
        for word in self.words(text)[:length]:
            special = self._special.get(word)
            ids += [token.id for token in self.library.model.tokenize(word)] if special is None else [special]
        return [*ids[: length - 1], end]

    def words(self, text: str) -> list[str]:
        if not (text.isascii() and text.isprintable()) or "&" in text:
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return [word for word, _ in self.library.pre_tokenizer.pre_tokenize_str(" ".join(text.split()).lower())]
