"""The vocabulary of a new run: read from a file, or learned from the captions."""

import gzip
import io
import itertools
import json
import logging
import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import trainers

from flip_jax import untrusted
from flip_jax.config import Config, TextConfig
from flip_jax.data import pipeline, sources
from flip_jax.data.clip_tokenizer import MERGES, ClipTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

MAX_CHARACTERS = 2**26  # of a file after unpacking


def read(path: str | os.PathLike, text: TextConfig | None = None) -> Tokenizer:
    """Reads a vocabulary file in UTF-8, gzipped or not; its first line tells the kind.

    WordPiece has one token per line; CLIP's byte pairs have a header with "#version", then one merge per line; a
    tokenizer.json is an object, and must have the tokens that the `text` tower needs.

    Raises:
      UserError: the file is missing, none of these, or does not fit.
    """
    try:
        data: Any = io.BytesIO(untrusted.read_file(path))
        if data.getvalue()[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=data)
        content = io.TextIOWrapper(data, "utf-8").read(MAX_CHARACTERS + 1)
        if len(content) > MAX_CHARACTERS:
            raise UserError(f"more than {MAX_CHARACTERS} characters")
        if content.lstrip().startswith("{"):
            from flip_jax.data import library_tokenizer  # few runs need it

            named = library_tokenizer.settings_next_to(pathlib.Path(path))
            return library_tokenizer.read(json.loads(content), text or TextConfig(), os.fspath(path), named)
        lines = content.removesuffix("\n").split("\n")
        if "#version" in lines[0]:
            return ClipTokenizer([line.split() for line in lines[1 : 1 + MERGES]])
        return Tokenizer({token: i for i, token in enumerate(lines)})
    except (UserError, OSError, ValueError, RecursionError, EOFError, zlib.error) as error:
        raise UserError(
            f"config.data.vocab {str(path)!r}: {error}. It names a WordPiece vocabulary with one token per line, "
            "CLIP's bpe_simple_vocab_16e6.txt.gz or a tokenizer.json; if empty, one is trained on the captions"
        ) from None


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a vocabulary of at most `vocab_size` tokens, always the same one from the same captions."""
    tokenizer = Tokenizer({"[PAD]": 0, "[UNK]": 1})
    words = [word for caption in captions for word in tokenizer.words(caption)]
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
    tokenizer.library.train_from_iterator(words, trainer)
    return Tokenizer(tokenizer.library.get_vocab())


def caption_sample(config: Config, limit: int = 100_000) -> list[str]:
    """Reads at most `limit` captions of the training data to learn a vocabulary from, the same in every process."""
    mixture, captions = pipeline.open_mixture(config), []
    # Said once the data are open, because a path that is mistyped is refused before.
    size = config.model.text.vocab_size
    _log.info("config.data.vocab is empty: training a WordPiece of at most %d entries on the captions", size)
    for _, source in mixture:
        schedule = sources.Schedule(len(source), config.seed)
        records = sources.in_order(source, (schedule[i][0] for i in range(len(source))))
        texts = (text for record in records for text in record.get("texts", []))
        captions += itertools.islice(texts, limit // len(mixture))
    return captions


def make(config: Config) -> Tokenizer:
    """Reads the tokenizer of `config.data.vocab`, or learns one from the captions where that is empty."""
    if config.data.vocab:
        return read(config.data.vocab, config.model.text)
    return train(caption_sample(config), config.model.text.vocab_size)
