"""What the compiler has made, kept in the cache folder: a later process takes it from there.

torch.compile has a cache of its own, in a folder for temporary files. It takes that for whole: a file that a killed
process left half written, or one made for another processor, would be run. So the folder here is one processor's and
one torch's, and what is not as it was recorded is removed before anything is read.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from flowturbo.system.claims import read_record, write_record
from flowturbo.system.files import open_own, sha256
from flowturbo.weights.cache import cache_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # where torch.compile keeps its files
LIMIT = 2 << 30  # bytes; a folder that has grown beyond them is emptied


@cache
def kept_code() -> KeptCode | None:
    """The folder that this process compiles into, from its first call on; None where torch.compile's own is used.

    That is so where the user has set TORCHINDUCTOR_CACHE_DIR, and where the cache folder cannot be written to.
    """
    if os.environ.get(VARIABLE) not in (None, "", _usual_place()):
        return None
    with suppress(OSError):
        code = KeptCode(cache_folder() / "compiled" / machine())
        os.environ[VARIABLE] = str(code.folder)
        atexit.register(code.record)
        return code
    return None


def _usual_place() -> str | None:
    """Where torch.compile keeps its files by default; importing it writes that into the environment."""
    with suppress(ImportError):
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        return default_cache_dir()
    return None


def machine() -> str:
    """A name for this torch, Python and processor: code made for one of them is not run by another."""
    told: list[Any] = [torch.__version__, torch.version.git_version, sys.version, platform.machine()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return f"torch-{torch.__version__}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"


class KeptCode:
    """A folder of compiled code in use by this process, its files as they were recorded.

    Every process that uses it holds a shared lock. Files are looked through and recorded by one that is alone: no
    other is writing then. Raises OSError where the folder cannot be written to, or is another user's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{folder}: others may write there, and what lies there is run")
        self.notes = folder.with_name(f"{folder.name}.json")
        self.lock: IO[bytes] = open_own(folder.with_name(f"{folder.name}.lock"))
        if self._alone():
            self._clear()
        fcntl.flock(self.lock, fcntl.LOCK_SH)

    def record(self) -> None:
        """Record the files that are there; nothing where another process uses the folder: it will, at its end."""
        with suppress(OSError):
            if self._alone():
                write_record(self.notes, {"files": {name: _seal(path) for name, path in self._files()}})
            fcntl.flock(self.lock, fcntl.LOCK_SH)

    def _alone(self) -> bool:
        """Whether no other process uses the folder; then the lock is held alone."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _files(self) -> list[tuple[str, Path]]:
        return [(str(p.relative_to(self.folder)), p) for p in sorted(self.folder.rglob("*")) if p.is_file()]

    def _recorded(self) -> dict[str, Any]:
        with suppress(ValueError):
            files = (read_record(self.notes) or {}).get("files")
            return files if isinstance(files, dict) else {}
        return {}

    def _clear(self) -> None:
        """Remove files that are not as they were recorded, and all where they have become too many."""
        recorded, files = self._recorded(), self._files()
        if sum(path.stat().st_size for _, path in files) > LIMIT:
            shutil.rmtree(self.folder)
            self.folder.mkdir(mode=0o700)
            return
        for name, path in files:
            if recorded.get(name) != _seal(path):
                path.unlink()


def _seal(path: Path) -> list[Any]:
    """Size and sha256 of a file."""
    return [path.stat().st_size, sha256(path)]
