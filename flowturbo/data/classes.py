"""Class names and class indices: ImageNet's, and those of a user's folders."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

IMAGENET_CLASSES = 1000


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, list[int]]:
    """Every WordNet id, ImageNet class name and synonym in lower case -> the indices in 0..999 that it may mean.

    "crane" is a bird and a machine: such a name has several.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index in range(IMAGENET_CLASSES):
        description = info.index_to_description(index, detailed=False).lower()
        for name in (info.index_to_label_name(index).lower(), description):
            names.setdefault(name, []).append(index)
        for synonym in description.split(", "):
            synonyms.setdefault(synonym, []).append(index)
    return {**synonyms, **names}  # "partridge" is one class's name and another's synonym: it means the former


def class_index(name: str, num_classes: int) -> int:
    """The index of a class given as a number, or for ImageNet models as a name ("golden retriever") or WordNet id.

    Raises ValueError for a number outside the model's classes, or an unknown name with the nearest known ones.
    """
    text = name.strip().lower()
    if re.fullmatch("-?[0-9]+", text):
        index = int(text)
        if not 0 <= index < num_classes:
            raise ValueError(f"class {index} is outside this model's classes 0 to {num_classes - 1}")
        return index
    if num_classes != IMAGENET_CLASSES:
        raise ValueError(f"class {name!r}: a model of {num_classes} classes takes indices 0 to {num_classes - 1}")
    found = _lookup(text)
    if len(found) > 1:
        raise ValueError(f"{name!r} names the ImageNet classes {', '.join(map(str, found))}: give the index")
    if not found:
        known = imagenet_names()
        containing = sorted((other for other in known if text in other), key=len)[:3]
        near = list(dict.fromkeys(containing + get_close_matches(text, known, n=3, cutoff=0.5)))[:4]
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{name!r} is no ImageNet class name or index{hint}")
    return found[0]


def class_indices(
    folders: Sequence[str], num_classes: int | None, class_map: Mapping[str, int] | None = None
) -> list[int]:
    """The model's class index of each class folder, in order.

    With a `class_map`, what it says. Folders that are all numbers below the number of classes mean those; for a model
    of ImageNet's 1000 classes, WordNet ids and class names mean theirs. As many folders as classes: sorted order.
    Raises ValueError otherwise: the order of a few folders would silently train the model's first classes.
    """
    if class_map is not None:
        return [_mapped(name, class_map, num_classes or len(folders)) for name in folders]
    numbers = [int(name) for name in folders if re.fullmatch("[0-9]+", name)]
    if len(set(numbers)) == len(folders) and max(numbers) < (num_classes or len(folders)):
        return numbers  # "10" sorts before "2"
    reason = "and nothing says which of them they are"
    if num_classes == IMAGENET_CLASSES:
        found = [_lookup(name.lower().replace("_", " ")) for name in folders]
        unknown = [name for name, indices in zip(folders, found, strict=True) if len(indices) != 1]
        if not unknown:
            return [indices[0] for indices in found]
        reason = f"and {', '.join(map(repr, unknown[:3]))} is no WordNet id or ImageNet class name"
    if num_classes is None or len(folders) == num_classes:
        return list(range(len(folders)))
    if len(folders) > num_classes:
        raise ValueError(f"the data has {len(folders)} class folders, the model {num_classes} classes")
    raise ValueError(
        f"the data has {len(folders)} class folders, the model {num_classes} classes, {reason}: in their order they "
        "would train classes 0, 1, ... in place of what they show. Say which they are with --class-map (JSON like "
        '{"my_folder": 281}), or train a predictor on this folder first (--target predictor)'
    )


def read_class_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """A JSON file {folder name: class index, or ImageNet class name}. Raises ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read class map {os.fspath(path)!r}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f'class map {os.fspath(path)!r} must be JSON like {{"folder": class index or ImageNet name}}'
        )
    mapped = {}
    for folder, value in content.items():
        if isinstance(value, str):
            try:
                value = class_index(value, IMAGENET_CLASSES)
            except ValueError as error:
                raise ValueError(f"class map {os.fspath(path)!r}: {error}") from None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"class map {os.fspath(path)!r}: {folder!r} maps to {value!r}, not to a class index")
        mapped[folder] = value
    return mapped


def _mapped(folder: str, class_map: Mapping[str, int], num_classes: int) -> int:
    if folder not in class_map:
        raise ValueError(
            f"class folder {folder!r} is not in the class map, which has {', '.join(list(class_map)[:5])}"
        )
    index = class_map[folder]
    if index >= num_classes:
        raise ValueError(
            f"the class map puts {folder!r} at {index}, outside the model's classes 0 to {num_classes - 1}"
        )
    return index


def _lookup(text: str) -> list[int]:
    names = imagenet_names()
    return names.get(text) or names.get(text.replace(" ", "_")) or []
