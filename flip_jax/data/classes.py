"""Which class a label of a source means: the one place where class names are compared."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from flip_jax.config import Config
from flip_jax.runtime import UserError

SHOWN = 5  # names in a message
MAX_NUMBER = 10**6  # a class name above is an identifier, not the number of a label


class ClassList(NamedTuple):
    """Classes in the order of a model's or a data set's labels, and `whose` names they are.

    `own` are a data set's own names for them, () where it has no others. With `partial`, a source may have classes
    outside the list, which are ignored, as long as it has all of the list.
    """

    names: tuple[str, ...]
    whose: str
    own: tuple[str, ...] = ()
    partial: bool = False


class Match(NamedTuple):
    """The class of each label of a source, -1 where the list has none, and how it was found, for people.

    With `ignores`, labels without a class are those of named classes outside the list.
    """

    index: np.ndarray
    how: str
    ignores: bool = False


def spaced(names: Iterable[str] | None) -> tuple[str, ...]:
    """Returns class names as people read them; folders and TFDS write underscores."""
    return tuple(name.replace("_", " ") for name in names or ())


def are_numbers(names: Sequence[str]) -> bool:
    """Tells whether all names are whole numbers, with or without leading zeros."""
    return bool(names) and all(name.isascii() and name.isdigit() for name in names)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts the names of folders: by size if all are whole numbers, else as text."""
    names = sorted(names)
    return sorted(names, key=int) if are_numbers(names) else names


def match(source: str, names: Sequence[str] | None, wanted: ClassList, empty: Sequence[str] = ()) -> Match:
    """Finds the class of each label of a source on a list; `names` are the source's own names, None if it has none.

    Names are compared exactly, then without case and punctuation. Only numbers are matched in another way: folders
    named by numbers in numeric order, the label numbers of a source without names along the list. `empty` are folders
    without images, which show where numbers begin and end.

    Raises:
      UserError: the names do not fit; the message has those of both sides.
    """
    count, whose = len(wanted.names), wanted.whose
    if names is None:
        return _count_along(wanted)
    if spaced(names) == spaced(wanted.names):  # they may be repeated: ImageNet has two classes called "missile"
        return Match(np.arange(count), f"{count} classes, matched by name with {whose}")
    for key in (_exact, _simplified):
        for listed in (wanted.own, wanted.names):
            index = _by_name(key, names, listed, wanted.partial)
            if index is not None:
                ignored = f", {(index < 0).sum()} other classes ignored" if (index < 0).any() else ""
                how = f"{len(names)} classes, matched by name with the {count} of {whose}{ignored}"
                return Match(index, how, ignores=True)
    if are_numbers(names) and not are_numbers(wanted.own or wanted.names):
        index = _by_number(names, empty, count)
        if index is not None:
            order = f"{names[0]} = {wanted.names[index[0]]} ... {names[-1]} = {wanted.names[index[-1]]}"
            return Match(index, f"{len(names)} classes, matched in numeric order with the {count} of {whose}: {order}")
    raise UserError(_refusal(source, names, wanted))


def trained(config: Config) -> tuple[str, ...]:
    """Returns the class names of the training data in the order of the labels, () if these are only numbers.

    Raises:
      UserError: the sources have different classes, or more than `config.finetune.classes`.
    """
    from flip_jax.data import pipeline  # it imports JAX, which worker processes do not need

    count, named = config.finetune.classes, [x.class_names for _, x in pipeline.open_mixture(config) if x.class_names]
    if not named:
        return ()
    for names in named[1:]:
        if names != named[0]:
            raise UserError(
                f"the sources of config.data.train {config.data.train!r} number different classes: {_shown(named[0])}; "
                f"and {_shown(names)}. Give all the same class names in the same order"
            )
    if are_numbers(named[0]):  # a range of possible labels is no list of classes
        return tuple(named[0][:count])
    if len(named[0]) > count:
        raise UserError(
            f"config.finetune.classes {count} is less than the {len(named[0])} classes of config.data.train: "
            f"{_shown(named[0])}"
        )
    return tuple(named[0])


def check_unchanged(names: tuple[str, ...], step: epath.Path) -> None:
    """Raises UserError if the labels of the training data meant other classes when a step was saved."""
    from flip_jax import weights  # it imports JAX, which worker processes do not need

    saved = weights.read_class_names(step)
    if saved is not None and saved != names:
        changed = next((i for i, pair in enumerate(zip(saved, names, strict=False)) if pair[0] != pair[1]), None)
        where = min(len(saved), len(names)) if changed is None else changed
        raise UserError(
            f"the classes of config.data.train have changed since {step} was written, first label {where}: "
            f"{saved[where : where + 1]} then, {names[where : where + 1]} now ({len(saved)} and {len(names)} classes). "
            "Restore the class folders, or start a new run with config.init_from"
        )


def _count_along(wanted):
    """Matches label numbers, to a class that is called so or else to the place on the list."""
    count = len(wanted.names)
    numbers = next((names for names in (wanted.names, () if wanted.partial else wanted.own) if are_numbers(names)), ())
    if not numbers or max(map(int, numbers)) > MAX_NUMBER:
        return Match(np.arange(count), f"the source's label numbers count along {wanted.whose} ({count})")
    index = np.full(max(map(int, numbers)) + 1, -1)
    index[[int(number) for number in numbers]] = np.arange(count)
    return Match(index, f"the source's label numbers are the numbers of {wanted.whose} ({count})")


def _by_name(key: Callable[[str], str], names, listed, partial):
    place = {key(name): i for i, name in enumerate(listed)}
    keys = [key(name) for name in names]
    if len(place) < len(listed) or len(set(keys)) < len(keys):
        return None  # this way of comparing takes two classes for one
    index = np.array([place.get(name, -1) for name in keys])
    complete = partial and (index >= 0).sum() == len(listed) > 0
    return index if complete or (index >= 0).all() else None


def _by_number(names, empty, count):
    numbers = [int(name) for name in names]
    every = sorted(numbers + [int(name) for name in empty if are_numbers([name])])
    if len(set(every)) < len(every):  # 1 and 01
        return None
    if len(every) == count:
        return np.searchsorted(every, numbers)
    # Classes may be missing, but without a 0 the first could be called 0 or 1.
    return np.array(numbers) if every[0] == 0 and every[-1] < count else None


def _exact(name):
    return unicodedata.normalize("NFC", name.replace("_", " "))  # macOS splits accents from their letters


def _simplified(name):
    """Keeps letters without accents, in lower case, and digits; copies of a data set differ in the rest."""
    if are_numbers([name]):
        return str(int(name))
    return "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if c.isalnum()) or name


def _refusal(source, names, wanted):
    listed = wanted.own or wanted.names
    keys = [{_simplified(name) for name in side} for side in (names, (*wanted.own, *wanted.names))]
    foreign = [name for name in names if _simplified(name) not in keys[1]]
    absent = [a for a, b in zip(listed, wanted.names, strict=True) if not {_simplified(a), _simplified(b)} & keys[0]]
    return (
        f"{source!r} has other classes than {wanted.whose}: {_shown(names)}; wanted {_shown(listed)}. Only in the "
        f"source: {_shown(foreign)}. Missing in the source: {_shown(absent)}. Labels are matched by name: rename one "
        'side, or give a JSON file, {"NAME IN THE SOURCE": "CLASS NAME", ...}, as config.eval.classnames'
    )


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" ... {len(names)} in all" if len(names) > SHOWN else "") if names else "none"
