"""Images with captions, as they lie in folders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flowturbo.data.images import Source, read_image
from flowturbo.data.shards import open_shards
from flowturbo.data.walk import walk

EXPECTED = "expected images with NAME.txt beside each, metadata.jsonl (file_name, text), .tar shards, or .parquet files"


class Captioned(NamedTuple):
    """An image, by a name that tells it from others, its caption, and what its image is read from."""

    name: str
    caption: str
    source: Callable[[], Source]


def read_folder(root: str | os.PathLike[str]) -> list[Captioned]:
    """The captioned images of a folder, in a fixed order. Raises ValueError where there are none."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"data folder {str(folder)!r} does not exist: {EXPECTED}")
    sources = (_of_metadata, _of_text_files, _of_shards)
    found = next((items for source in sources if (items := list(source(folder)))), [])
    if not found:
        raise ValueError(f"data folder {str(folder)!r} holds no captioned images: {EXPECTED}")
    return found


def _of_metadata(folder: Path) -> Iterator[Captioned]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            name, caption = str(entry["file_name"]), str(entry["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(path)!r}, line {number}: expected an object with file_name and text") from None
        yield Captioned(name, caption, partial(str, folder / name))


def _of_text_files(folder: Path) -> Iterator[Captioned]:
    for name in walk(folder).files:
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            caption = text.read_text(encoding="utf-8").strip()
            yield Captioned(name, caption, partial(str, folder / name))


def _of_shards(folder: Path) -> Iterator[Captioned]:
    """Archives as webdataset makes them, with NAME.jpg and NAME.txt, or tables with a column text or caption."""
    shards = open_shards(folder)
    if shards is None:
        return
    field = next((name for name in ("txt", "text", "caption") if name in shards.fields), None)
    if field is None:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(shards.fields) or 'nothing'} beside its images: expected txt, text or "
            "caption"
        )
    for number, (name, caption) in enumerate(zip(shards.names, shards.column(field))):
        if caption is not None:
            text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else str(caption)
            yield Captioned(name, text.strip(), partial(shards.read, number))


def read_picture(item: Captioned, height: int, width: int, channels: int) -> np.ndarray:
    """uint8 (C, height, width): the largest part of that shape around the image's centre. Raises ValueError."""
    pixels = read_image(item.source(), None, channels).pixels
    if pixels.shape[1:] == (height, width):
        return pixels
    picture = Image.fromarray(pixels.transpose(1, 2, 0).squeeze())
    scale = max(height / picture.height, width / picture.width)
    w, h = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (w - width) // 2, (h - height) // 2
    picture = picture.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    array = np.asarray(picture)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def identity(items: Sequence[Captioned]) -> str:
    """A sha256 over names and captions."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.name}\0{item.caption}\n".encode())
    return digest.hexdigest()
