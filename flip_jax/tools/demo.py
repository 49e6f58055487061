"""A page for a trained model: python -m flip_jax.demo --model=DIR [--pictures=FOLDER] [--port=8080]

Zero-shot classification of a picture, what each masking strategy keeps of it, and with --pictures a search by text
among the pictures in that folder. It needs aiohttp (pip install -e ".[page]"), loads nothing from elsewhere and listens
on this machine alone.
"""

import base64
import dataclasses
import functools
import inspect
import io
import logging
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from flip_jax import inference, masking, runtime
from flip_jax.data import transforms
from flip_jax.data.records import CHUNK, END, IMAGES, MAX_IMAGE, Pick, Record, sample
from flip_jax.evaluators import zeroshot
from flip_jax.evaluators.snapshot import kept_patches
from flip_jax.models import vit
from flip_jax.tools import embed, search

SHOWN = 24  # hits of a search
MAX_CLASSES, MAX_LENGTH = 10_000, 1000  # class names, and characters of a name, a template or a query
TEXT_BATCH, IMAGE_BATCH = 32, 64  # encoded at once
TEMPLATE = "a photo of a {}."
STRATEGIES = masking.STRATEGIES | {"resize": masking.resize}

_resized, _visible = jax.jit(vit.resized, static_argnums=0), jax.jit(vit.visible, static_argnums=0)


class Folder:
    """The pictures in a folder and those below it, as a source of records; keys are paths relative to it.

    Links that lead out of the folder are not followed. ValueError if there is no picture.
    """

    at_once = CHUNK

    def __init__(self, folder: str):
        self._root = os.path.realpath(folder)
        if not os.path.isdir(self._root):
            raise ValueError(f"--pictures {folder!r} is no folder")
        found = (
            os.path.relpath(os.path.join(place, name), self._root)
            for place, _, names in os.walk(self._root)
            for name in names
            if name.rpartition(".")[2].lower() in IMAGES and os.path.isfile(os.path.join(place, name))
        )
        # A key is text, and the name of a file need not be.
        self._paths = {os.fsencode(path).decode(errors="replace"): path for path in sorted(found)}
        self._keys = list(self._paths)
        if not self._keys:
            raise ValueError(f"--pictures {folder!r} holds no picture ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The picked records."""
        for index, epoch in picks:
            key = self._keys[index]
            try:
                content = sample(self.content(key), ())
            except ValueError:
                content = {"bad": "outside the folder"}
            except OSError:
                content = {"bad": "cannot be read"}
            yield {"key": key, "epoch": epoch} | content, END

    def content(self, key: str) -> bytes:
        """The bytes of a picture's file. ValueError for a key that is none of the folder's, or leads out of it."""
        path = os.path.realpath(os.path.join(self._root, self._paths.get(key, "")))  # links may have changed since
        if key not in self._paths or os.path.commonpath([path, self._root]) != self._root:
            raise ValueError(f"{key[:100]!r} is none of the pictures in the folder.")
        with open(path, "rb") as file:
            return file.read(MAX_IMAGE + 1)


class Demo:
    """What the page asks of a model. All methods raise ValueError for input that they refuse, with the reason.

    Raises:
      ValueError: the model is a classifier, or `pictures` is no folder with pictures that can be read.
    """

    def __init__(self, encoder: inference.Encoder, name: str, pictures: str = "", work: pathlib.Path | None = None):
        """`work` is an empty folder for the embeddings of the pictures."""
        if encoder.tokenizer is None:
            raise ValueError("--model is a fine-tuned classifier, which reads no text; give the model it started from")
        self._encoder, self._name, self._folder = encoder, name, None
        self._classes = functools.lru_cache(4)(
            lambda names, template: zeroshot.class_embeddings(encoder, names, [template], TEXT_BATCH)
        )
        if pictures:
            self._folder = Folder(pictures)
            batch_size = min(IMAGE_BATCH, len(self._folder))
            embed.write_index(encoder, name, self._folder, work, name=pictures, batch_size=batch_size)
            self._index = search.Index(work)
            self._pictures = search.Pictures(self._folder, encoder.config.data)

    def about(self) -> dict[str, Any]:
        """What the page says of the model, and what it starts with."""
        model, templates = self._encoder.config.model, self._encoder.config.eval.templates
        return {
            "model": self._name,
            "image_size": model.image.image_size,
            "patch_size": model.image.patch_size,
            "parameters": sum(x.size for x in jax.tree.leaves(self._encoder.params)),
            "strategies": {name: inspect.getdoc(do).split("\n")[0] for name, do in STRATEGIES.items()},
            "mask": model.image.mask,
            "mask_ratio": model.image.mask_ratio,
            "template": templates[0] if templates else TEMPLATE,
            "pictures": self._index.settings["rows"] if self._folder else 0,
            "left_out": self._index.settings["bad"] if self._folder else {},
        }

    def content(self, key: str) -> bytes:
        """The bytes of a picture of the folder."""
        if not self._folder:
            raise ValueError("there is no folder of pictures: start the page with --pictures=FOLDER")
        return self._folder.content(key)

    def classify(self, content: bytes, names: str, template: str) -> list[dict[str, Any]]:
        """{"name", "share", "cosine"} of each class name (one a line), the likeliest first; shares are the softmax."""
        classes = list(dict.fromkeys(filter(None, map(str.strip, names.splitlines()))))
        if not 1 <= len(classes) <= MAX_CLASSES:
            raise ValueError(f"Give 1 to {MAX_CLASSES:,} class names, one a line; there are {len(classes):,}.")
        if template.count("{}") != 1:
            raise ValueError(f"The prompt needs one {{}} for the class name, got {template[:100]!r}.")
        _check_length(template, *classes)
        class_CxE = self._classes(tuple(classes), template)
        image_E = np.asarray(self._encoder.encode_image(self._pixels(content)[None]))[0]
        cosine_C = class_CxE @ image_E
        share_C = np.exp(self._encoder.scale() * (cosine_C - cosine_C.max()))
        share_C /= share_C.sum()
        return [
            {"name": classes[i], "share": float(share_C[i]), "cosine": float(cosine_C[i])}
            for i in np.argsort(-cosine_C, kind="stable")
        ]

    def search(self, text: str) -> list[dict[str, Any]]:
        """{"key", "score", "picture"} of the nearest pictures; instead of a "picture" there may be an "error"."""
        if not self._folder:
            raise ValueError("There is no folder to search: start the page with --pictures=FOLDER.")
        if not text.strip():
            raise ValueError("Say what to look for.")
        _check_length(text)
        (hits,) = self._index.nearest(self._encoder.encode_text([text.strip()]), SHOWN)
        found = []
        for hit in hits:
            picture = self._pictures(hit)
            shown = {"picture": _data_url(picture)} if isinstance(picture, np.ndarray) else {"error": picture}
            found.append({"key": hit.key, "score": hit.score} | shown)
        return found

    def mask(self, content: bytes, strategy: str, ratio: float, seed: int) -> dict[str, Any]:
        """The picture as the model takes it, "whole", and what a training step would see of it, "kept"."""
        model = self._encoder.config.model
        if strategy not in STRATEGIES:
            raise ValueError(f"The strategy must be one of {', '.join(STRATEGIES)}, got {strategy[:100]!r}.")
        if not 0 <= ratio < 1:
            raise ValueError(f"The mask ratio must be in [0, 1), got {ratio}.")
        tower = dataclasses.replace(model.image, mask=strategy, mask_ratio=ratio)
        masking.check(tower, dataclasses.replace(model.text, mask_ratio=0.0))
        image_1xSxSx3 = self._pixels(content)[None]
        kept = np.asarray(_resized(tower, image_1xSxSx3)[0])
        position_1xK = _visible(tower, jax.random.key(seed), vit.patchify(image_1xSxSx3, tower.patch_size))
        if position_1xK is not None:
            kept = kept_patches(kept, np.asarray(position_1xK[0]), tower.patch_size)
        return {
            "whole": _data_url(image_1xSxSx3[0], "PNG"),
            "kept": _data_url(kept, "PNG"),
            "width": len(kept) / len(image_1xSxSx3[0]),  # less than 1 where all of it stays, but smaller
            "visible": tower.visible_patches,
            "patches": (tower.image_size // tower.patch_size) ** 2,
        }

    def _pixels(self, content):
        if len(content) > MAX_IMAGE:
            raise ValueError(f"The picture has more than {MAX_IMAGE:,} bytes.")
        data = self._encoder.config.data
        try:
            return transforms.decode(content, self._encoder.config.model.image.image_size, data)
        except transforms.BadImage as error:
            allowed = f"{', '.join(transforms.FORMATS)} of at most {data.max_image_pixels:,} pixels"
            raise ValueError(f"This is no picture that can be used ({error}): it must be {allowed}.") from error


def _check_length(*texts):
    if max(map(len, texts)) > MAX_LENGTH:
        raise ValueError(f"A text may have {MAX_LENGTH:,} characters, got {max(map(len, texts)):,}.")


def _data_url(pixels, form="JPEG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **({"quality": 85} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def main(_) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    runtime.enable_compile_cache()
    try:
        from flip_jax.tools import demo_server
    except ImportError as error:
        sys.exit(f'error: the page needs {error.name}: pip install -e ".[page]"')
    try:
        # The port first: what is taken should be known before pictures are embedded.
        with socket.create_server((_HOST.value, _PORT.value)) as listener, tempfile.TemporaryDirectory() as work:
            encoder = inference.load(_MODEL.value)
            demo = Demo(encoder, _MODEL.value, _PICTURES.value, pathlib.Path(work))
            demo_server.run(demo, listener)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "Folder of a run, or of one of its steps", required=True)
    _PICTURES = flags.DEFINE_string("pictures", "", "Folder whose pictures, and those below it, can be searched")
    _PORT = flags.DEFINE_integer("port", 8080, "Of the page; 0: any that is free", lower_bound=0, upper_bound=65535)
    _HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; others than this can be reached by others")
    app.run(main)
