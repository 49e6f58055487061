"""WordPiece as BERT's uncased tokenizer does it, without special tokens."""

import json
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

MAX_WORD_BYTES = 100  # of UTF-8; longer words are unknown
_CJK = "\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f"


class Tokenizer:
    """Strings to rows of word-piece ids, as tensorflow-text's BertTokenizer(lower_case=True) gives them.

    Nothing in a caption is special, not even "[CLS]". `vocab` is token -> id, with "[PAD]" as 0, and "[UNK]".
    """

    def __init__(self, vocab: Mapping[str, int]):
        if vocab.get("[PAD]") != 0 or "[UNK]" not in vocab:
            raise ValueError(f"[PAD] must be the first entry of a WordPiece vocabulary ({len(vocab)} here), [UNK] any")
        model = models.WordPiece(dict(vocab), unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_BYTES)
        self.vocab_size, self._unknown = max(vocab.values()) + 1, vocab["[UNK]"]
        self._library = tokenizers.Tokenizer(model)
        # What is left of NFKC case folding, and then: no combining marks; control characters part words.
        ignorable, mark, control = r"\p{Default_Ignorable_Code_Point}", r"\p{Mn}", r"[\p{Cc}\p{Cf}]"
        replacements = [normalizers.Replace(Regex(a), b) for a, b in ((ignorable, ""), (mark, ""), (control, " "))]
        self._library.normalizer = normalizers.Sequence([replacements[0], normalizers.NFD(), *replacements[1:]])
        # Punctuation and ideographs are words of their own.
        alone = Regex(rf"[!-/:-@\[-`{{-~\p{{P}}{_CJK}]")
        splits = [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(alone, "isolated")]
        self._library.pre_tokenizer = pre_tokenizers.Sequence(splits)

    @classmethod
    def from_vocab(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a vocabulary file, one token a line in UTF-8. ValueError if it is not there or is none."""
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return cls({token: i for i, token in enumerate(lines)})
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config.data.vocab {str(path)!r}: {error}. It names a WordPiece vocabulary with one token a line; if "
                "empty, one is trained on the captions"
            ) from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a vocabulary of at most `vocab_size` entries; the same captions always give the same one."""
        tokenizer = cls({"[PAD]": 0, "[UNK]": 1})
        words = [word for caption in captions for word in tokenizer._words(caption)]
        # Half of the entries at most: a character may need two, as the first of a word and as a later one.
        common = sorted(Counter("".join(words)).items(), key=lambda item: (-item[1], item[0]))
        first = {character for character, _ in common[: (vocab_size - 2) // 4]}
        later = {f"##{character}" for word in set(words) for character in word[1:] if character in first}
        # The trainer numbers characters in the order of a hash table, which differs from run to run, and settles ties
        # by number. Given as special tokens, they have fixed numbers.
        special = ["[PAD]", "[UNK]", *sorted(first), *sorted(later)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, limit_alphabet=0, show_progress=False
        )
        tokenizer._library.train_from_iterator(words, trainer)
        return cls(tokenizer._library.get_vocab())

    def to_json(self) -> dict[str, Any]:
        """The content of the `tokenizers` library's own JSON file."""
        return json.loads(self._library.to_str())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer whose `to_json` this is."""
        return cls(content["model"]["vocab"])

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Token ids, int32 [len(texts), length]: cut, or padded with 0; an empty text is all zeros."""
        tokens = np.zeros((len(texts), length), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = []
            for word in self._words(text)[:length]:
                # The library would measure in characters.
                too_long = len(word.encode()) > MAX_WORD_BYTES
                ids += [self._unknown] if too_long else [token.id for token in self._library.model.tokenize(word)]
            row[: len(ids)] = ids[:length]
        return tokens

    def _words(self, text):
        if not text.isascii():
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        normal = self._library.normalizer.normalize_str(text.lower())
        return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normal)]
