"""Serve a web page to try a model on your own images.

Classifies an image zero-shot, shows what each masking strategy keeps of it, and with --images searches a folder by
text. The page needs aiohttp (pip install -e ".[page]"), contacts no other host and listens on this machine only.
"""

import argparse
import base64
import collections
import dataclasses
import functools
import importlib.util
import inspect
import io
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from flip_jax import inference, masking, runtime, untrusted
from flip_jax.data import transforms
from flip_jax.data.content import sample
from flip_jax.data.records import CHUNK, END, IMAGES, MAX_IMAGE, Pick, Record
from flip_jax.evaluators import snapshot, zeroshot
from flip_jax.runtime import UserError
from flip_jax.tools import embed, options, search
from flip_jax.tools import index as index_lib

EXAMPLE = "flip demo --model=runs/b16 --images=/data/photos"

CLASS_LISTS = 4  # whose embeddings are kept
SHOWN = 24  # hits per search
MAX_CLASSES, MAX_LENGTH = 10_000, 1000  # class names; characters of a name, a prompt or a query
TEXT_BATCH, IMAGE_BATCH = 32, 64  # encoded at once
TEMPLATE = "a photo of a {}."
STRATEGIES = masking.STRATEGIES | {"resize": masking.resize}

MASKS = 16  # compiled masks that are kept


class Left(Exception):
    """Raised where nobody waits for the answer any more."""


def _never() -> bool:
    return False


@functools.lru_cache(MASKS)
def _masker(tower):
    return jax.jit(lambda key, image: masking.see_image(tower, key, image))


class Folder:
    """The images in a folder and its subfolders as a source of records; keys are paths relative to the folder.

    Links that lead out of the folder are not followed. UserError if there is no image.
    """

    at_once = CHUNK

    def __init__(self, folder: str):
        self._root = os.path.realpath(folder)
        if not os.path.isdir(self._root):
            raise UserError(f"--images {folder!r} is not a folder")
        found = (
            os.path.relpath(os.path.join(place, name), self._root)
            for place, _, names in os.walk(self._root)
            for name in names
            if name.rpartition(".")[2].lower() in IMAGES and os.path.isfile(os.path.join(place, name))
        )
        # A key must be text, and a file's name may be any bytes.
        self._paths = {os.fsencode(path).decode(errors="replace"): path for path in sorted(found)}
        self._keys = list(self._paths)
        if not self._keys:
            raise UserError(f"--images {folder!r} holds no image ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Yield the picked records."""
        for index, epoch in picks:
            record = {"key": self._keys[index], "epoch": epoch}
            try:
                content = self.content(record["key"])
            except UserError:
                yield record | {"bad": "outside the folder"}, END  # or no file any more
            except OSError:
                yield record | {"bad": "cannot be read"}, END
            else:
                yield record | sample(content, ()), END

    def content(self, key: str) -> bytes:
        """Return the bytes of an image file; UserError for a key that is not in the folder or leads out of it."""
        # Resolved again at each call, because a file may have become a link or a pipe since the folder was listed.
        path = os.path.realpath(os.path.join(self._root, self._paths.get(key, "")))
        if key not in self._paths or os.path.commonpath([path, self._root]) != self._root:
            raise UserError(f"{key[:100]!r} is not one of the images in the folder.")
        return untrusted.read_file(path, MAX_IMAGE)


class Demo:
    """Answers the page's questions about a model; every method raises UserError for input that it refuses.

    Raises:
      UserError: the model is a classifier, or `images` is not a folder with usable images.
    """

    def __init__(self, encoder: inference.Encoder, name: str, images: str = "", work: pathlib.Path | None = None):
        """`work` is an empty folder for the embeddings of the images."""
        index_lib.refuse_classifier(encoder)
        self._encoder, self._name, self._folder = encoder, name, None
        self._known: collections.OrderedDict[tuple[Any, str], np.ndarray] = collections.OrderedDict()
        if images:
            self._folder = Folder(images)
            batch_size = min(IMAGE_BATCH, len(self._folder))
            data = encoder.config.data
            embed.write_index(encoder, name, self._folder, data, work, name=images, batch_size=batch_size)
            self._index = index_lib.Index(work)
            self._thumbnails = search.Thumbnails(self._folder, data)

    def about(self) -> dict[str, Any]:
        """Describe the model, and give the page its initial values."""
        model, templates = self._encoder.config.model, self._encoder.config.eval.templates
        return {
            "model": self._name,
            "image_size": model.image.image_size,
            "patch_size": model.image.patch_size,
            "parameters": sum(x.size for x in jax.tree.leaves(self._encoder.params)),
            "strategies": {name: (inspect.getdoc(do) or "").split("\n")[0] for name, do in STRATEGIES.items()},
            "mask": model.image.mask,
            "mask_ratio": model.image.mask_ratio,
            "template": templates[0] if templates else TEMPLATE,
            "images": self._index.settings["rows"] if self._folder else 0,
            "skipped": self._index.settings["bad"] if self._folder else {},
        }

    def content(self, key: str) -> bytes:
        """Return the bytes of an image in the folder."""
        if not self._folder:
            raise UserError("There is no folder of images: start the page with --images=FOLDER.")
        return self._folder.content(key)

    def _classes(self, names, template, left):
        """Return the embeddings of class names; those of the last four lists are kept."""
        key = names, template
        if key not in self._known:
            embedded = []
            for i in range(0, len(names), TEXT_BATCH):
                if left():
                    raise Left
                some = names[i : i + TEXT_BATCH]
                embedded.append(zeroshot.class_embeddings(self._encoder, some, [template], TEXT_BATCH))
            self._known[key] = np.concatenate(embedded)
        self._known.move_to_end(key)
        if len(self._known) > CLASS_LISTS:
            self._known.popitem(last=False)
        return self._known[key]

    def classify(
        self, content: bytes, names: str, template: str, left: Callable[[], bool] = _never
    ) -> list[dict[str, Any]]:
        """Return {"name", "share", "cosine"} of each class name (one per line), likeliest first; softmax shares.

        `left` tells whether nobody waits for the answer any more; then the work ends.
        """
        classes = list(dict.fromkeys(filter(None, map(str.strip, names.splitlines()))))
        if not 1 <= len(classes) <= MAX_CLASSES:
            raise UserError(f"Give 1 to {MAX_CLASSES:,} class names, one per line; there are {len(classes):,}.")
        if template.count("{}") != 1:
            raise UserError(f"The prompt needs one {{}} for the class name, got {template[:100]!r}.")
        _check_length(template, *classes)
        class_CxE = self._classes(tuple(classes), template, left)
        image_E = np.asarray(self._encoder.encode_image(self._pixels(content)[None]))[0]
        cosine_C = class_CxE @ image_E
        share_C = np.exp(self._encoder.scale() * (cosine_C - cosine_C.max()))
        share_C /= share_C.sum()
        return [
            {"name": classes[i], "share": float(share_C[i]), "cosine": float(cosine_C[i])}
            for i in np.argsort(-cosine_C, kind="stable")
        ]

    def search(self, text: str, left: Callable[[], bool] = _never) -> list[dict[str, Any]]:
        """Return {"key", "score", "image"} of the nearest images; an "error" may replace the "image"."""
        if not self._folder:
            raise UserError("There is no folder to search: start the page with --images=FOLDER.")
        if not text.strip():
            raise UserError("Enter a text to search for.")
        _check_length(text)
        (hits,) = self._index.nearest(self._encoder.encode_text([text.strip()]), SHOWN)
        found = []
        for hit in hits:
            if left():
                raise Left
            image = self._thumbnails(hit)
            shown = {"image": _data_url(image)} if isinstance(image, np.ndarray) else {"error": image}
            found.append({"key": hit.key, "score": hit.score} | shown)
        return found

    def mask(
        self, content: bytes, strategy: str, ratio: float, seed: int, left: Callable[[], bool] = _never
    ) -> dict[str, Any]:
        """Return the image as the model takes it, "whole", and what a training step would see of it, "kept"."""
        model = self._encoder.config.model
        if strategy not in STRATEGIES:
            raise UserError(f"The strategy must be one of {', '.join(STRATEGIES)}, got {strategy[:100]!r}.")
        if not 0 <= ratio < 1:
            raise UserError(f"The mask ratio must be in [0, 1), got {ratio}.")
        tower = dataclasses.replace(model.image, mask=strategy, mask_ratio=ratio)
        masking.check(tower, dataclasses.replace(model.text, mask_ratio=0.0))
        grid, image_SxSx3 = tower.image_size // tower.patch_size, self._pixels(content)
        if strategy != "grid":  # which takes three ratios only
            # One ratio for each number of patches, in the middle of those that leave it: each is compiled.
            tower = dataclasses.replace(tower, mask_ratio=max(0.0, 1 - (tower.visible_patches + 0.5) / grid**2))
        patch_1xKxP, position_1xK = jax.device_get(_masker(tower)(jax.random.key(seed), image_SxSx3[None]))
        kept = snapshot.unpatchify(patch_1xKxP[0], None if position_1xK is None else position_1xK[0], grid)
        return {
            "whole": _data_url(image_SxSx3, "PNG"),
            "kept": _data_url(kept, "PNG"),
            "width": len(kept) / len(image_SxSx3),  # below 1 if the image is resized rather than masked
            "visible": tower.visible_patches,
            "patches": grid**2,
        }

    def _pixels(self, content):
        if len(content) > MAX_IMAGE:
            raise UserError(f"The image has more than {MAX_IMAGE:,} bytes.")
        data = self._encoder.config.data
        try:
            return transforms.decode(content, self._encoder.config.model.image.image_size, data)
        except transforms.BadImage as error:
            allowed = f"{', '.join(transforms.FORMATS)} of at most {data.max_image_pixels:,} pixels"
            raise UserError(f"This image cannot be used ({error}): it must be {allowed}.") from None


def _check_length(*texts):
    if max(map(len, texts)) > MAX_LENGTH:
        raise UserError(f"A text may have {MAX_LENGTH:,} characters, got {max(map(len, texts)):,}.")


def _data_url(pixels, form="JPEG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **({"quality": 85} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flip demo`."""
    options.add_model(parser)
    parser.add_argument("--images", default="", metavar="DIR", help="folder of images to search, with its subfolders")
    parser.add_argument("--port", type=int, default=8080, help="port of the page; 0: any free one (default: 8080)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )


def listen(host: str, port: int) -> socket.socket:
    """Open the page's port; UserError if it is taken or not allowed."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be in [0, 65535], got {port}")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"cannot listen on --host={host} --port={port} ({error.strerror}): use another port, or 0 for any free one"
        ) from None


def main(arguments: argparse.Namespace) -> None:
    """Run `flip demo`."""
    runtime.enable_compile_cache()
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError('the page needs aiohttp: pip install -e ".[page]"')
    from flip_jax.tools import demo_server

    # The port first, so that a taken one is reported before the images are embedded.
    with listen(arguments.host, arguments.port) as listener, tempfile.TemporaryDirectory() as work:
        encoder = inference.load(arguments.model)
        demo = Demo(encoder, arguments.model, arguments.images, pathlib.Path(work))
        demo_server.run(demo, listener)
