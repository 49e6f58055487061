"""Strings to token ids by any tokenizer.json of the `tokenizers` library: byte pairs, Unigram, WordPiece."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from flip_jax import untrusted
from flip_jax.config import TextConfig
from flip_jax.data.tokenizer import MAX_ID, Tokenizer
from flip_jax.runtime import UserError

PADS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>", "[pad]")  # usual names, for a file that does not say which it is
ADDED = "add_bos_token", "add_eos_token"


class LibraryTokenizer(Tokenizer):
    """Turns strings into rows of ids as the library does, with the special tokens that the file adds to each text.

    A text that is too long loses its last tokens but keeps the special ones; a row is completed by the id `fill`.
    """

    def __init__(self, content: Mapping[str, Any], fill: int = 0):
        self.library = tokenizers.Tokenizer.from_str(json.dumps(content))
        # Both would change while other threads use it; see `_ids`.
        self.library.no_truncation()
        self.library.no_padding()
        self.kind = type(self.library.model).__name__
        self.vocab_size = max(self.library.get_vocab().values()) + 1
        self.fill, self._special = fill, self.library.num_special_tokens_to_add(False)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the library's JSON file, and the id that fills rows."""
        return {"library": super().to_json(), "fill": self.fill}

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns token ids, int32 [len(texts), length]."""
        tokens = np.full((len(texts), length), self.fill, np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._ids(text, length)
            row[: len(ids)] = ids
        return tokens

    def _ids(self, text, length):
        encoding = self.library.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, length - self._special))
        return self.library.post_process(encoding, None, True).ids[:length]

    def end(self) -> int | None:
        """Returns the id that ends every text; None if there is no such id."""
        rows = [self._ids(text, 64) for text in ("a", "the cat", "")]
        bare = [self.library.encode(text, add_special_tokens=False).ids for text in ("a", "the cat", "")]
        ends = {row[-1] if len(row) > len(ids) else None for row, ids in zip(rows, bare, strict=True)}
        return ends.pop() if len(ends) == 1 else None


def read(content: Mapping[str, Any], text: TextConfig, source: str, named: Mapping[str, Any]) -> LibraryTokenizer:
    """Makes a tokenizer that fits a text tower, of a tokenizer.json and the tokenizer_config.json next to it.

    Raises:
      UserError: the library cannot read the file, or it lacks the token that the tower pools or pads with.
    """
    try:
        tokenizer = LibraryTokenizer(_with_ends(content, named))
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{source} is no tokenizer.json of the tokenizers library: {error}") from None
    if not 0 < tokenizer.vocab_size <= MAX_ID:
        raise UserError(f"{source} has ids up to {tokenizer.vocab_size - 1:,}; at most {MAX_ID:,} are read")
    pad, end = _pad(tokenizer.library, content, named), tokenizer.end()
    if text.pool == "last" and not end:
        raise UserError(
            f"{source}: config.model.text.pool 'last' reads the token that ends a text, but its post_processor adds "
            f"none{' but id 0, which is padding here' if end == 0 else ''}; add one, or use pool 'first' or 'final'"
        )
    padding = text.pool == "mean" or text.mask_padding or text.mask_ratio > 0
    if (padding and pad != 0) or (text.pool == "final" and pad is None):
        wanted, has = "the id 0" if padding else "any id", "it has none" if pad is None else f"has {pad}"
        raise UserError(
            f"{source}: its padding must have {wanted} for config.model.text.pool {text.pool!r}, mask_padding "
            f"{text.mask_padding} and mask_ratio {text.mask_ratio}, but {has}; "
            "name a pad_token in the tokenizer_config.json next to it, or use another pool without masking"
        )
    tokenizer.fill = pad if text.pool == "final" else 0
    return tokenizer


def settings_next_to(path: pathlib.Path) -> dict[str, Any]:
    """Reads the tokenizer_config.json of a tokenizer.json's folder; empty if there is none that can be read."""
    try:
        content = json.loads(untrusted.read_file(path.parent / "tokenizer_config.json"))
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def _token(named: Mapping[str, Any], key: str) -> str | None:
    """Returns a token that tokenizer_config.json names, as a string or as an object with its content."""
    token = named.get(key)
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _pad(library, content, named) -> int | None:
    padding = content.get("padding")
    names = [_token(named, "pad_token"), padding.get("pad_token") if isinstance(padding, Mapping) else None, *PADS]
    return next((i for name in names if isinstance(name, str) and (i := library.token_to_id(name)) is not None), None)


def _with_ends(content: Mapping[str, Any], named: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the start and end that tokenizer_config.json asks for; transformers, too, lets it overrule the file."""
    if not all(isinstance(named.get(key), bool) for key in ADDED):
        return content
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokens = [
        _token(named, f"{name}_token") if named[key] else "" for name, key in zip(("bos", "eos"), ADDED, strict=True)
    ]
    ids = [library.token_to_id(token) if token else None for token in tokens]
    if any(token is None or (token and i is None) for token, i in zip(tokens, ids, strict=True)):
        return content
    special = [(token, i) for token, i in zip(tokens, ids, strict=True) if token]
    library.post_processor = processors.TemplateProcessing(f"{tokens[0]} $A {tokens[1]}".strip(), None, special)
    return json.loads(library.to_str())
