"""Sources read by record number: one folder per class, Karpathy's JSON and TFDS."""

import collections
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from flip_jax import untrusted
from flip_jax.config import DataConfig
from flip_jax.data import classes, paths
from flip_jax.data.content import example, example_key, sample
from flip_jax.data.records import CHUNK, END, IMAGES, Pick, Record
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

Row = tuple[str, list[Any], int | None, int]  # an image's path, its captions and class, and the epoch

MAX_JSON = 2**30  # bytes
MAX_COUNT = 100  # largest label where the label is a number of objects
CLASS_CAPTION = "a photo of a {}."  # for TFDS data sets without text
# Files and folders that systems leave among images, in lower case, besides those whose name begins with a dot.
SYSTEM = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found")


class Files:
    """Records that are held in memory; their images are read when needed."""

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK
    class_names: list[str] | None = None
    templates = None
    caption_names: tuple[str, ...] = ()  # where the texts of a record come from, for people
    _rows: list[Any]
    _data: DataConfig

    def _row(self, index: int) -> tuple[str, list[str], int | None]:
        """Returns an image's path, its captions and its class, which a subclass knows."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Reads the picked records."""
        yield from load(self.rows(picks), self._data)

    def rows(self, picks: list[Pick]) -> list[Row]:
        """Looks up what to read of the picked records."""
        return [(*self._row(index), epoch) for index, epoch in picks]


def load(rows: list[Row], data: DataConfig) -> Iterator[tuple[Record, int]]:
    """Reads the images of rows, which needs nothing else of their source."""
    for path, captions, label, epoch in rows:
        image = paths.read_image(path, data)
        rest = {"bad": image} if isinstance(image, str) else sample(image, captions, label)
        yield {"key": path.encode(errors="replace").decode(), "epoch": epoch} | rest, END


class Folder(Files):
    """One folder of images per class, with any subfolders; or images alone, which then have no label.

    The label is the position among the sorted names of the folders, which are sorted by size if all are numbers.
    Hidden and system folders, `SYSTEM`, and folders without images are no classes; what is ignored is counted and said.
    """

    def __init__(self, folder: str, data: DataConfig):
        self._data = data
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder; it needs one folder per class")
        ignored: dict[str, list[str]] = {}
        folders, alone = _listed(folder, ignored)
        found = {name: list(_images_below(os.path.join(folder, name), ignored)) for name in folders}
        self.empty_classes = classes.in_order(name for name in folders if not found[name])
        names = classes.in_order(name for name in folders if found[name])
        self._rows = [(path, label) for label, name in enumerate(names) for path in found[name]]
        if names:
            if alone:
                ignored["images outside the class folders"] = alone
            self.class_names = [os.fsencode(name).decode(errors="replace") for name in names]
        else:
            self._rows = [(os.path.join(folder, name), None) for name in alone]
        if not self._rows:
            found_none = f"{folder} has {len(folders)} folders but no images ({', '.join(IMAGES)})"
            raise UserError(found_none + _said(ignored, "; ignored: "))
        if self.empty_classes:
            ignored["folders without images"] = self.empty_classes
        if ignored:
            _warn_once(f"{folder}: {len(self._rows)} images in {len(names)} classes; ignored: {_said(ignored)}")

    def _row(self, index):
        path, label = self._rows[index]
        return path, [], label


def _listed(folder, ignored):
    """Returns the names of a folder's folders and images, sorted; adds what is neither to `ignored`, by its kind."""
    folders, images = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_folder, extension = entry.is_dir(), os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            ignored.setdefault(f"hidden or system {'folders' if is_folder else 'files'}", []).append(entry.name)
        elif is_folder:
            folders.append(entry.name)
        elif extension[1:] in IMAGES:
            images.append(entry.name)
        else:
            ignored.setdefault("other files", []).append(extension or "no extension")
    return folders, images


def _images_below(folder, ignored, above=()):
    """Yields the paths of the images in a folder, then in its subfolders; a link to a folder above it ends there."""
    place = os.path.realpath(folder)
    if place in above:
        return
    folders, images = _listed(folder, ignored)
    yield from (os.path.join(folder, name) for name in images)
    for name in folders:
        yield from _images_below(os.path.join(folder, name), ignored, (*above, place))


def _said(ignored, before=""):
    """Formats kinds of ignored entries with their counts, and the most frequent names of each."""
    counted = [(kind, collections.Counter(names)) for kind, names in ignored.items()]
    parts = []
    for kind, names in counted:
        most = [f"{count} {name}" if count > 1 else name for name, count in names.most_common(classes.SHOWN)]
        parts.append(f"{names.total()} {kind} ({', '.join(most)}{' ...' if len(names) > classes.SHOWN else ''})")
    return before + ", ".join(parts) if parts else ""


@functools.cache
def _warn_once(message):
    _log.warning("%s", message)


class Karpathy(Files):
    """A split of Karpathy's JSON of COCO or Flickr30k, FILE.json#SPLIT: images with several captions each.

    An image is FILEPATH/FILENAME, or FILENAME, in the folder of the JSON, or in FOLDER: FILE.json#SPLIT#FOLDER.
    """

    caption_names = ("sentences",)

    def __init__(self, rest: str, data: DataConfig):
        file, _, rest = rest.partition("#")
        split, _, folder = rest.partition("#")
        self._data, folder = data, os.path.expanduser(folder)
        folder = os.path.abspath(folder or os.path.dirname(file))
        if not os.path.isfile(file) or not split:
            raise UserError(f"expected karpathy:FILE.json#SPLIT with an existing file; got {file!r} and {split!r}")
        content = untrusted.read_file(file, MAX_JSON)
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON: {error}") from None
        images = parsed.get("images") if isinstance(parsed, dict) else None
        rows = [_karpathy_row(image) for image in images] if isinstance(images, list) else [None]
        if None in rows:
            raise UserError(
                f"{file} does not have Karpathy's layout: images with split, filename and sentences (each with raw)"
            )
        self._folder, self._rows = folder, [row[1:] for row in rows if row[0] == split]
        if not self._rows:
            raise UserError(f"{file} has no split {split!r}; it has {', '.join(sorted({row[0] for row in rows}))}")

    def _row(self, index):
        subfolder, name, captions = self._rows[index]
        path = f"{self._folder}/{subfolder}/{name}" if subfolder else f"{self._folder}/{name}"
        return path if os.path.isfile(path) else f"{self._folder}/{name}", [captions], None


def _karpathy_row(image):
    """Returns the split, folder, file name and captions of an entry of Karpathy's JSON, None if it has another form."""
    match image:
        case {"split": str(split), "filename": str(name), "sentences": list(sentences)}:
            captions = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
            folder = image.get("filepath", "")
            if len(captions) == len(sentences) and all(isinstance(text, str) for text in (folder, *captions)):
                return split, folder, name, captions
    return None


class Tfds:
    """A split of a TFDS data set stored as ArrayRecord: NAME/SPLIT. Without texts, captions are `CLASS_CAPTION`.

    The label is the feature "label"; NAME/SPLIT#FEATURE names another, NAME/SPLIT#len:FEATURE takes its length.
    """

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK  # reading one by one takes several times as long
    templates = None

    def __init__(self, rest: str, data: DataConfig):
        import tensorflow_datasets as tfds  # slow to import, and not every source needs it

        rest, _, label = rest.partition("#")
        name, _, split = rest.rpartition("/")
        if not name:
            raise UserError("expected tfds:NAME/SPLIT")
        folder = data.tfds_dir or tfds.core.constants.DATA_DIR
        command = f"tfds build {name} --file_format=array_record --data_dir={folder}"

        def refuse(reason):
            return UserError(
                f"cannot be read from {folder} (config.data.tfds_dir): {reason} "
                f"Prepare it: `{command}` (which needs TensorFlow)"
            )

        def ask_tfds(call: Callable[..., Any], *arguments, **keywords):
            try:
                return call(*arguments, **keywords)
            except Exception as error:  # TFDS raises many kinds for a data set that is missing or has another format
                raise refuse(str(error).partition("\n")[0]) from error

        own, _, size = name.partition("/")
        if own == "emoji":
            from flip_jax.data import emoji

            builder = emoji.prepare(data.tfds_dir, size or "64")
        else:
            builder = ask_tfds(tfds.builder, name, data_dir=data.tfds_dir or None)
        if not builder.info.splits:
            raise refuse("it is missing.")
        # Raw bytes: TFDS takes ten times as long to convert what it has parsed to NumPy arrays as to parse it.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._rows = ask_tfds(builder.as_data_source, split, deserialize_method=raw)
        first = example(ask_tfds(self._rows.__getitem__, 0))
        if first is None:
            raise refuse("its first record is not a tf.train.Example.")
        features = builder.info.features
        self._label, self._counts = label.removeprefix("len:") or "label", label.startswith("len:")
        if self._counts:
            self.class_names = [str(count) for count in range(MAX_COUNT)]
        else:
            feature = features[self._label] if self._label in features else None
            self.class_names = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
        if label and (not self.class_names or self._label not in first):
            raise UserError(f"has no label {label!r}; its features are {', '.join(first)}")
        self._image = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
        self._text = next((key for key in data.captions if key in first), None)
        self.caption_names = (f"feature {self._text!r}" if self._text else "the class names",)
        if not self._image or not (self._text or self.class_names):
            raise UserError(
                f"needs an image, and {' or '.join(data.captions)} (config.data.captions) or a class label; has "
                f"{', '.join(features)}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Reads the picked records."""
        stored = self._rows.__getitems__([index for index, _ in picks])
        for (index, epoch), row in zip(picks, stored, strict=True):
            fields = example(row)
            if fields is None:
                yield {"key": str(index), "epoch": epoch, "bad": "not an Example"}, END
                continue
            values = fields.get(self._label, []) if self.class_names else []
            label = len(values) if self._counts else next(iter(values), None)
            texts = fields.get(self._text) or []
            # The test splits of some data sets have label -1, which is no class.
            if not self._text and label is not None and 0 <= label < len(self.class_names):
                texts = [CLASS_CAPTION.format(self.class_names[label].replace("_", " "))]
            image = next(iter(fields.get(self._image, ())), None)
            yield {"key": example_key(fields, index), "epoch": epoch} | sample(image, [texts], label), END
