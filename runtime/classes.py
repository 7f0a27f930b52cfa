"""Class names and class indices: ImageNet's, and those of a user's folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

IMAGENET_CLASSES = 1000


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, int]:
    """Every WordNet id, ImageNet class name and synonym in lower case -> its index in 0..999."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names: dict[str, int] = {}
    synonyms: dict[str, set[int]] = {}
    for index in range(IMAGENET_CLASSES):
        names[info.index_to_label_name(index).lower()] = index
        description = info.index_to_description(index, detailed=False).lower()
        names.setdefault(description, index)
        for synonym in description.split(", "):
            synonyms.setdefault(synonym, set()).add(index)
    # "crane" is a bird and a machine: such names stay with their full description only.
    for synonym, indices in synonyms.items():
        if len(indices) == 1:
            names.setdefault(synonym, next(iter(indices)))
    return names


def class_index(name: str, num_classes: int) -> int:
    """The index of a class given as a number, or for ImageNet models as a name ("golden retriever") or WordNet id.

    Raises ValueError for a number outside the model's classes, or an unknown name with the nearest known ones.
    """
    text = name.strip().lower()
    if text.lstrip("-").isdigit():
        index = int(text)
        if not 0 <= index < num_classes:
            raise ValueError(f"class {index} is outside this model's classes 0 to {num_classes - 1}")
        return index
    if num_classes != IMAGENET_CLASSES:
        raise ValueError(f"class {name!r}: a model of {num_classes} classes takes indices 0 to {num_classes - 1}")
    index_or_none = _lookup(text)
    if index_or_none is None:
        from difflib import get_close_matches

        near = get_close_matches(text, imagenet_names(), n=3, cutoff=0.5)
        containing = [known for known in imagenet_names() if text in known]
        near = list(dict.fromkeys(sorted(containing, key=len)[:3] + near))[:4]
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"{name!r} is no ImageNet class name or index{hint}")
    return index_or_none


def class_indices(
    folders: Sequence[str], num_classes: int | None, class_map: Mapping[str, int] | None = None
) -> list[int]:
    """The model's class index of each class folder, in order.

    With a `class_map`, what it says. For a model of ImageNet's 1000 classes, folders that all are WordNet ids or
    class names mean those. As many folders as classes: their sorted order. Raises ValueError otherwise: the order
    of a few folders would silently train the model's first classes.
    """
    if class_map is not None:
        return [_mapped(name, class_map, num_classes) for name in folders]
    reason = "and nothing says which of them they are"
    if num_classes == IMAGENET_CLASSES:
        found = [_lookup(name.lower().replace("_", " ")) for name in folders]
        unknown = [name for name, index in zip(folders, found, strict=True) if index is None]
        if not unknown:
            return [index for index in found if index is not None]
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
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read class map {os.fspath(path)!r}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f'class map {os.fspath(path)!r} must be JSON like {{"folder": class index or ImageNet name}}'
        )
    mapped = {}
    for folder, value in content.items():
        if isinstance(value, str):
            value = class_index(value, IMAGENET_CLASSES)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"class map {os.fspath(path)!r}: {folder!r} maps to {value!r}, not to a class index")
        mapped[folder] = value
    return mapped


def _mapped(folder: str, class_map: Mapping[str, int], num_classes: int | None) -> int:
    if folder not in class_map:
        raise ValueError(
            f"class folder {folder!r} is not in the class map, which has {', '.join(list(class_map)[:5])}"
        )
    index = class_map[folder]
    if num_classes is not None and index >= num_classes:
        raise ValueError(
            f"the class map puts {folder!r} at {index}, outside the model's classes 0 to {num_classes - 1}"
        )
    return index


def _lookup(text: str) -> int | None:
    names = imagenet_names()
    return names.get(text, names.get(text.replace(" ", "_")))
