"""Images with captions, as they lie in folders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flowturbo.data.images import read_image
from flowturbo.data.walk import walk

EXPECTED = "expected images with NAME.txt beside each, metadata.jsonl (file_name, text), .tar shards, or .parquet files"


class Captioned(NamedTuple):
    """An image, by a name that tells it from others, its caption, and how to read its file."""

    name: str
    caption: str
    file: Callable[[], str | io.BytesIO]


def read_folder(root: str | os.PathLike[str]) -> list[Captioned]:
    """The captioned images of a folder, in a fixed order. Raises ValueError where there are none."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"data folder {str(folder)!r} does not exist: {EXPECTED}")
    sources = (_of_metadata, _of_text_files, _of_tars, _of_parquet)
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


def _of_tars(folder: Path) -> Iterator[Captioned]:
    """Shards as webdataset makes them: members of one name, NAME.jpg and NAME.txt."""

    def member(path: Path, offset: int, size: int) -> io.BytesIO:
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = {m.name: m for m in archive if m.isfile()}
        for name, text in members.items():
            stem, dot, kind = name.rpartition(".")
            image = next(
                (members[stem + end] for end in (".jpg", ".jpeg", ".png", ".webp") if stem + end in members), None
            )
            if dot and kind == "txt" and image is not None:
                caption = member(path, text.offset_data, text.size).read().decode("utf-8").strip()
                place = (path, image.offset_data, image.size)
                yield Captioned(f"{path.name}/{image.name}", caption, partial(member, *place))


def _of_parquet(folder: Path) -> Iterator[Captioned]:
    """Tables with a column image (bytes, or a struct with bytes) and a column text or caption."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        return
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"reading {str(paths[0])!r} needs pyarrow") from None

    def cell(path: Path, row: int) -> io.BytesIO:
        value = pq.read_table(path, columns=["image"])["image"][row].as_py()
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)

    for path in paths:
        names = pq.read_schema(path).names
        text = next((name for name in ("text", "caption") if name in names), None)
        if text is None or "image" not in names:
            raise ValueError(f"{str(path)!r} has the columns {', '.join(names)}: expected image, and text or caption")

        for row, caption in enumerate(pq.read_table(path, columns=[text])[text].to_pylist()):
            yield Captioned(f"{path.name}/{row}", str(caption), partial(cell, path, row))


def read_picture(item: Captioned, height: int, width: int, channels: int) -> np.ndarray:
    """uint8 (C, height, width): the largest part of that shape around the image's centre. Raises ValueError."""
    file = item.file()
    if not isinstance(file, str):  # the one reader of images reads files
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile() as copy:
            copy.write(file.getvalue())
            copy.flush()
            pixels = read_image(copy.name, None, channels).pixels
    else:
        pixels = read_image(file, None, channels).pixels
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
