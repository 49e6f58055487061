"""Models of the Hugging Face hub: hf://ORG/NAME[@REVISION] to a folder in the cache of huggingface_hub."""

import logging
import os
import pathlib
import re

import huggingface_hub
from huggingface_hub import errors

from flip_jax.formats import open_clip, tensors, tokenizer_files
from flip_jax.runtime import UserError

SCHEME = "hf://"
CONFIG = "config.json"
# Small files that say what a model is; the weights are chosen by them.
ABOUT = [CONFIG, open_clip.SETTINGS, tensors.INDEX, tokenizer_files.TOKENIZER, tokenizer_files.SETTINGS]
ABOUT += ["preprocessor_config.json", "card.json"]
_NAME = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?")


def fetch(path: str) -> pathlib.Path:
    """Downloads a model's settings, tokenizer and safetensors, or what is new of them, and returns their folder.

    The cache, its place, tokens, mirrors and the offline mode are those of huggingface_hub.

    Raises:
      UserError: the repository is missing, closed to this user or not reachable, or has no safetensors.
    """
    found = _NAME.fullmatch(path.rstrip("/"))
    if not found or ".." in path:
        hint = ": that is a place for data, as in webdataset:hf://datasets/..." if "://datasets/" in path else ""
        raise UserError(
            f"{path!r} does not name a model of the hub{hint}; write hf://ORG/NAME or hf://ORG/NAME@REVISION"
        )
    repository, revision = found.groups()
    folder = _download(path, repository, revision, ABOUT)
    if not any((folder / name).is_file() for name in (CONFIG, open_clip.SETTINGS)):
        raise UserError(
            f"{path} has neither {CONFIG} nor {open_clip.SETTINGS}, so it says not which model it is"
            f"{tensors.pickles(_names(repository, revision))}"
        )
    for wanted in _weights(folder):
        # By the commit that was found, which the branch may have left since then.
        _download(path, repository, folder.name, wanted)
        if all((folder / name).is_file() for name in wanted):
            return folder
    raise UserError(f"{path} has no {tensors.WEIGHTS}{tensors.pickles(_names(repository, revision))}")


def endpoint() -> str | None:
    """Returns the hub that HF_ENDPOINT names now; huggingface_hub itself reads it once. None: the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def address() -> str:
    """Returns the address of the hub."""
    return endpoint() or huggingface_hub.constants.ENDPOINT


def _weights(folder: pathlib.Path) -> list[list[str]]:
    """Lists the sets of files that may hold the weights, best first."""
    found = [[tensors.WEIGHTS]]
    if (folder / tensors.INDEX).is_file():
        found = [tensors.indexed(folder)]
    ours = (folder / open_clip.SETTINGS).is_file()
    return [[open_clip.WEIGHTS], *found] if ours else found


def _names(repository: str, revision: str | None) -> list[str]:
    """Lists a repository's files, for a message; empty if that fails."""
    try:
        return huggingface_hub.HfApi(endpoint()).list_repo_files(repository, revision=revision)
    except Exception:  # the client raises its own errors and those of its HTTP library
        return []


def _download(path: str, repository: str, revision: str | None, names: list[str]) -> pathlib.Path:
    hushed = logging.getLogger("huggingface_hub._snapshot_download")
    hushed.setLevel(logging.ERROR)  # it warns where none of the files exists, which is said here with the remedy
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=names, endpoint=endpoint()
        )
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        raise UserError(f"{path}: {_reason(error, repository, revision)}") from None
    return pathlib.Path(folder)


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    """Says why a download failed, and what helps."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its conditions at {address()}/{repository}, and log in, hf auth login or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            "there is no such repository, or it is private: check the name, and for a private one log in, hf auth "
            "login or HF_TOKEN"
        )
    text = " ".join(str(error).split())[:300]
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "the hub cannot be reached, and the model is not complete in the cache: check the network, HF_ENDPOINT and "
            f"HF_HUB_OFFLINE ({text})"
        )
    return f"the download failed ({type(error).__name__}: {text}); run the same command again, which resumes it"
