"""Where images and numbers come from: folders of images, and .npz archives that are read without trusting them.

Images come in order and in batches of uint8 (N, H, W, 3): grey is replicated, palettes are resolved. So a grey PNG, an
(N, H, W, 1) array and its (N, H, W, 3) replication are the same images.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from flowturbo.data.archives import DEFLATE_LIMIT
from flowturbo.data.images import MAX_PIXELS, ImageReading, Source, in_threads, read_image
from flowturbo.data.options import parse_background
from flowturbo.data.shards import open_shards
from flowturbo.data.walk import walk
from flowturbo.system.values import plain

PACKED_LIMIT, FREE = 100, 1 << 28  # images shrink less; up to so many bytes anything may


class UnevenImages(ValueError):
    """The images of a folder have several sizes."""


class ImageFolder:
    """All images below a folder, sorted by path, or in packed files, in their order, read as for training; with an
    `image_size` cropped as there too.

    `skipped` counts the entries that were passed over by kind, `applied` the images that each rule of reading has
    changed, once they were read. Raises ValueError below two images, or, naming the file, for one that cannot be read,
    and UnevenImages for one of another size than the first.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int | None = None, background: str = "white") -> None:
        parse_background(background)
        self.path, self.image_size, self.background = Path(path), image_size, background
        self._shards = open_shards(path)
        self.skipped: Mapping[str, int]
        if self._shards is None:
            found = walk(path)
            self.files, self.skipped = [os.path.join(path, file) for file in found.files], found.skipped
        else:
            self.files, self.skipped = self._shards.names, self._shards.skipped
        self.applied: Counter[str] = Counter()
        if len(self.files) < 2:
            raise ValueError(f"{self.path}: {len(self.files)} images in this folder, expected at least 2")

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> Source:
        """What image number `index` is read from."""
        return self.files[index] if self._shards is None else self._shards.read(index)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) in the order of the paths, n = size but for the last."""

        def read(index: int) -> ImageReading:
            return read_image(self.source(index), size=self.image_size, background=self.background)

        self.applied.clear()
        height, width = read(0).pixels.shape[1:]
        for start in range(0, len(self), size):
            part = range(start, min(start + size, len(self)))
            images = in_threads(read, part)
            for index, image in zip(part, images):
                if image.pixels.shape[1:] != (height, width):
                    raise UnevenImages(
                        f"{self.files[index]}: {image.pixels.shape[2]}×{image.pixels.shape[1]} pixels, but "
                        f"{os.path.basename(self.files[0])} has {width}×{height}: expected images of one size"
                    )
                self.applied.update(image.rules)
            yield np.ascontiguousarray(np.stack([image.pixels for image in images]).transpose(0, 2, 3, 1))


class ImageArchive:
    """The images arr_0 of an ADM .npz, streamed: uint8 (N, H, W, 3), or (N, H, W, 1) for grey.

    ValueError, naming the file, when there is no arr_0, it is something else, or holds fewer than two images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._archive = Archive(path)
        shape, dtype, _ = self._archive.header("arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
        if shape[0] < 2:
            raise ValueError(f"{self.path}: {shape[0]} images in arr_0, expected at least 2")
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, expected images of 1 to {MAX_PIXELS} pixels")
        self._count = shape[0]

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) in the order of the file, n = size but for the last."""
        for block in self._archive.blocks("arr_0", size):
            yield block if block.shape[3] == 3 else block.repeat(3, axis=3)


class Header(NamedTuple):
    """What an array in an archive announces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


class Archive:
    """An .npz file whose arrays are checked before memory is allocated, and never unpickled.

    ValueError, with the file's name, when it is missing, no .npz, damaged, or an array is not what it says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: {'it is no file' if self.path.exists() else 'no such file'}")
        with self._reading("file"), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
            self._members = {info.filename.removesuffix(".npy"): info for info in members}
            packed, whole = self.path.stat().st_size, sum(info.file_size for info in members)
            if whole > max(FREE, PACKED_LIMIT * packed):
                raise ValueError(
                    f"{whole:,} bytes packed into {packed:,}, expected at most {PACKED_LIMIT} times as many"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return sorted(self._members)

    @property
    def listed(self) -> str:
        """The names as a short text."""
        return plain(", ".join(self.names), 200) or "nothing"

    def header(self, name: str) -> Header:
        """Shape and dtype of an array, after checking that the announced size is the stored one."""
        with self._open(name) as (header, _):
            return header

    def read(self, name: str) -> np.ndarray:
        """A whole array."""
        with self._open(name) as (header, stream):
            array = np.empty(header.shape[::-1] if header.fortran_order else header.shape, header.dtype)
            _fill(stream, array)
            return array.T if header.fortran_order else array

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """An array in blocks of at most `rows` along its first axis, in order."""
        with self._open(name) as (header, stream):
            if header.fortran_order:
                raise ValueError("stored in Fortran order, expected C order")
            for start in range(0, header.shape[0], rows):
                block = np.empty((min(rows, header.shape[0] - start), *header.shape[1:]), header.dtype)
                _fill(stream, block)
                yield block

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
        if name not in self._members:
            raise ValueError(f"{self.path}: no array {name}; it holds {self.listed}")
        info = self._members[name]
        with self._reading(name), zipfile.ZipFile(self.path) as archive, archive.open(info) as stream:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"compression {info.compress_type} is not supported")
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f".npy version {version} is not supported")
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(stream)
            if dtype.hasobject:
                raise ValueError("an object array, which could run code when read: expected numbers")
            announced = stream.tell() + math.prod(shape) * dtype.itemsize
            stored = DEFLATE_LIMIT * min(info.compress_size, self.path.stat().st_size)
            if announced != info.file_size or announced > stored:
                raise ValueError(f"announces {shape} of {dtype}, but {info.file_size} bytes are stored")
            yield Header(shape, dtype, fortran_order), stream

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Damage shows as any of these; say which file it is."""
        try:
            yield
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path}: not an .npz archive, or a damaged one ({error})") from error
        except Exception as error:  # numpy reads headers as Python text, which fails in a dozen ways
            raise ValueError(f"{self.path}: {what}: {error}") from error


def _fill(stream: IO[bytes], array: np.ndarray) -> None:
    """Read into a C-contiguous array, in pieces that need no second copy of it."""
    view = array.reshape(-1).view(np.uint8).data
    filled = 0
    while filled < len(view):
        piece = stream.read(min(len(view) - filled, 1 << 24))
        if not piece:
            raise EOFError(f"ends after {filled} of {len(view)} bytes")
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
