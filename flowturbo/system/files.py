"""Files written whole or not at all, and what two processes must not do to one folder at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"  # the file in a folder that stands for its lock


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Makes the folder. Raises OSError naming the path where it cannot be written; what was there before stays.
    """
    path = Path(path)
    _check_place(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the same folder, so that replacing is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process of the same number, or a link that was planted
        with open(temporary, "xb") as file:
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


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for something that is there and no file: a pipe would be waited for, a device never ends."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)!r} is no file")


def _check_place(path: Path) -> None:
    """Raises OSError where a file would take the place of something else: of a folder, or a device like /dev/null."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"cannot write {os.fspath(path)!r}: it is {'a folder' if path.is_dir() else 'no regular file'}")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of an output file. Raises OSError naming a path that takes none: before the work, not after."""
    path = Path(path)
    if os.path.isfile(path) and not os.access(path, os.W_OK):
        raise OSError(f"cannot write {os.fspath(path)!r}: no permission")
    with suppress(_Enough), atomic_write(path):  # permissions and disks have too many ways to say no
        raise _Enough


class _Enough(Exception):
    """Ends a write that was only to be tried."""


class InUse(ValueError):
    """Another process holds a lock."""


def exclusive(folder: str | os.PathLike[str], patience: float = 0.0) -> AbstractContextManager[None]:
    """Hold a folder's lock. Raises InUse where another process still holds it after `patience` seconds."""
    return locked(Path(folder) / LOCK, patience, f"folder {os.fspath(folder)!r} is in use by another run")


@contextmanager
def locked(
    path: str | os.PathLike[str], patience: float, message: str = "", on_wait: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Hold the lock that a file stands for; the file is made, and the lock falls with the process and its children.

    `on_wait` is called once where there is something to wait for. Raises InUse, with the message, where another
    process still holds the lock after `patience` seconds, OSError where there can be none.
    """
    limit, waiting = time.monotonic() + patience, False
    with _open_lock(path) as file:
        while not _try_lock(file):
            if time.monotonic() > limit:
                raise InUse(message or f"{os.fspath(path)!r} is locked by another process")
            if not waiting:
                on_wait()
            waiting = True
            time.sleep(0.1)
        yield


def open_own(path: str | os.PathLike[str], append: bool = True) -> IO[bytes]:
    """Open a file to write to it, made if need be. Raises OSError for a link, which would have another file changed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # nobody waits for the reader of a pipe
    return open(path, "ab" if append else "wb", opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def _open_lock(path: str | os.PathLike[str]) -> IO[bytes]:
    try:
        return open_own(path)
    except OSError as error:
        raise OSError(f"cannot lock {os.fspath(path)!r}: {error.strerror}") from error


def _try_lock(file: IO[bytes]) -> bool:
    """Whether the file is locked now. Raises OSError on a disk without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"cannot lock {file.name!r}: {error.strerror}") from error
    return True


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
