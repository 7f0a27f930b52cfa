"""Files written whole or not at all, and what two processes must not do to one folder at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Makes the folder. Raises OSError naming the path where it cannot be written; what was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the same folder, so that replacing is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writes have left in a folder, and below it, that only the caller writes to."""
    for path in Path(folder).rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of an output file. Raises OSError naming a path that takes none: before the work, not after."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"cannot write {os.fspath(path)!r}: {'it is a folder' if path.is_dir() else 'no permission'}")


@contextmanager
def exclusive(folder: str | os.PathLike[str], patience: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock; it falls with the process and its children.

    Raises ValueError where another process still holds it after `patience` seconds.
    """
    limit = time.monotonic() + patience
    with open(Path(folder) / ".lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > limit:
                    raise ValueError(f"folder {os.fspath(folder)!r} is in use by another run") from None
                time.sleep(0.1)
        yield


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
