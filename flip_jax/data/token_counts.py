"""How often each token occurs in a corpus: `flip inspect --counts` writes it, and text mask `frequency` reads it."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flip_jax import untrusted
from flip_jax.config import Config, TextConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.runtime import UserError

KEY = "config.model.text.mask_counts"
LENGTH = 1024  # tokens of a caption that are counted; few captions have more
_HASH = re.compile(r"#[0-9a-f]{16}\Z")  # of the content, which `identified` adds to the path


def of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Returns the ids of all tokens of some captions, without padding."""
    tokens = tokenizer(texts, LENGTH)
    return tokens[tokens != 0].tolist()


def to_text(tokenizer: Tokenizer, counts: Mapping[int, int]) -> str:
    """Returns the content of a file with the count of each id of a tokenizer."""
    about = {"tokenizer": _fingerprint(tokenizer), "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    return json.dumps(about | {"counts": [counts.get(i, 0) for i in range(tokenizer.vocab_size)]}) + "\n"


def identified(config: Config) -> Config:
    """Adds a hash of the file's content to its path in the config, so that a run resumes with the same counts only.

    Raises:
      UserError: the file cannot be read, holds no counts, or the run does not mask by frequency.
    """
    text = config.model.text
    if text.mask != "frequency" and not config.stages:
        raise UserError(
            f"{KEY} {text.mask_counts!r} is for config.model.text.mask 'frequency', got {text.mask!r}; set that, or "
            "mask_counts to ''"
        )
    named = f"{_HASH.sub('', text.mask_counts)}#{_read(text.mask_counts)[1]}"
    model = dataclasses.replace(config.model, text=dataclasses.replace(text, mask_counts=named))
    return dataclasses.replace(config, model=model)


def check(text: TextConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError where the file of `text.mask_counts` counts the tokens of another tokenizer than the run's."""
    content = _read(text.mask_counts)[0]
    ours = tokenizer.kind, tokenizer.vocab_size, _fingerprint(tokenizer)
    theirs = content.get("kind"), content["vocab_size"], content["tokenizer"]
    if theirs[-1] != ours[-1]:
        theirs, ours = ("{} of {} entries ({})".format(*about) for about in (theirs, ours))
        raise UserError(
            f"{KEY} {_HASH.sub('', text.mask_counts)!r} counts tokens of another tokenizer, {theirs}, the run has "
            f"{ours}; count with `flip inspect SOURCE --counts=FILE --vocab=VOCAB`, where VOCAB is the run's "
            "config.data.vocab, or a run that has the same"
        )


def per_token(text: TextConfig) -> np.ndarray:
    """Returns the count of each id, f32 [vocab_size]. One that the corpus does not have is as rare as one seen once."""
    counts = np.ones(text.vocab_size, np.float32)
    found = _read(text.mask_counts)[0]["counts"][: text.vocab_size]
    counts[: len(found)] = np.maximum(found, 1)
    return counts


def _fingerprint(tokenizer):
    entries = sorted((i, token) for token, i in tokenizer.library.get_vocab().items())
    return hashlib.blake2b(json.dumps([tokenizer.kind, entries]).encode(), digest_size=8).hexdigest()


def _read(name: str) -> tuple[dict[str, Any], str]:
    """Reads the file that a config names, and a hash of its content, which must be that of the name if it has one."""
    wanted = _HASH.search(name)
    path = os.path.expanduser(_HASH.sub("", name))
    try:
        raw = untrusted.read_file(path)
        content = json.loads(raw)
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{KEY} {path!r}: {error}; `flip inspect SOURCE --counts=FILE` writes such a file") from error
    found = hashlib.blake2b(raw, digest_size=8).hexdigest()
    if wanted and wanted[0] != f"#{found}":
        raise UserError(f"{KEY} {path!r} has changed since the run began; put the file back")
    match content:
        case {"tokenizer": str(), "vocab_size": int(size), "counts": list(counts)} if len(counts) == size:
            if all(type(count) is int and 0 <= count < 2**63 for count in counts):
                return content, found
    raise UserError(
        f"{KEY} {path!r} holds no counts: it needs tokenizer, vocab_size and as many whole numbers in counts; "
        "`flip inspect SOURCE --counts=FILE` writes such a file"
    )
