"""Files: .npz archives read without trusting them, and writing that leaves a whole file or none."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

DEFLATE_LIMIT = 1032  # deflate cannot shrink data further, so an announced size beyond it is a lie


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
            raise ValueError(f"{self.path}: no such file")
        with self._reading("file"), zipfile.ZipFile(self.path) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return sorted(self._members)

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
            raise ValueError(f"{self.path}: no array {name}; it holds {', '.join(self.names) or 'nothing'}")
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


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # the same folder, so that replacing is atomic
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """ValueError when the folder for an output file is missing: before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def save_npz(path: str | os.PathLike[str], arrays: dict[str, Any]) -> None:
    """Write an uncompressed .npz atomically."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)
