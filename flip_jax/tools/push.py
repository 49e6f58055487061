"""Upload a model's folder to the Hugging Face hub, as flip convert wrote it, with its card.

The token is huggingface_hub's (hf auth login, or HF_TOKEN). A repository that does not exist yet is made: --private or
--public says how, else the command asks before it makes a public one. An upload that was interrupted goes on where it
stopped when the same command runs again.
"""

import argparse
import logging
import pathlib
import re
import sys

import huggingface_hub
from huggingface_hub import errors

from flip_jax.formats import folders, hub
from flip_jax.runtime import UserError, plain
from flip_jax.tools import card

EXAMPLE = "flip push exported ORG/NAME --dry-run"

# What flip convert writes; nothing else of the folder goes.
GO = re.compile(r"[\w-][\w.-]*\.(safetensors|json|onnx|onnx\.data)|README\.md|LICENSE(\.\w+)?")


def listed(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """List the files of a model's folder that go to the hub, and the names of those that stay.

    Raises:
      UserError: the folder holds no model, or has no card.
    """
    if (folder / "checkpoints").is_dir() or (folder / "state").is_dir():
        raise UserError(f"{folder} is a run: flip convert export {folder} FOLDER, and push that")
    if not list(folder.glob("*.onnx")):
        folders.find(folder)
    if not (folder / card.MARKDOWN).is_file():
        raise UserError(f"{folder} has no model card: write one, flip card --model={folder}")
    paths = sorted(folder.iterdir())
    go = [path for path in paths if GO.fullmatch(path.name) and path.is_file() and not path.is_symlink()]
    return go, [path.name for path in paths if path not in go]


def upload(folder: pathlib.Path, repository: str, files: list[pathlib.Path], private: bool | None) -> str:
    """Upload files to a repository, which is made if it is missing; return its address.

    `private` says how it is made; None asks.

    Raises:
      UserError: nobody can be asked or the answer is no, or the hub refuses.
    """
    api = huggingface_hub.HfApi(hub.endpoint())
    if not _ask(repository, api.repo_exists, repository):
        if private is None and not _agreed(repository):
            raise UserError(f"{repository} was not made: give --private, or --public")
        _ask(repository, api.create_repo, repository, private=bool(private), exist_ok=True)
    names = [path.name for path in files]
    _ask(
        repository,
        api.upload_folder,
        repo_id=repository,
        folder_path=folder,
        allow_patterns=names,
        commit_message="Upload a model with flip push",
    )
    return f"{hub.address()}/{repository}"


def _agreed(repository):
    """Ask whether a public repository may be made; only a person at a terminal can agree."""
    if not sys.stdin.isatty():
        return False
    return input(f"{repository} does not exist. Make it, for everybody to see? [y/N] ").strip().lower() in ("y", "yes")


def _ask(repository, call, *arguments, **keywords):
    """Call the hub; turn its refusals into UserErrors."""
    try:
        return call(*arguments, **keywords)
    except errors.HFValidationError as error:
        raise UserError(f"{repository!r} is no name of a repository, ORG/NAME: {error}") from None
    except Exception as error:  # the client raises its own errors and those of its HTTP library
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "run the same command again, which resumes it"
        if status in (401, 403):
            remedy = "log in with a token that may write there, hf auth login or HF_TOKEN"
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{repository}: the hub refused ({type(error).__name__}: {text}); {remedy}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="what flip convert wrote")
    parser.add_argument("repository", metavar="ORG/NAME", help="of the hub")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and contact nobody")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--private", action="store_true", help="make a missing repository for yourself only")
    group.add_argument("--public", action="store_true", help="make a missing repository for everybody, unasked")


def main(arguments: argparse.Namespace) -> None:
    """List the files, and upload them unless it is a dry run."""
    logging.getLogger().setLevel(logging.ERROR)
    folder, repository = pathlib.Path(arguments.folder), arguments.repository
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UserError(f"{repository!r} is no name of a repository: write ORG/NAME")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the OUT of flip convert export")
    files, stay = listed(folder)
    for path in files:
        print(f"{path.stat().st_size:>16,}  {plain(path.name)}")
    total = sum(path.stat().st_size for path in files)
    print(f"{total:>16,}  bytes in {len(files)} files, to {repository}")
    if stay:
        print(f"these stay: {plain(', '.join(stay))}")
    if arguments.dry_run:
        return
    private = True if arguments.private else False if arguments.public else None
    print(upload(folder, repository, files, private))
