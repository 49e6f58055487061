"""tokenizer.json in a model's folder: read as other libraries write it, and written as they read it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, processors

from flip_jax.config import TextConfig
from flip_jax.data import library_tokenizer
from flip_jax.data.clip_tokenizer import SPECIAL, ClipTokenizer
from flip_jax.data.library_tokenizer import LibraryTokenizer
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.formats import tensors
from flip_jax.runtime import UserError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def read(folder: pathlib.Path, text: TextConfig) -> Tokenizer:
    """Reads the tokenizer of another library's model, which must fit the text tower.

    Raises:
      UserError: there is no tokenizer.json, or it does not fit.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{folder} has no {TOKENIZER}: write one, transformers.AutoTokenizer.from_pretrained(...).save_pretrained("
            "FOLDER), and put it next to the weights; or give flip convert import --vocab, the vocabulary's file"
        )
    content = tensors.read_object(path, "the tokenizers library's file")
    return of_clip(content) or library_tokenizer.read(
        content, text, str(path), library_tokenizer.settings_next_to(path)
    )


def of_clip(content: Mapping[str, Any]) -> ClipTokenizer | None:
    """Returns CLIP's own tokenizer, if these are its byte pairs: it mends a text and unescapes HTML, as CLIP does."""
    model = content.get("model")
    if not isinstance(model, Mapping) or model.get("end_of_word_suffix") != "</w>":
        return None
    merges, vocab = model.get("merges"), model.get("vocab")
    if not (isinstance(merges, list) and isinstance(vocab, Mapping)):
        return None
    try:
        # Earlier versions of the library write a pair as one string.
        ours = ClipTokenizer([merge.split(" ") if isinstance(merge, str) else merge for merge in merges])
    except UserError:
        return None
    size = ours.vocab_size - len(SPECIAL)
    known = {token: i for token, i in ours.library.get_vocab().items() if i < size}
    ends = {token for token, i in vocab.items() if i in (size, size + 1)}
    theirs = {token: i for token, i in vocab.items() if token not in ends}
    return ours if theirs == known and len(ends) == 2 else None


def write(folder: pathlib.Path, tokenizer: Tokenizer, text: TextConfig) -> None:
    """Writes tokenizer.json, and the tokenizer_config.json with which transformers reads it."""
    content = for_others(tokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text.context_length,
    }
    if isinstance(tokenizer, ClipTokenizer):
        start, end = SPECIAL
        settings |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    elif isinstance(tokenizer, LibraryTokenizer):
        library = tokenizer.library
        end = tokenizer.end()
        settings |= {"pad_token": library.id_to_token(tokenizer.fill)}
        settings |= {"eos_token": library.id_to_token(end)} if end is not None else {}
    else:
        settings |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    tensors.write_json(folder / TOKENIZER, content)
    tensors.write_json(folder / SETTINGS, settings)


def for_others(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a tokenizer.json that gives our ids in other libraries, but for rare letters.

    What ours does in Python becomes the nearest that the library has: case folding becomes lower-casing, and broken
    characters and HTML's escapes stay as they are.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.to_json()["library"]
    content = tokenizer.to_json()
    if not isinstance(tokenizer, ClipTokenizer):
        before = [{"type": kind} for kind in ("NFKC", "Lowercase", "NFKC")]
        content["normalizer"]["normalizers"] = before + content["normalizer"]["normalizers"]
        return content
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    library.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    special = [(token, library.token_to_id(token)) for token in SPECIAL]
    library.post_processor = processors.TemplateProcessing(f"{SPECIAL[0]} $A {SPECIAL[1]}", None, special)
    library.add_special_tokens(list(SPECIAL))
    return json.loads(library.to_str())


def end_of(tokenizer: Tokenizer) -> int | None:
    """Returns the id that ends every text; None if there is none, as with FLIP's own WordPiece."""
    if isinstance(tokenizer, ClipTokenizer):
        return tokenizer.vocab_size - 1
    return tokenizer.end() if isinstance(tokenizer, LibraryTokenizer) else None
