"""A mirror on this machine that behaves as mirrors do, and downloads from it."""

import hashlib
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flowturbo.weights import cache
from flowturbo.weights.fetch import DownloadFailed, Terms, fetch
from flowturbo.weights.registry import Asset, RemoteFile

BODY = bytes(range(7, 247)) * 1000
FAST = Terms(stall=5, attempts=3, delay=0.01, ranks=0.4, loopback=True)
HASTY = replace(FAST, stall=0.2)


class Server(ThreadingHTTPServer):
    """Answers each path with the callables listed for it, one a request, the last again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.released = {}, [], threading.Event()

    def url(self, *answers, path="/file"):
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        """Clients that leave are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        answers = self.server.answers[self.path.partition("?")[0]]
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        self.close_connection = True

    def log_message(self, *args):
        pass


def serve(body=BODY, *, etag='"1"', ranges=True, cut=None, claim=None, kind="application/octet-stream", then=None):
    """An answer with `body`: in ranges or not, ending after `cut` bytes, with a false length `claim`."""

    def answer(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        start = int(asked[1]) if asked else 0
        length = len(body) if claim is None else claim
        if asked and start >= length:
            return status(416)(handler)
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(length - start))
        if etag:
            handler.send_header("ETag", etag)
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
        handler.end_headers()
        handler.wfile.write(body[start:] if cut is None else body[start : max(start, cut)])
        handler.wfile.flush()
        if then:
            then(handler)

    return answer


def chunked(body):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(body), 50_000):
            piece = body[start : start + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def status(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def wait_for_release(handler):
    handler.server.released.wait(10)


def sha(body):
    return hashlib.sha256(body).hexdigest()


def drip(handler):
    """A byte now and then, for ever: of the body, of a chunk's length or of the headers."""
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b"0")


def headers_of(**headers):
    """An answer's status and headers, by the names as Python has them; then a body that drips."""

    def answer(handler):
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        drip(handler)

    return answer


def assets(*urls, path="weights.pt", **known):
    return {"weights": Asset("some weights", "unknown", (RemoteFile(path, urls, **known),))}


def get(*urls, terms=FAST, offline=False, verify=False, **known):
    return fetch("weights", assets=assets(*urls, **known), terms=terms, offline=offline, verify=verify)


def failure(*urls, **known):
    with pytest.raises(DownloadFailed) as caught:
        get(*urls, **known)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot download weights.pt" in message
    assert (caught.value.asset, caught.value.place) == ("weights", str(cache.cache_folder() / "weights.pt"))
    assert not (cache.cache_folder() / "weights.pt").exists()
    return message


def leftovers():
    return sorted(path.name for path in cache.cache_folder().glob(".*") if not path.name.endswith(".lock"))


def failure_after_clearing(*urls, **known):
    for path in cache.cache_folder().iterdir():
        path.unlink()
    return failure(*urls, **known)
