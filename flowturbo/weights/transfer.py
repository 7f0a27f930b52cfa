"""One file from one mirror: a partial file is continued, and is complete and verified in the end."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from tqdm import tqdm

from flowturbo.system.files import sha256
from flowturbo.weights.cache import CacheUnusable, read_notes, write_notes

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


class Refusal(Exception):
    """A mirror does not have the file; another attempt would tell the same."""


def transfer(url: str, part: Path, name: str, size: int | None, digest: str | None, terms: Terms) -> str:
    """Complete the partial file from one mirror; returns its sha256. Raises Refusal with the mirror's last word."""
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
                    raise Refusal(f"sent a file of sha256 {found}, expected {digest}")
                old = False  # what an earlier process left may be at fault
                raise _Again("what was continued did not fit")
            except _Again as reason:
                here = part.stat().st_size if part.is_file() else 0
                failures = 1 if here >= reached + BLOCK else failures + 1
                reached = max(reached, here)
                if failures >= terms.attempts:
                    raise Refusal(f"{reason} ({failures} attempts)") from None
                bar.set_postfix_str(str(reason))
                time.sleep(min(30.0, terms.delay * 2 ** (failures - 1)))


def _receive(url: str, part: Path, size: int | None, terms: Terms, bar: tqdm) -> None:
    """One request: append to the partial file where it is the same file's, else begin it anew.

    Raises _Again or Refusal where it is not complete afterwards, OSError where it cannot be written.
    """
    before = read_notes(part)
    have = part.stat().st_size if part.is_file() and before.get("url") == url else 0
    if have and have == before.get("total"):  # a process ended between the last byte and the renaming
        return
    with _open(url, have, part, terms) as response:
        if "html" in response.headers.get_content_type():
            raise Refusal("sent a web page in place of the file")
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
                raise Refusal("does not say how long the file is, so that a cut would pass for its end")
        if size is not None and total not in (None, size):
            raise Refusal(f"offers {total:,} bytes, expected {size:,}")
        expected = size if size is not None else total
        _check_space(part, expected)
        bar.total = expected
        bar.n = bar.initial = have
        bar.refresh()
        with open(part, "ab" if have else "wb") as out:
            if not have:
                write_notes(part, url=url, mark=mark, total=total)
            for block in _blocks(response, sniff=not have):
                have += len(block)
                if have > (LARGEST if expected is None else expected):
                    out.truncate(0)
                    raise Refusal(f"sends more than the {expected or LARGEST:,} bytes expected")
                out.write(block)
                bar.update(len(block))
                if have == total:
                    break
    needed = expected or 1  # nobody registers an empty file
    if have < needed:
        raise _Again(f"cut off after {have:,} of {needed:,} bytes")
    if _starts(part, b"PK\3\4") and not zipfile.is_zipfile(part):
        part.unlink()
        raise Refusal("sent an archive without its end")


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
        raise (_Again if error.code in (408, 429) or error.code >= 500 else Refusal)(reason) from None
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, socket.gaierror):  # no network, or a mistyped host: waiting helps neither
            raise Refusal("its host is not found") from None
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise Refusal(f"its certificate is not valid: {cause.verify_message}") from None
        raise _Again(_reason(cause, terms)) from None


def _blocks(response: HTTPResponse, sniff: bool) -> Iterator[bytes]:
    """The body as it arrives; a web page is refused before a byte of it is kept."""
    try:
        if sniff:
            head = response.read(512)
            if PAGE.match(head):
                raise Refusal("sent a web page in place of the file")
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
        raise Refusal(f"leads to {parts.scheme}://{parts.hostname}, which is not https")


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
    """Raises CacheUnusable where the rest of the file does not fit on the disk."""
    needed = (expected or 0) - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise CacheUnusable(
            f"no space for {part.name[1:].removesuffix('.part')}: {needed:,} bytes are missing, {part.parent} has "
            f"{free:,} free"
        )


def _starts(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic
