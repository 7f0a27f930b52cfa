"""Which class is which: ImageNet's names, those of a user's folders, class maps, and the names that a model carries."""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ClassNames:
    """What the classes of a model are called, by index ("" where it saw none), and how many images of each it saw.

    A checkpoint's config holds them as "classes" and "class_counts".
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, folders: Sequence[str], indices: Sequence[int], labels: Sequence[int], num_classes: int) -> ClassNames:
        """Those of data: the class index of each folder and of each image, as `ClassFolder` has them.

        Folders that share a class share its name: "tabby, tiger cat".
        """
        shared: list[list[str]] = [[] for _ in range(num_classes)]
        counts = [0] * num_classes
        for name, index in zip(folders, indices, strict=True):
            shared[index].append(name)
        for label in labels:
            counts[label] += 1
        return cls(tuple(", ".join(names) for names in shared), tuple(counts))

    @classmethod
    def from_config(cls, config: object, num_classes: int) -> ClassNames | None:
        """Those in a checkpoint's config; None where it holds none for so many classes."""
        if not isinstance(config, Mapping):
            return None
        names, counts = config.get("classes"), config.get("class_counts")
        if not (isinstance(names, list) and len(names) == num_classes and all(isinstance(n, str) for n in names)):
            return None
        if not (isinstance(counts, list) and len(counts) == num_classes and all(type(n) is int for n in counts)):
            counts = [0] * num_classes
        return cls(tuple(names), tuple(counts))

    def config(self) -> dict[str, list]:
        """What goes into a checkpoint's config."""
        return {"classes": list(self.names), "class_counts": list(self.counts)}

    @property
    def are_imagenets(self) -> bool:
        """Whether every name means the ImageNet class of its index, so that ImageNet's other names serve too."""
        return len(self.names) == IMAGENET_CLASSES and all(
            index in imagenet_indices(name) for index, name in enumerate(self.names) if name
        )


class Assignment(NamedTuple):
    """The class index of each class folder, in the order of the folders."""

    indices: list[int]
    note: str = ""  # what to tell the user: numbers that are no class indices were taken by their order
    renumbered: bool = False  # whether version 0.1, which sorted numbers as texts, took other classes


def class_index(name: str, num_classes: int, names: ClassNames | None = None) -> int:
    """The index of a class given as a number or as one of the model's `names` ("cat").

    For ImageNet models, those of 1000 classes whose names are not others, ImageNet's names ("golden retriever") and
    WordNet ids serve too. Raises ValueError for a number outside the model's classes, for a name of several classes,
    and for an unknown name with the nearest known ones.
    """
    text = name.strip()
    if re.fullmatch("-?[0-9]{1,18}", text):
        index = int(text)
        if not 0 <= index < num_classes:
            raise ValueError(f"class {index} is outside this model's classes 0 to {num_classes - 1}")
        return index
    imagenet = num_classes == IMAGENET_CLASSES and (names is None or names.are_imagenets)
    own = _by_name(names) if names is not None else {}
    if not own and not imagenet:
        raise ValueError(f"class {name!r}: a model of {num_classes} classes takes indices 0 to {num_classes - 1}")
    found = own.get(_plain(text)) or (imagenet_indices(text) if imagenet else [])
    if len(found) == 1:
        return found[0]
    kind = "ImageNet class" if imagenet else "class"
    if found:
        shown = ", ".join(map(str, found))
        raise ValueError(f"{name!r} names the {kind.replace('class', 'classes')} {shown}: expected an index")
    known = [*own, *(imagenet_names() if imagenet else ())]
    containing = sorted((other for other in known if text.lower() in other), key=len)[:3]
    near = list(dict.fromkeys(containing + get_close_matches(text.lower(), known, n=3, cutoff=0.5)))[:4]
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"{name!r} is no {kind} name or index{hint}")


def class_label(index: int, num_classes: int, names: ClassNames | None = None) -> str:
    """What stands under a picture: the model's own name of a class, else ImageNet's first one, else "class 3"."""
    if names is not None and names.names[index]:
        return names.names[index]
    if names is None and num_classes == IMAGENET_CLASSES:
        return _imagenet_classes()[index][1].split(", ")[0]
    return f"class {index}"


def assign_classes(
    folders: Sequence[str], num_classes: int | None, class_map: Mapping[str, int] | None = None
) -> Assignment:
    """The model's class index of each class folder.

    With a `class_map`, what it says. Folders that are all numbers below the number of classes mean those; for a model
    of ImageNet's 1000 classes, WordNet ids and class names mean theirs. As many folders as classes: in their order,
    that of `sort_folders`. Raises UnknownClasses otherwise: the order of a few folders would silently train the
    model's first classes.
    """
    count = num_classes or len(folders)
    if class_map is not None:
        return Assignment(_mapped(folders, class_map, count))
    numbers = [int(name) for name in folders] if _are_numbers(folders) else []
    if len(set(numbers)) == len(folders) and max(numbers) < count:
        return Assignment(numbers)
    reason = "and nothing says which of them they are"
    if num_classes == IMAGENET_CLASSES:
        found = [imagenet_indices(name) for name in folders]
        unknown = [name for name, indices in zip(folders, found, strict=True) if len(indices) != 1]
        if not unknown:
            return Assignment([indices[0] for indices in found])
        reason = f"and {', '.join(map(repr, unknown[:3]))} is no WordNet id or ImageNet class name"
    if len(folders) > count:
        raise UnknownClasses(f"the data has {len(folders)} class folders, the model {count} classes")
    if len(folders) < count:
        raise UnknownClasses(
            f"the data has {len(folders)} class folders, the model {count} classes, {reason}: in their order they "
            "would train classes 0, 1, ... in place of what they show"
        )
    order = sort_folders(folders)
    rank = {name: index for index, name in enumerate(order)}
    note = ""
    if numbers:
        note = (
            f"the class folders are numbers, but not those of the classes 0 to {count - 1}: they were taken by value, "
            f"folder {order[0]} is class 0, folder {order[-1]} is class {count - 1}"
        )
    return Assignment([rank[name] for name in folders], note, order != sorted(folders))


class UnknownClasses(ValueError):
    """Nothing says which of a model's classes the class folders are."""


def sort_folders(folders: Sequence[str]) -> list[str]:
    """Class folders in their order: by value where all are numbers, so that 2 comes before 10, else by name."""
    return sorted(folders, key=lambda name: (int(name), name)) if _are_numbers(folders) else sorted(folders)


def read_class_map(
    path: str | os.PathLike[str], num_classes: int = IMAGENET_CLASSES, names: ClassNames | None = None
) -> dict[str, int]:
    """A JSON file {folder name: class index, or class name of the model or of ImageNet}. Raises ValueError naming it.

    Names may come in composed (NFC) or decomposed (NFD) letters, as macOS writes them.
    """
    what = f"class map {os.fspath(path)!r}"
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, for ever
            raise ValueError("it is no file")
        with open(path, encoding="utf-8-sig") as file:  # Windows writes a byte order mark
            content = json.load(file, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {what}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{what} must be JSON like {{"folder": class index or class name}}')
    mapped = {}
    for folder, value in content.items():
        if isinstance(value, str):
            try:
                value = class_index(value, num_classes, names)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from None
        if type(value) is not int or value < 0:
            raise ValueError(f"{what}: {folder!r} maps to {str(value)[:80]!r}, not to a class index")
        mapped[folder] = value
    return mapped


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, list[int]]:
    """Every WordNet id, ImageNet class name and synonym in lower case -> the indices in 0..999 that it may mean.

    "crane" is a bird and a machine: such a name has several.
    """
    names: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, (identity, description) in enumerate(_imagenet_classes()):
        for name in (identity.lower(), description.lower()):
            names.setdefault(name, []).append(index)
        for synonym in description.lower().split(", "):
            synonyms.setdefault(synonym, []).append(index)
    return {**synonyms, **names}  # "partridge" is one class's name and another's synonym: it means the former


def imagenet_indices(name: str) -> list[int]:
    """The ImageNet classes that a name, also with _ for spaces, or WordNet id may mean."""
    text, names = name.strip().lower(), imagenet_names()
    return names.get(text) or names.get(text.replace("_", " ")) or names.get(text.replace(" ", "_")) or []


@lru_cache(maxsize=1)
def _imagenet_classes() -> list[tuple[str, str]]:
    """(WordNet id, names) of each of the 1000 classes: timm's, from its files where they lie, since timm takes seconds
    to import."""
    spec = find_spec("timm")
    info = Path(str(spec and spec.origin)).parent / "data" / "_info"
    try:
        with open(info / "imagenet_synset_to_lemma.txt", encoding="utf-8", newline="") as file:
            names = dict(csv.reader(file, delimiter="\t"))
        return [(each, names[each]) for each in (info / "imagenet_synsets.txt").read_text().split()]
    except (OSError, ValueError, KeyError):
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-1k")
        return [(each, known.label_name_to_description(each)) for each in known.label_names()]


def _are_numbers(folders: Sequence[str]) -> bool:
    return bool(folders) and all(re.fullmatch("[0-9]+", name) for name in folders)


def _plain(name: str) -> str:
    """A name as it is compared: composed letters, any case, spaces for underscores."""
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()


def _by_name(names: ClassNames) -> dict[str, list[int]]:
    """Own names, whole and as the parts of a shared name, as they are compared -> the indices they may mean."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names.names):
        for text in {_plain(part) for part in (name, *name.split(", ")) if part}:
            found.setdefault(text, []).append(index)
    return found


def _mapped(folders: Sequence[str], class_map: Mapping[str, int], num_classes: int) -> list[int]:
    composed = {unicodedata.normalize("NFC", name): index for name, index in class_map.items()}
    indices = []
    for folder in folders:
        index = composed.get(unicodedata.normalize("NFC", folder))
        if index is None:
            known = ", ".join(list(class_map)[:5])
            raise ValueError(f"class folder {folder!r} is not in the class map, which has {known}")
        if index >= num_classes:
            raise ValueError(
                f"the class map puts {folder!r} at {index}, outside the model's classes 0 to {num_classes - 1}"
            )
        indices.append(index)
    return indices


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that comes twice, however its letters are composed."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        key = unicodedata.normalize("NFC", key)
        if key in content:
            raise ValueError(f"the folder {key!r} comes twice")
        content[key] = value
    return content
