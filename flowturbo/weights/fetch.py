"""Registered files from the network into the cache folder: whole, verified and once, or not at all.

A download goes to a hidden partial file beside its place, under a lock, and takes its place by one rename. A cut
continues where it stopped, also in a later process.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from flowturbo.system.files import locked
from flowturbo.weights.cache import (
    CacheUnusable,
    DownloadsOff,
    MissingWeights,
    beside,
    cache_folder,
    check,
    expected,
    find_asset,
    is_offline,
    locate,
    offline_variable,
    stamp,
    unless_meant,
    write_notes,
)
from flowturbo.weights.http import Refusal, Terms
from flowturbo.weights.registry import ASSETS, Asset, RemoteFile
from flowturbo.weights.transfer import transfer

__all__ = ["DownloadFailed", "MissingWeights", "NoProgress", "Terms", "fetch", "find", "is_offline", "locate"]


class DownloadFailed(OSError):
    """No mirror delivered: `asset` is the registered name, `place` where the file belongs."""

    def __init__(self, message: str, asset: str = "", place: str = ""):
        super().__init__(message)
        self.asset, self.place = asset, place


class NoProgress(OSError):
    """A rank has waited in vain for rank 0 to download `asset`."""

    def __init__(self, message: str, asset: str = ""):
        super().__init__(message)
        self.asset = asset


def find(name: str) -> Path:
    """The path as given where there is something, else the registered file, downloaded if need be; as `fetch`."""
    return locate(name) or fetch(name)


def fetch(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    offline: bool = False,
    verify: bool = False,
    terms: Terms = Terms(),
    assets: Mapping[str, Asset] = ASSETS,
) -> Path:
    """The local path of a registered name, downloaded into the cache folder if it is not there.

    What is there is hashed again where its size or time changed since, or with `verify`. Under torchrun rank 0
    downloads and the others wait for the file, without a process group. Raises ValueError for an unknown name and
    a file that is not what was expected, DownloadsOff offline, DownloadFailed with what was tried where no mirror
    delivers, CacheUnusable where the folder cannot be written or the disk is too small.
    """
    key = find_asset(name, assets)
    if key is None:
        near = get_close_matches(name, assets, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"nothing is called {name!r}: expected {', '.join(assets)}{guess}")
    place, asset = cache_folder(folder), assets[key]
    for file in asset.files:
        path = place / file.path
        rank = int(os.environ.get("RANK", "0"))
        if path.is_file():
            if rank == 0:
                check(file, path, verify)
        elif offline or is_offline():
            cause = "" if offline else f" ({offline_variable()} is set)"
            raise DownloadsOff({"": key}, f"{file.path} is not in {place}, and downloads are off{cause}")
        elif rank == 0:
            with _turn(path):
                if not path.is_file():  # another process may have been first
                    _download(file, path, key, terms)
        else:
            _await(path, key, rank, terms)
    return place / asset.path


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold a file's lock, waiting while another process downloads it; makes the folder."""

    def tell() -> None:
        print(f"{path.name}: another process is downloading it; waiting", file=sys.stderr)

    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(beside(path, "lock"), math.inf, on_wait=tell))
        except OSError as error:
            raise CacheUnusable(
                f"cannot use the cache folder {str(path.parent)!r}: {error.strerror or error}"
            ) from None
        yield


def _await(path: Path, key: str, rank: int, terms: Terms) -> None:
    """Wait for rank 0's file, as long as it grows."""
    part, seen, since = beside(path, "part"), -1, time.monotonic()
    while not path.is_file():
        size = -1
        with suppress(OSError):
            size = part.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > terms.ranks:
            raise NoProgress(
                f"rank {rank} saw no progress of {path} in {terms.ranks:g} s, and rank 0 alone downloads", key
            )
        time.sleep(0.1)


def _download(file: RemoteFile, path: Path, key: str, terms: Terms) -> None:
    """Get a file from the first mirror that delivers, and record its hash. Raises DownloadFailed with all reasons."""
    part, (size, digest) = beside(path, "part"), expected(file, path)
    reasons = []
    for url in file.urls:
        try:
            found = transfer(url, part, file, size, digest, terms)
        except Refusal as reason:
            reasons.append(f"{url.partition('?')[0]}: {reason}")
            if not part.is_file() or not part.stat().st_size:  # nothing that another attempt could go on from
                for leftover in (part, beside(part, "json")):
                    leftover.unlink(missing_ok=True)
            continue
        os.replace(part, path)
        write_notes(path, sha256=found, **stamp(path), url=url)
        beside(part, "json").unlink(missing_ok=True)
        return
    kept = "; what has arrived is kept" if part.is_file() else ""
    raise DownloadFailed(
        f"cannot download {file.path}; tried {'; '.join(reasons)}{kept}{unless_meant(file, path)}", key, str(path)
    )
