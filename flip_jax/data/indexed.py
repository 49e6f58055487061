"""Sources read by record number: CSV, one folder per class, Karpathy's JSON and TFDS."""

import csv
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flip_jax.config import DataConfig
from flip_jax.data import paths
from flip_jax.data.records import CHUNK, END, IMAGES, MAX_IMAGE, MAX_TEXT, Pick, Record, example, example_key, sample
from flip_jax.runtime import UserError

_log = logging.getLogger(__name__)

MAX_COUNT = 100  # largest label where the label is a number of objects
CLASS_CAPTION = "a photo of a {}."  # for TFDS data sets without text
PATH_COLUMNS = ("filepath", "path", "image", "image_path", "file_name", "filename", "url")


class _Files:
    """Records that are held in memory; their images are read when needed."""

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK
    class_names: list[str] | None = None
    templates = None
    _rows: list[Any]

    def _row(self, index: int) -> tuple[str, list[str], int | None]:
        """Returns an image's path, its captions and its class, which a subclass knows."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Reads the picked records."""
        for index, epoch in picks:
            path, captions, label = self._row(index)
            key = path.encode(errors="replace").decode()
            yield {"key": key, "epoch": epoch} | sample(_image(path), captions, label), END


class Csv(_Files):
    """CSV or TSV files with a header: the path of an image in one of `PATH_COLUMNS`, and captions.

    A relative path starts at the CSV's folder. All rows are held in memory; the images are read when needed.
    """

    def __init__(self, pattern: str, data: DataConfig):
        import pyarrow

        csv.field_size_limit(MAX_TEXT)
        chunks, kind = [], pyarrow.list_(pyarrow.large_binary())  # takes far less memory than Python's strings
        for path in paths.expand(pattern):
            delimiter = "\t" if path.endswith(".tsv") else ","
            with (
                paths.open_file(path) as file,
                io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text,
            ):
                lines = rows(text, delimiter)
                names = next(lines, [])
                image = [names.index(name) for name in PATH_COLUMNS if name in names][:1]
                captions = [names.index(name) for name in data.captions if name in names]
                if not image or not captions:
                    raise UserError(
                        f"{path} needs a column {' or '.join(PATH_COLUMNS)}, and {' or '.join(data.captions)} "
                        f"(config.data.captions); has {', '.join(names)}"
                    )
                # Absolute, so that ".." can only come from a row.
                folder = path.rpartition("/")[0] if paths.is_remote(path) else os.path.dirname(os.path.abspath(path))
                while some := list(itertools.islice(lines, 2**16)):
                    fields = ([row[i] if i < len(row) else "" for i in image + captions] for row in some)
                    located = ([_located(name, folder), *texts] for name, *texts in fields)
                    encoded = [[value.encode("utf-8", "surrogateescape") for value in row] for row in located]
                    chunks.append(pyarrow.array(encoded, kind))
        self._rows = pyarrow.concat_arrays(chunks) if chunks else []

    def _row(self, index):
        name, *captions = self._rows[index].as_py()
        return name.decode(errors="surrogateescape"), captions, None


class Folder(_Files):
    """One folder of images per class; the label is the position among the sorted names of the folders."""

    def __init__(self, folder: str, data: DataConfig):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder; it needs one folder per class")
        self.class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self._rows = [
            (os.path.join(folder, name, file), label)
            for label, name in enumerate(self.class_names)
            for file in sorted(os.listdir(os.path.join(folder, name)))
            if file.rpartition(".")[2].lower() in IMAGES
        ]
        if not self._rows:
            raise UserError(f"{folder} has {len(self.class_names)} folders but no images ({', '.join(IMAGES)})")

    def _row(self, index):
        path, label = self._rows[index]
        return path, [], label


class Karpathy(_Files):
    """A split of Karpathy's JSON of COCO or Flickr30k, FILE.json#SPLIT: images with several captions each.

    An image is FILEPATH/FILENAME, or FILENAME, in the folder of the JSON, or in FOLDER: FILE.json#SPLIT#FOLDER.
    """

    def __init__(self, rest: str, data: DataConfig):
        file, _, rest = rest.partition("#")
        split, _, folder = rest.partition("#")
        folder = os.path.abspath(folder or os.path.dirname(file))
        if not os.path.isfile(file) or not split:
            raise UserError(f"expected karpathy:FILE.json#SPLIT with an existing file; got {file!r} and {split!r}")
        with open(file, "rb") as opened:
            content = opened.read()
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON: {error}") from error
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


def _located(name, folder):
    """Returns the path of an image that a CSV in `folder` names."""
    return name if not name or not folder or paths.is_remote(name) or name.startswith("/") else f"{folder}/{name}"


def _image(path):
    """Reads the bytes of an image's file; None if it cannot be read."""
    if ".." in path.split("/") or not (paths.is_remote(path) or os.path.isfile(path)):
        return None
    try:
        with paths.open_file(path) as file:
            return file.read(MAX_IMAGE + 1)
    except OSError as error:
        _log.warning("%s: %s", path, error)
        return None


def rows(text: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Iterates over the non-empty rows of a CSV file; [""] for a line with a field above csv.field_size_limit.

    A quote that is left open, or closed before the field ends, spoils only its own line: the lines that a strict
    parser took in search of the closing quote are read again.
    """
    text, again, taken = iter(text), [], []  # again: lines to read once more; taken: lines of the present row

    def lines():
        while line := again.pop() if again else next(text, ""):
            taken.append(line)
            yield line

    while True:
        taken.clear()
        try:
            row = next(csv.reader(lines(), delimiter=delimiter, strict=True), None)
        except csv.Error:
            again += reversed(taken[1:])
            try:
                row = next(csv.reader(taken[:1], delimiter=delimiter))
            except csv.Error:
                row = [""]
        if row is None:
            return
        if row:
            yield row


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
            values = fields.get(self._label, []) if self.class_names else [None]
            label = len(values) if self._counts else values[0]
            texts = fields.get(self._text) or []
            if not self._text:
                texts = [CLASS_CAPTION.format(self.class_names[label].replace("_", " "))]
            image = next(iter(fields[self._image]), None)
            yield {"key": example_key(fields, index), "epoch": epoch} | sample(image, [texts], label), END
