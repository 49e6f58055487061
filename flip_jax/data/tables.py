"""Tables with a row per image or caption: CSV files, held in memory, and Parquet files, read from front to back."""

import csv
import functools
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flip_jax import untrusted
from flip_jax.config import DataConfig
from flip_jax.data import fingerprint, indexed, paths, shards
from flip_jax.data.content import json_object, sample
from flip_jax.data.records import MAX_TEXT
from flip_jax.runtime import UserError

# Names of columns are compared without case, blanks, "_" and "-".
PATHS = ("filepath", "path", "image", "image_path", "image_name", "img_path", "file_name", "filename", "url")
LABELS = ("label", "class", "cls")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
MAX_CLASSES = 2**16  # more different labels than these are texts
_ESCAPED = re.compile("[\udc80-\udcff]")  # how bytes that are not UTF-8 were read
_FIELD = r"(?:^|[{0}]) *[^{0}\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?) *(?:[{0}]|$)"  # an image's path, and nothing else


def simple(name: str) -> str:
    """Returns a column's name as it is compared."""
    return re.sub(r"[\s_-]", "", name.strip("\ufeff").casefold())


def find(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Lists the columns that have a wanted name, in the order of the wanted ones."""
    by_name = {simple(name): name for name in reversed(list(names))}
    found = [by_name[simple(name)] for name in wanted if simple(name) in by_name]
    return list(dict.fromkeys(found))


class Csv(indexed.Files):
    """CSV or TSV files with a header: the path of an image in one of `PATHS`, captions, and perhaps a label.

    A relative path starts at the CSV's folder. Rows that name the same image are one image with several captions. All
    rows are held in memory; the images are read when needed.
    """

    def __init__(self, pattern: str, data: DataConfig):
        csv.field_size_limit(MAX_TEXT)
        self.paths = paths.expand(pattern)
        self._data = paths.may_name_urls(data, self.paths[0])
        columns: list[list[Any]] = [[], [], []]  # the path, the caption and the label of each row, in chunks
        self._alone: list[int] = []  # rows that are never joined with others, because they are no pair
        self.without_captions = ""
        for path in self.paths:
            names, self.without_captions = self._read(path, columns)
            self.caption_names = self.caption_names or names
        self._group(columns)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies the files wherever they are."""
        return fingerprint.of(self.paths)

    def _read(self, path, columns):
        """Appends the rows of a file; returns the columns with captions, or "" and all columns."""
        with paths.open_file(path) as file, _text(paths.decompress(file), path) as opened:
            text = untrusted.lines(opened, path)
            first = next(filter(str.strip, text), "")
            separator, names = _header(path, first, self._data)
            image, captions, label = _wanted(names, self._data)
            if not image or not (captions or label):
                raise UserError(_no_columns(path, names, separator, self._data))
            places = [[names.index(name) for name in some] for some in (image, captions, label)]
            folder, lines = paths.folder_of(path), rows(text, separator, f"{separator} " in first)
            start = sum(map(len, columns[0]))
            while some := list(itertools.islice(lines, 2**16)):
                fields = [[[row[i] for i in place if i < len(row)] for place in places] for row in some]
                _append(columns[0], (paths.located("".join(found), folder) for found, _, _ in fields))
                _append(columns[1], (next(filter(str.strip, found), "") for _, found, _ in fields))
                _append(columns[2], ("".join(found).strip() for _, _, found in fields))
                bad = (
                    not found or not found[0].strip() or any(map(_ESCAPED.search, some)) for found, some, _ in fields
                )
                self._alone += (row for row, alone in enumerate(bad, start) if alone)
                start += len(fields)
        if captions:
            return (f"column {' or '.join(map(repr, captions))}",), ""
        return (), f"{path} has columns {', '.join(map(repr, names))}"

    def _group(self, columns):
        """Turns columns of rows into columns of images, in the order of their first rows."""
        import pyarrow

        binary = pyarrow.large_binary()
        path, caption, label = (
            pyarrow.concat_arrays(column) if column else pyarrow.array([], binary) for column in columns
        )
        self._labels, self.class_names = _labels(label)
        count, captions = len(path), bool(self.caption_names)
        codes = path.dictionary_encode()
        number, distinct = codes.indices.to_numpy().astype(np.int64), len(codes.dictionary)
        if captions and distinct < count:
            number[self._alone] = distinct + np.array(self._alone, np.int64)
            # A row with another label is no other caption of the same.
            label_number = label.dictionary_encode().indices.to_numpy().astype(np.int64)
            number = number * (int(label_number.max(initial=0)) + 1) + label_number
            _, first, group, sizes = np.unique(number, return_index=True, return_inverse=True, return_counts=True)
            by_place = np.argsort(first, kind="stable")
            rank = np.empty_like(by_place)
            rank[by_place] = np.arange(len(by_place))
            order = np.argsort(rank[group], kind="stable")
            first, sizes = first[by_place], sizes[by_place]
            caption, path = caption.take(pyarrow.array(order)), path.take(pyarrow.array(first))
            self._labels = None if self._labels is None else self._labels[first]
        else:
            sizes = np.ones(count, np.int64)
        self._rows = path
        self._captions = pyarrow.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(sizes)]), caption)

    def _row(self, index):
        label = None if self._labels is None else int(self._labels[index])
        captions = self._captions[index].as_py()
        return os.fsdecode(self._rows[index].as_py()), [captions], None if label == -1 else label


def _wanted(names, data):
    """Returns the columns with images (one at most), captions and labels (one at most)."""
    image = find(names, [data.image] if data.image else PATHS)[:1]
    captions, label = (find([name for name in names if name not in image], some) for some in (data.captions, LABELS))
    return image, captions, label[:1]


def _header(path, line, data):
    """Returns the separator of a file and the names of its columns, from its first line."""
    ending = os.path.splitext(re.sub(r"\.(gz|bz2|xz|zst|lz4)$", "", path.lower()))[1]
    usual = "\t" if ending in (".tsv", ".tab") else ","
    headers = {}
    for separator in dict.fromkeys([usual, *SEPARATORS]):
        names = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        image, captions, label = _wanted(names, data)
        if image and (captions or label):
            return separator, names
        headers[separator] = names
    best = max(headers, key=lambda separator: len(headers[separator]))
    return best, headers[best]


def _no_columns(path, names, separator, data):
    """Says which columns a file needs, and which it has."""
    has = ", ".join(repr(name[:100].encode(errors="replace").decode()) for name in names[:20])
    image, captions, label = _wanted(names, data)
    images = f"a column with paths of images: {data.image or ' or '.join(PATHS)}; name another in config.data.image"
    texts = f"captions or labels: {', '.join((*data.captions, *LABELS))}; name others in config.data.captions"
    lacks = " and ".join(([] if image else [images]) + ([] if captions or label else [texts]))
    return f"{path} lacks {lacks}. The names in its first line, separated by {SEPARATORS[separator]}, are {has}"


def _text(file, path):
    """Opens a text file in UTF-8, or in UTF-16 or UTF-32 where its first bytes say so."""
    head, encoding = file.read(256), "utf-8-sig"
    file.seek(0)
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "utf-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in head:
        raise UserError(f"{path} is not UTF-8 text; if it is UTF-16 without a mark at its start, save it as UTF-8")
    return io.TextIOWrapper(file, encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace", newline="")


def _append(chunks, texts):
    """Adds a chunk of texts, as bytes in an Arrow array, which take far less memory than Python's strings."""
    import pyarrow

    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    chunks.append(pyarrow.array(encoded, pyarrow.large_binary()))


def _labels(column):
    """Returns the label of each row, -1 for none, and the class names if the labels are names; None where none is."""
    names = [value.as_py().decode(errors="replace") for value in column.unique().slice(0, MAX_CLASSES + 1)]
    if len(names) > MAX_CLASSES or not any(names):
        return None, None
    if all(name.isascii() and name.isdigit() and len(name) < 10 for name in names if name):
        number, class_names = {name: int(name) for name in names if name}, None
    else:
        class_names = sorted(filter(None, names))
        number = {name: i for i, name in enumerate(class_names)}
    codes = column.dictionary_encode()
    table = [number.get(value.as_py().decode(errors="replace"), -1) for value in codes.dictionary]
    return np.array(table, np.int64)[codes.indices.to_numpy()], class_names


def rows(text: Iterable[str], separator: str, blanks: bool = False) -> Iterator[list[str]]:
    """Iterates over the non-empty rows of a CSV file; [""] for a line with a field above csv.field_size_limit.

    A quote that is left open, or closed before the field ends, spoils only its own line: the lines that a strict
    parser took in search of the closing quote are read again. So are those of a field over several lines that holds
    rows of its own. Between tabs, such a quote is a character like others. With `blanks`, those after a separator are
    ignored.
    """
    text, again, taken = iter(text), [], []  # again: lines to read once more; taken: lines of the present row
    swallowed = re.compile(_FIELD.format(re.escape(separator)), re.IGNORECASE | re.MULTILINE)

    def lines():
        while line := again.pop() if again else next(text, ""):
            taken.append(line)
            yield line

    def is_wrong(field):
        """Tells whether a field holds rows: lines of which one is divided and has an image's path."""
        several = re.search(r"[\r\n]", field.strip())
        return several and separator in field and (separator == "\t" or swallowed.search(field.replace("\r", "\n")))

    for line in lines():
        row: list[str] | None = None
        if '"' in line:
            again.append(taken.pop())
            taken.clear()
            try:
                row = next(csv.reader(lines(), delimiter=separator, skipinitialspace=blanks, strict=True), [])
            except csv.Error:
                row = None
            if row is None or any(map(is_wrong, row) if len(taken) > 1 else ()):
                again += reversed(taken[1:])
                line, row = taken[0], None
                if separator != "\t":
                    try:
                        row = next(csv.reader([line], delimiter=separator, skipinitialspace=blanks), [])
                    except csv.Error:
                        row = [""]
        taken.clear()
        if row is None:
            row = line.rstrip("\r\n").split(separator) if line.strip("\r\n") else []
            row = [field.lstrip(" ") for field in row] if blanks else row
            if len(line) > MAX_TEXT and any(len(field) > MAX_TEXT for field in row):
                row = [""]
        if row:
            yield row


class Parquet(shards.Shards):
    """Parquet files with a row per image, as img2dataset and Hugging Face write them. Offsets are rows.

    Images are encoded bytes, the structs of bytes or path that Hugging Face writes, or paths, which start at the file's
    folder; in the column that `data.image` names, else in one with a usual name, else in the first that Hugging Face's
    description or its type calls an image. Consecutive rows with the same image are one image with several captions.
    """

    def _samples(self, file, offset, path):
        import pyarrow  # slow to import, and not every source needs it

        try:
            yield from self._rows(file, offset, paths.folder_of(path))
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # a damaged file, or one read badly
            raise OSError(f"{type(error).__name__}: {error}") from error

    @functools.cached_property
    def _first(self):
        """The columns of the first file: `_columns`; None if it cannot be read, which shows where it is read."""
        import pyarrow
        from pyarrow import parquet

        try:
            with paths.open_file(self.paths[0]) as file:
                return self._columns(parquet.ParquetFile(file).schema_arrow)
        except (OSError, pyarrow.ArrowException, shards.Damaged):
            return None

    @property
    def class_names(self):
        return self._first and self._first[3]

    @property
    def caption_names(self):
        return [f"column {name!r}" for name in self._first[1]] if self._first else ()

    @property
    def without_captions(self):
        return self._first[4] if self._first and not self._first[1] else ""

    def _columns(self, schema):
        """Finds the columns: image, captions, label, the label's class names, and all with their types as text."""
        described: Any = json_object((schema.metadata or {}).get(b"huggingface", b""))
        for key in ("info", "features"):
            described = described.get(key) if isinstance(described, dict) else None
        described = {k: v for k, v in described.items() if isinstance(v, dict)} if isinstance(described, dict) else {}
        types = {field.name: _kind(field.type) for field in schema}
        has = ", ".join(f"{name!r} ({field.type})" for name, field in zip(types, schema, strict=True))
        usual = find([name for name in types if types[name] == "bytes"], shards.IMAGE_FIELDS)
        usual += [name for name, feature in described.items() if feature.get("_type") == "Image" and name in types]
        usual += [field.name for field in schema if _is_struct(field.type)]
        # img2dataset's lists of URLs are no images here.
        usual += find([name for name in types if types[name] == "text"], [name for name in PATHS if name != "url"])
        images = find(types, [self._data.image]) if self._data.image else usual
        if not images:
            wanted = self._data.image or ", ".join(shards.IMAGE_FIELDS)
            raise shards.Damaged("missing column", f"wanted an image in {wanted} (config.data.image); has {has}")
        texts = [name for name in types if types[name] in ("text", "bytes") and name != images[0]]
        captions = find(texts, self._data.captions)
        captions += [name for name in self._data.captions if "/" in name and name.partition("/")[0] in types]
        labels = find([name for name in types if types[name] == "int"], LABELS)
        labels += [name for name, feature in described.items() if feature.get("_type") == "ClassLabel"]
        class_names = described.get(labels[0], {}).get("names") if labels else None
        if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            class_names = None
        return images[0], captions, labels[0] if labels else None, class_names, has

    def _rows(self, file, offset, folder):
        from pyarrow import parquet

        from flip_jax.data import parquet_rows

        # Without these settings Arrow holds a whole row group in memory.
        table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        image, captions, label, _, _ = self._columns(table.schema_arrow)
        names = {image, "key", label, *(name.partition("/")[0] for name in captions)}
        shares = dict(zip(map(simple, self._captions), self._weights, strict=False))
        weights = [shares[simple(name)] for name in captions if shares]
        columns = [name for name in table.schema_arrow.names if name in names]

        def same(numbered):
            number, row = numbered
            if row is None:
                return number
            picture = _picture(row[image])
            # A row without an image, and one without captions to join, stands for itself.
            return (picture, row.get(label)) if captions and picture else number

        for _, some in itertools.groupby(enumerate(parquet_rows.read(file, table, columns, offset), offset), key=same):
            number, row = next(some)
            if row is None:
                yield str(number), {"bad": "too large"}, number + 1
                continue
            texts, last = [[_value(row, name)] for name in captions], number
            for last, other in some:  # noqa: B007, B031  the last row's number is used below
                for values, name in zip(texts, captions, strict=True):
                    values.append(_value(other, name))
            picture, value = _picture(row[image]), row.get(label)
            if isinstance(picture, str):
                picture = paths.read_image(paths.located(picture, folder), paths.may_name_urls(self._data, folder))
            if isinstance(picture, str):
                rest = {"bad": picture}
            elif isinstance(row[image], list) and len(row[image]) > 1:
                rest = {"bad": "several images"}
            else:
                rest = sample(picture, map(_flat, texts), None if value == -1 else value, weights)
            yield str(row.get("key") or number), rest, last + 1


def _picture(value):
    """Returns the bytes or the path of an image; None if there is none, or several."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value.get("bytes") or value.get("path") if isinstance(value, dict) else value


def _value(row, name):
    """Returns a row's value of a column, or of a field in it, COLUMN/FIELD, and in a list the field of each."""
    if name in row or "/" not in name:
        return row.get(name)
    column, _, field = name.partition("/")
    value = row.get(column)
    return [item.get(field) for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def _flat(values):
    """Lists the texts in values that are texts, or lists of them."""
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def _is_struct(type_):
    """Tells whether a type is the struct of bytes and path that Hugging Face writes for an image."""
    from pyarrow import types

    return types.is_struct(type_) and {field.name for field in type_} == {"bytes", "path"}


def _kind(type_):
    """Tells what a column may hold: "bytes" of images, "text", "int" or other."""
    from pyarrow import types

    if types.is_dictionary(type_):
        return _kind(type_.value_type)
    if (
        types.is_list(type_)
        or types.is_large_list(type_)
        or types.is_list_view(type_)
        or types.is_fixed_size_list(type_)
    ):
        inner = _kind(type_.value_type)
        return "other" if inner == "int" else inner
    if types.is_struct(type_):
        return "bytes" if _is_struct(type_) else "other"
    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_):
        return "bytes"
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return "text"
    return "int" if types.is_integer(type_) else "other"
