"""Registered files from the network into the cache folder: whole, verified and once, or not at all.

A download goes to a hidden partial file beside its place, under a lock, and takes its place by one rename. A cut
continues where it stopped, also in a later process. The sha256 that was expected or first seen is kept beside the
file and enforced from then on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from tqdm import tqdm

from flowturbo.system.files import atomic_write, sha256
from flowturbo.weights.registry import ASSETS, Asset, RemoteFile

CACHE_VARIABLE = "FLOWTURBO_CACHE"
OFFLINE_VARIABLES = ("FLOWTURBO_OFFLINE", "HF_HUB_OFFLINE")
BLOCK = 1 << 20
LARGEST = 1 << 36  # where neither registry nor mirror tells a length
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)


@dataclass(frozen=True)
class Terms:
    """The terms of a transfer; times in seconds."""

    stall: float = 30.0  # without a byte, until an attempt is given up
    attempts: int = 5  # in a row without a MiB of progress, until a mirror is given up
    delay: float = 1.0  # before the second attempt; doubles each time, up to 30
    ranks: float = 600.0  # without a byte of progress, until a rank that waits for rank 0 gives up
    loopback: bool = False  # for tests: http://127.0.0.1 passes for https


class _Again(Exception):
    """An attempt failed in a way that another may not."""


class _Refusal(Exception):
    """A mirror does not have the file; another attempt would tell the same."""


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads lie: the folder given, else $FLOWTURBO_CACHE, else ~/.cache/flowturbo."""
    return Path(folder or os.environ.get(CACHE_VARIABLE) or "~/.cache/flowturbo").expanduser()


def is_offline() -> bool:
    """Whether an environment variable forbids downloads: FLOWTURBO_OFFLINE or HF_HUB_OFFLINE."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE_VARIABLES)


def find_asset(name: str, assets: Mapping[str, Asset] = ASSETS) -> str | None:
    """The registered name that a name or a file's name stands for, in any folder; None where it is not registered."""
    if name in assets:
        return name
    file = Path(name).name
    return next((key for key, asset in assets.items() if file == asset.path), None)


def hint(*names: str) -> str | None:
    """The command that gets files, by their registered names or file names, and from where; None where none does."""
    keys = [key for key in map(find_asset, names) if key is not None]
    hosts = dict.fromkeys(urlsplit(ASSETS[key].files[0].urls[0]).hostname for key in keys)
    return f"`python download.py {' '.join(keys)}` (from {', '.join(map(str, hosts))})" if keys else None


def locate(
    name: str, folder: str | os.PathLike[str] | None = None, assets: Mapping[str, Asset] = ASSETS
) -> Path | None:
    """The path as given where there is something, else the registered file in the cache folder, else None.

    A name with a folder in front is a path and nothing else. Touches no network.
    """
    if Path(name).exists():
        return Path(name)
    key = find_asset(name, assets) if Path(name).name == name else None
    if key is None:
        return None
    place = cache_folder(folder)
    complete = all((place / file.path).is_file() for file in assets[key].files)
    return place / assets[key].path if complete else None


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
    downloads and the others wait for the file, without a process group. Raises ValueError for an unknown name,
    a file that is not what was expected, and offline; OSError where no mirror delivers or the disk is too small.
    Both say what was tried and what to do.
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
                _check(file, path, verify)
        elif offline or is_offline():
            raise ValueError(
                f"{file.path} is not in {place}, and downloads are off (--offline, {', '.join(OFFLINE_VARIABLES)}): "
                f"run `python download.py {key}` with a connection, or pass a local path with {asset.advice}"
            )
        elif rank == 0:
            _make_folder(path.parent)
            with _turn(path):
                if not path.is_file():  # another process may have been first
                    _download(file, path, key, asset.advice, terms)
        else:
            _await(path, key, rank, terms)
    return place / asset.path


def progress(file: RemoteFile, folder: Path) -> int | None:
    """How many bytes of a file lie in the cache folder; None where nothing does."""
    path = folder / file.path
    return next((p.stat().st_size for p in (path, _beside(path, "part")) if p.is_file()), None)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the cache folder {str(folder)!r}: {error.strerror}; choose another with --cache-dir or "
            f"{CACHE_VARIABLE}"
        ) from None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold a file's lock, waiting while another process downloads it; the lock falls with its process."""
    with open(_beside(path, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.name}: another process is downloading it; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                f"cannot lock {path}: {error.strerror}; choose a folder on another disk with --cache-dir or "
                f"{CACHE_VARIABLE}"
            ) from None
        yield


def _await(path: Path, key: str, rank: int, terms: Terms) -> None:
    """Wait for rank 0's file, as long as it grows."""
    part, seen, since = _beside(path, "part"), -1, time.monotonic()
    while not path.is_file():
        size = -1
        with suppress(OSError):
            size = part.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > terms.ranks:
            raise OSError(
                f"rank {rank} saw no progress of {path} in {terms.ranks:g} s, and rank 0 alone downloads; where "
                f"the nodes share no disk, run `python download.py {key}` on each before"
            )
        time.sleep(0.1)


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _check(file: RemoteFile, path: Path, verify: bool) -> None:
    """Raises ValueError where a file that is there is not the registered, or the recorded one."""
    record, stamp = _read_json(_beside(path, "json")), _stamp(path)
    if not verify and stamp.items() <= record.items() and file.sha256 in (None, record.get("sha256")):
        return
    size, digest = file.size or record.get("size"), file.sha256 or record.get("sha256")
    again = f"delete it to have it downloaded again{_unless_meant(file, path)}"
    if size not in (None, stamp["size"]):
        raise ValueError(f"{path} has {stamp['size']:,} bytes, expected {size:,}: {again}")
    found = sha256(path)
    if digest not in (None, found):
        raise ValueError(f"{path} has sha256 {found}, expected {digest}: {again}")
    with suppress(OSError):  # a shared cache may be read-only
        _write_json(_beside(path, "json"), {**record, "sha256": found, **stamp})


def _unless_meant(file: RemoteFile, path: Path) -> str:
    record = _beside(path, "json")
    if file.sha256 or not record.is_file():
        return ""
    return f" (if the new one is right, delete the record of the old one: {record})"


def _download(file: RemoteFile, path: Path, key: str, advice: str, terms: Terms) -> None:
    """Get a file from the first mirror that delivers, and record its hash. Raises OSError with each one's reason."""
    part, record = _beside(path, "part"), _read_json(_beside(path, "json"))
    size, digest = file.size or record.get("size"), file.sha256 or record.get("sha256")
    reasons = []
    for url in file.urls:
        try:
            found = _get(url, part, path.name, size, digest, terms)
        except _Refusal as reason:
            reasons.append(f"{url.partition('?')[0]}: {reason}")
            continue
        os.replace(part, path)
        _write_json(_beside(path, "json"), {"sha256": found, **_stamp(path), "url": url})
        _beside(part, "json").unlink(missing_ok=True)
        return
    kept = "what has arrived is kept, so " if part.is_file() else ""
    raise OSError(
        f"cannot download {file.path}; tried {'; '.join(reasons)}; {kept}run `python download.py {key}` again later, "
        f"or get it elsewhere and put it at {path} or pass it with {advice}{_unless_meant(file, path)}"
    )


def _get(url: str, part: Path, name: str, size: int | None, digest: str | None, terms: Terms) -> str:
    """Complete the partial file from one mirror; returns its sha256. Raises _Refusal with the mirror's last word."""
    old, reached, failures = part.is_file(), 0, 0
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:
        while True:
            try:
                _receive(url, part, size, terms, bar)
                found = sha256(part)
                if digest in (None, found):
                    return found
                part.unlink()
                if not old:
                    raise _Refusal(f"sent a file of sha256 {found}, expected {digest}")
                old = False  # what an earlier process left may be at fault
                raise _Again("what was continued did not fit")
            except _Again as reason:
                here = part.stat().st_size if part.is_file() else 0
                failures = 1 if here >= reached + BLOCK else failures + 1
                reached = max(reached, here)
                if failures >= terms.attempts:
                    raise _Refusal(f"{reason} ({failures} attempts)") from None
                bar.set_postfix_str(str(reason))
                time.sleep(min(30.0, terms.delay * 2 ** (failures - 1)))


def _receive(url: str, part: Path, size: int | None, terms: Terms, bar: tqdm) -> None:
    """One request: append to the partial file where it is the same file's, else begin it anew.

    Raises _Again or _Refusal where it is not complete afterwards, OSError where it cannot be written.
    """
    before = _read_json(_beside(part, "json"))
    have = part.stat().st_size if part.is_file() and before.get("url") == url else 0
    if have and have == before.get("total"):  # a process ended between the last byte and the renaming
        return
    with _open(url, have, part, terms) as response:
        if "html" in response.headers.get_content_type():
            raise _Refusal("sent a web page in place of the file")
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            total = int(span[2]) if span else None
            if span is None or int(span[1]) != have or (mark, total) != (before.get("mark"), before.get("total")):
                part.unlink(missing_ok=True)
                raise _Again("the file there has changed; starting over")
        else:
            have, total = 0, response.length
            if total is None and size is None and not response.chunked:
                raise _Refusal("does not say how long the file is, so that a cut would pass for its end")
        if size is not None and total not in (None, size):
            raise _Refusal(f"offers {total:,} bytes, expected {size:,}")
        expected = size if size is not None else total
        _check_space(part, expected)
        bar.total = expected
        bar.n = bar.initial = have
        bar.refresh()
        with open(part, "ab" if have else "wb") as out:
            if not have:
                _write_json(_beside(part, "json"), {"url": url, "mark": mark, "total": total})
            for block in _blocks(response, sniff=not have):
                have += len(block)
                if have > (LARGEST if expected is None else expected):
                    out.truncate(0)
                    raise _Refusal(f"sends more than the {expected or LARGEST:,} bytes expected")
                out.write(block)
                bar.update(len(block))
                if have == total:
                    break
    needed = expected or 1  # nobody registers an empty file
    if have < needed:
        raise _Again(f"cut off after {have:,} of {needed:,} bytes")
    if _starts(part, b"PK\3\4") and not zipfile.is_zipfile(part):
        part.unlink()
        raise _Refusal("sent an archive without its end")


def _open(url: str, have: int, part: Path, terms: Terms) -> HTTPResponse:
    """Ask a mirror for the bytes from `have` on."""
    _check_scheme(url, terms.loopback)
    headers = {"User-Agent": "flowturbo", "Accept-Encoding": "identity"}  # a length is that of the file itself
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        return _opener(terms.loopback).open(Request(url, headers=headers), timeout=terms.stall)
    except HTTPError as error:
        error.close()
        if error.code == 416:
            part.unlink(missing_ok=True)
            raise _Again("the file there has become shorter; starting over") from None
        reason = f"HTTP {error.code} {error.reason}".rstrip()
        raise (_Again if error.code in (408, 429) or error.code >= 500 else _Refusal)(reason) from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, socket.gaierror):  # no network, or a mistyped host: waiting helps neither
            raise _Refusal("its host is not found") from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _Refusal(f"its certificate is not valid: {cause.verify_message}") from None
        raise _Again(_reason(cause, terms)) from None


def _blocks(response: HTTPResponse, sniff: bool) -> Iterator[bytes]:
    """The body as it arrives; a web page is refused before a byte of it is kept."""
    try:
        if sniff:
            head = response.read(512)
            if PAGE.match(head):
                raise _Refusal("sent a web page in place of the file")
            yield head
        while block := response.read1(BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise _Again(_reason(error)) from None


def _reason(error: Any, terms: Terms | None = None) -> str:
    if isinstance(error, TimeoutError):
        return "no byte for too long" if terms is None else f"no answer in {terms.stall:g} s"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _check_scheme(url: str, loopback: bool) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (loopback and (parts.scheme, parts.hostname) == ("http", "127.0.0.1")):
        raise _Refusal(f"leads to {parts.scheme}://{parts.hostname}, which is not https")


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but not away from https."""

    def __init__(self, loopback: bool):
        self.loopback = loopback

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl, self.loopback)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(loopback: bool) -> OpenerDirector:
    return build_opener(_Redirects(loopback))


def _check_space(part: Path, expected: int | None) -> None:
    """Raises OSError where the rest of the file does not fit on the disk."""
    needed = (expected or 0) - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OSError(
            f"no space for {part.name[1:].removesuffix('.part')}: {needed:,} bytes are missing, {part.parent} has "
            f"{free:,} free; choose another folder with --cache-dir or {CACHE_VARIABLE}"
        )


def _starts(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic
