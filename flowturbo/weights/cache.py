"""Registered files in the cache folder: where they lie, and whether they are still what they were.

The sha256 that was expected or first seen is kept beside a file and enforced from then on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowturbo.system.claims import read_record, write_record
from flowturbo.system.files import sha256
from flowturbo.weights.registry import ASSETS, PACKAGED, Asset, RemoteFile

CACHE_VARIABLE = "FLOWTURBO_CACHE"
NOTES = {  # what is recorded of a file
    **dict.fromkeys(("sha256", "url", "mark"), str),
    **dict.fromkeys(("size", "total", "mtime_ns", "ctime_ns", "inode"), int),
}
OFFLINE_VARIABLES = ("FLOWTURBO_OFFLINE", "HF_HUB_OFFLINE")


class MissingWeights(ValueError):
    """Files that are not here: `paths` by the names of the options that named them, or by nothing.

    `fields` are those names, `assets` the registered names among the files, `hosts` where these come from.
    """

    def __init__(self, paths: Mapping[str, str], message: str = ""):
        self.paths = dict(paths)
        self.fields = [field for field in paths if field]
        self.assets = [key for key in map(find_asset, paths.values()) if key is not None]
        self.hosts = list(dict.fromkeys(_host(key) for key in self.assets))
        named = (f"{path} ({field})" if field else path for field, path in paths.items())
        super().__init__(message or f"no such file: {', '.join(named)}")

    def __reduce__(self) -> tuple:  # exceptions are pickled by their message alone
        return type(self), (self.paths, str(self))


class DownloadsOff(MissingWeights):
    """A registered file is not here, and nothing may be downloaded."""


class CacheUnusable(OSError):
    """The cache folder takes no file."""


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads lie: the folder given, else $FLOWTURBO_CACHE, else ~/.cache/flowturbo."""
    return Path(folder or os.environ.get(CACHE_VARIABLE) or "~/.cache/flowturbo").expanduser()


def offline_variable() -> str | None:
    """The environment variable that forbids downloads, FLOWTURBO_OFFLINE or HF_HUB_OFFLINE; None where none does."""
    on = ("1", "true", "yes", "on")
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in on), None)


def is_offline() -> bool:
    """Whether an environment variable forbids downloads."""
    return offline_variable() is not None


def find_asset(name: str, assets: Mapping[str, Asset] = ASSETS) -> str | None:
    """The registered name that a name or a file's name stands for, in any folder; None where it is not registered."""
    if name in assets:
        return name
    file = Path(name).name
    return next((key for key, asset in assets.items() if file == asset.path), None)


def _host(key: str) -> str:
    return str(urlsplit(ASSETS[key].files[0].urls[0]).hostname)


def locate(
    name: str, folder: str | os.PathLike[str] | None = None, assets: Mapping[str, Asset] = ASSETS
) -> Path | None:
    """The path as given where there is something, else the file of that name in the package, else the registered file
    in the cache folder, else None.

    A name with a folder in front is a path and nothing else. Touches no network. Raises ValueError for a cached file
    that is not the one that was downloaded.
    """
    if Path(name).exists():
        return Path(name)
    if Path(name).name != name:
        return None
    if (PACKAGED / name).is_file():
        return PACKAGED / name
    key = find_asset(name, assets)
    if key is None:
        return None
    place = cache_folder(folder)
    files = assets[key].files
    if not all((place / file.path).is_file() for file in files):
        return None
    for file in files:
        check(file, place / file.path, verify=False)
    return place / assets[key].path


def progress(file: RemoteFile, folder: Path) -> int | None:
    """How many bytes of a file lie in the cache folder; None where nothing does."""
    path = folder / file.path
    return next((p.stat().st_size for p in (path, beside(path, "part")) if p.is_file()), None)


def beside(path: Path, suffix: str) -> Path:
    """A hidden file beside a cached one: its "part" that has arrived, its "lock", or its record ("json")."""
    return path.with_name(f".{path.name}.{suffix}")


def read_notes(path: Path) -> dict[str, Any]:
    """What is recorded of a cached or partial file; without what is damaged, empty where nothing is recorded."""
    try:
        found = read_record(beside(path, "json")) or {}
    except ValueError:
        return {}
    return {name: value for name, value in found.items() if type(value) is NOTES.get(name)}


def write_notes(path: Path, **content: Any) -> None:
    """Record something of a cached or partial file, in place of what was recorded."""
    write_record(beside(path, "json"), content)


def expected(file: RemoteFile, path: Path) -> tuple[int | None, str | None]:
    """Size and sha256 of a file, as registered or else recorded; None where neither is."""
    notes = read_notes(path)
    return file.size or notes.get("size"), file.sha256 or notes.get("sha256")


def stamp(path: Path) -> dict[str, int]:
    """What changes with a file that is written to or replaced; whoever does can set back the first two alone."""
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def check(file: RemoteFile, path: Path, verify: bool) -> None:
    """Raises ValueError where a file that is there is not the registered, or the recorded one.

    It is hashed where its size or time is not the recorded one, or with `verify`.
    """
    notes, now = read_notes(path), stamp(path)
    if not verify and now.items() <= notes.items() and file.sha256 in (None, notes.get("sha256")):
        return
    size, digest = expected(file, path)
    again = f"delete it to have it downloaded again{unless_meant(file, path)}"
    if size not in (None, now["size"]):
        raise ValueError(f"{path} has {now['size']:,} bytes, expected {size:,}: {again}")
    found = sha256(path)
    if digest not in (None, found):
        raise ValueError(f"{path} has sha256 {found}, expected {digest}: {again}")
    with suppress(OSError):  # a shared cache may be read-only
        write_notes(path, **{**notes, "sha256": found, **now})


def unless_meant(file: RemoteFile, path: Path) -> str:
    """What to do where a file that differs from the first download is the right one; empty for registered hashes."""
    record = beside(path, "json")
    if file.sha256 or not record.is_file():
        return ""
    return f" (if the new one is right, delete the record of the old one: {record})"
