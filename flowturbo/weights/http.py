"""One request to a mirror: what it may lead to, and its answer as it arrives, at least so fast."""

from __future__ import annotations

import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, getproxies

from flowturbo.system.values import plain

BLOCK = 1 << 20


@dataclass(frozen=True)
class Terms:
    """The terms of a transfer; times in seconds."""

    stall: float = 30.0  # without a byte, until an attempt is given up
    rate: float = 10_000.0  # bytes a second; an attempt is given up that is slower over the time of a stall
    attempts: int = 5  # in a row without a MiB of progress, until a mirror is given up
    delay: float = 1.0  # before the second attempt; doubles each time, up to 30
    ranks: float = 600.0  # without a byte of progress, until a rank that waits for rank 0 gives up
    loopback: bool = False  # for tests: http://127.0.0.1 passes for https


class Again(Exception):
    """An attempt failed in a way that another may not."""


class Gone(Again):
    """The mirror has no byte from where a download goes on."""


class Refusal(Exception):
    """A mirror does not have the file; another attempt would tell the same."""


class Answer:
    """A mirror's answer with the bytes of a file from `start` on: status and headers, length, and `blocks` of its body.

    A thread of its own asks and reads: a server that sends a byte of its headers now and then would hold whoever
    waits for them for ever. Raises Again or Refusal.
    """

    def __init__(self, url: str, start: int, terms: Terms):
        check_address(url, terms.loopback)
        self.terms = terms
        self.response: HTTPResponse
        self.length: int | None  # of the body
        headers = {"User-Agent": "flowturbo", "Accept-Encoding": "identity"}  # a length is that of the file itself
        if start:
            headers["Range"] = f"bytes={start}-"
        self._inbox: queue.Queue[Any] = queue.Queue(maxsize=4)
        self._left = threading.Event()
        threading.Thread(target=self._read, args=[Request(url, headers=headers)], daemon=True).start()
        try:
            self.response, self.length = self._next(4 * terms.stall)
        except queue.Empty:
            raise Again(f"no whole answer in {4 * terms.stall:g} s") from None
        except HTTPError as error:
            error.close()
            if error.code == 416:
                raise Gone("the file there has become shorter; starting over") from None
            reason = plain(f"HTTP {error.code} {error.reason}".rstrip(), 200)
            raise (Again if error.code in (408, 429) or error.code >= 500 else Refusal)(reason) from None
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, socket.gaierror):  # no network, or a mistyped host: waiting helps neither
                raise Refusal("its host is not found") from None
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Refusal(f"its certificate is not valid: {cause.verify_message}") from None
            raise Again(_reason(cause, f"no answer in {terms.stall:g} s")) from None

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the thread to its end, which it finds once the socket's time is out."""
        self._left.set()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()

    def _read(self, request: Request) -> None:
        try:
            opener = build_opener(_Redirects(self.terms.loopback))
            with opener.open(request, timeout=self.terms.stall) as response:
                self._inbox.put((response, response.length))  # before reading: then it is what is left
                while not self._left.is_set():
                    self._inbox.put(block := response.read1(BLOCK))
                    if not block:
                        return
        except Exception as error:  # raised where it is waited for
            self._inbox.put(error)

    def _next(self, seconds: float) -> Any:
        """What the thread tells next. Raises what it met, and queue.Empty where it tells nothing."""
        found = self._inbox.get(timeout=max(0.0, seconds))
        if isinstance(found, Exception):
            raise found
        return found

    def blocks(self) -> Iterator[bytes]:
        """The body as it arrives. Raises Again where it comes too slowly; the time of the caller does not count."""
        waited, arrived = 0.0, 0
        while True:
            since, block = time.monotonic(), b""
            try:
                block = self._next(self.terms.stall - waited)
                if not block:
                    return
            except queue.Empty:
                pass
            except (OSError, HTTPException, ValueError) as error:
                raise Again(_reason(error, "no byte for too long")) from None
            waited, arrived = waited + time.monotonic() - since, arrived + len(block)
            if block:
                yield block
            if waited >= self.terms.stall:
                if arrived < self.terms.rate * waited:
                    slow = f"slower than {self.terms.rate:,.0f} bytes a second"
                    raise Again(slow if arrived else "no byte for too long")
                waited, arrived = 0.0, 0


def _reason(error: Any, timeout: str) -> str:
    if isinstance(error, TimeoutError):
        return timeout
    return plain(str(getattr(error, "strerror", None) or error or type(error).__name__), 200)


def check_address(url: str, loopback: bool) -> None:
    """Raises Refusal for what is not https; with `loopback` http://127.0.0.1 passes."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (loopback and (parts.scheme, parts.hostname) == ("http", "127.0.0.1")):
        raise Refusal(plain(f"leads to {parts.scheme}://{parts.hostname}, which is not https", 200))


def check_public(host: str | None) -> None:
    """Raises Refusal for a host on this machine or in a private network: no public mirror leads there.

    Behind a proxy names may not be known here: the proxy asks in our place, and this machine is not reached.
    """
    try:
        found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        if getproxies():
            return
        raise Refusal("leads to a host that is not found") from None
    for *_, place in found:
        address: Any = ipaddress.ip_address(str(place[0]).partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_global:
            raise Refusal(plain(f"leads to {host}, which is {address}, no public address", 200))


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but not away from https, nor into private networks."""

    def __init__(self, loopback: bool):
        self.loopback = loopback

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_address(newurl, self.loopback)
        parts = urlsplit(newurl)
        if not (self.loopback and parts.scheme == "http"):
            check_public(parts.hostname)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
