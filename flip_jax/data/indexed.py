"""Sources whose records are read by number: CSV, a folder for each class, Karpathy's JSON and TFDS."""

import csv
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator

from flip_jax.config import DataConfig
from flip_jax.data import paths
from flip_jax.data.records import CHUNK, END, IMAGES, MAX_IMAGE, MAX_TEXT, Pick, Record, example, example_key, sample

_log = logging.getLogger(__name__)

MAX_COUNT = 100  # of what a picture has, where that is its label
CLASS_CAPTION = "a photo of a {}."  # for TFDS sets without text
PATH_COLUMNS = ("filepath", "path", "image", "image_path", "file_name", "filename", "url")


class _Files:
    """Records that are held in memory, and whose pictures are read as they are needed."""

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK
    class_names: list[str] | None = None
    templates = None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The picked records."""
        for index, epoch in picks:
            path, captions, label = self._row(index)
            key = path.encode(errors="replace").decode()
            yield {"key": key, "epoch": epoch} | sample(_picture(path), captions, label), END


class Csv(_Files):
    """CSV files, or TSV by their names, with a header: the path of a picture in one of `PATH_COLUMNS`, and captions.

    A relative path starts at the CSV's folder. All rows are held in memory, the pictures are read as they are needed.
    """

    def __init__(self, pattern: str, data: DataConfig):
        import pyarrow

        csv.field_size_limit(MAX_TEXT)
        chunks, kind = [], pyarrow.list_(pyarrow.large_binary())  # far smaller than Python's strings
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
                    raise ValueError(
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
    """A folder for each class, with the class's pictures: labels are the places of the sorted names of the folders."""

    def __init__(self, folder: str, data: DataConfig):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder} is no folder; it needs a folder for each class")
        self.class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self._rows = [
            (os.path.join(folder, name, file), label)
            for label, name in enumerate(self.class_names)
            for file in sorted(os.listdir(os.path.join(folder, name)))
            if file.rpartition(".")[2].lower() in IMAGES
        ]
        if not self._rows:
            raise ValueError(f"{folder} has {len(self.class_names)} folders, no picture ({', '.join(IMAGES)})")

    def _row(self, index):
        path, label = self._rows[index]
        return path, [], label


class Karpathy(_Files):
    """A split of Karpathy's JSON of COCO or Flickr30k, FILE.json#SPLIT: pictures with several captions each.

    A picture is FILEPATH/FILENAME, or FILENAME, in the folder of the JSON; or in another: FILE.json#SPLIT#FOLDER.
    """

    def __init__(self, rest: str, data: DataConfig):
        file, _, place = rest.partition("#")
        split, _, folder = place.partition("#")
        folder = os.path.abspath(folder or os.path.dirname(file))
        if not os.path.isfile(file) or not split:
            raise ValueError(f"expected karpathy:FILE.json#SPLIT with a file that is there; got {file!r} and {split!r}")
        try:
            with open(file, encoding="utf-8") as text:
                rows = [
                    (
                        image["split"],
                        image.get("filepath", ""),
                        image["filename"],
                        [x["raw"] for x in image["sentences"]],
                    )
                    for image in json.load(text)["images"]
                ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is not as Karpathy's: images with split, filename and sentences: {error!r}"
            ) from error
        self._folder, self._rows = folder, [row[1:] for row in rows if row[0] == split]
        if not self._rows:
            raise ValueError(f"{file} has no split {split!r}, but {', '.join(sorted({row[0] for row in rows}))}")

    def _row(self, index):
        subfolder, name, captions = self._rows[index]
        path = f"{self._folder}/{subfolder}/{name}" if subfolder else f"{self._folder}/{name}"
        return path if os.path.isfile(path) else f"{self._folder}/{name}", [captions], None


def _located(name, folder):
    """The path of a picture that a CSV in `folder` names."""
    return name if not name or not folder or paths.is_remote(name) or name.startswith("/") else f"{folder}/{name}"


def _picture(path):
    """The bytes of a picture's file, None if it cannot be read."""
    if ".." in path.split("/") or not (paths.is_remote(path) or os.path.isfile(path)):
        return None
    try:
        with paths.open_file(path) as file:
            return file.read(MAX_IMAGE + 1)
    except Exception as error:  # clients of remote stores have errors of their own kinds
        _log.warning("%s: %s", path, error)
        return None


def rows(text: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """The rows of the lines of a file, but empty ones; [""] for a line with a field above csv.field_size_limit.

    A quote that is left open, or closed before the field ends, is read with its line alone and swallows no other row.
    """
    text, again, taken = iter(text), [], []

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
    """A split of a TFDS set that is stored as ArrayRecord: NAME/SPLIT. Without texts they are `CLASS_CAPTION`.

    The label is the feature "label", or as said by NAME/SPLIT#FEATURE, or NAME/SPLIT#len:FEATURE: how many it has.
    """

    window, interleave = CHUNK, 2  # the schedule has shuffled all records already
    at_once = CHUNK  # one by one takes several times as long
    templates = None

    def __init__(self, rest: str, data: DataConfig):
        import tensorflow_datasets as tfds  # slow to import, and not every source needs it

        rest, _, label = rest.partition("#")
        name, _, split = rest.rpartition("/")
        if not name:
            raise ValueError("expected tfds:NAME/SPLIT")
        command, needs = f"tfds build {name} --file_format=array_record", " (which needs TensorFlow)"
        if re.split("[/:]", name)[0] == "emoji":
            import flip_jax.data.emoji  # noqa: F401  registers the set

            command, needs = "python -m flip_jax.data.emoji", ""
        try:
            builder = tfds.builder(name, data_dir=data.tfds_dir or None)
            if not builder.info.splits:
                raise ValueError("it is not there.")
            # TFDS takes ten times as long to turn what it has parsed into NumPy arrays as to parse it.
            self._rows = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
            first = example(self._rows[0])
        except (ValueError, NotImplementedError, AssertionError, OSError, LookupError) as error:
            folder, reason = data.tfds_dir or tfds.core.constants.DATA_DIR, str(error).partition("\n")[0]
            raise ValueError(
                f"cannot be read from {folder} (config.data.tfds_dir): {reason} "
                f"Prepare it: `{command} --data_dir={folder}`{needs}"
            ) from error
        features = builder.info.features
        self._label, self._counts = label.removeprefix("len:") or "label", label.startswith("len:")
        if self._counts:
            self.class_names = [str(count) for count in range(MAX_COUNT)]
        else:
            feature = features[self._label] if self._label in features else None
            self.class_names = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
        if label and (not self.class_names or self._label not in first):
            raise ValueError(f"has no label {label!r}; its features are {', '.join(first)}")
        self._image = next((key for key, feature in features.items() if isinstance(feature, tfds.features.Image)), None)
        self._text = next((key for key in data.captions if key in first), None)
        if not self._image or not (self._text or self.class_names):
            raise ValueError(
                f"needs an image, and {' or '.join(data.captions)} (config.data.captions) or a class label; has "
                f"{', '.join(features)}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, picks: list[Pick], offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The picked records."""
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
