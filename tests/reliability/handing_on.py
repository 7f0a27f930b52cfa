"""Campaigns of what is handed on: downloads from servers that fail and lie, and exports that are killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import struct
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import export
from flowturbo.weights.checkpoint import load_checkpoint
from flowturbo.weights.fetch import Terms, fetch
from flowturbo.weights.registry import Asset, RemoteFile

BODY = b"\x80\2" + random.Random(0).randbytes(3 << 20)
GOOD = 0.25  # how often the server delivers
TERMS = Terms(stall=0.3, attempts=4, delay=0.005, loopback=True)


class Liar(BaseHTTPRequestHandler):
    """Answers as the dice fall: whole, cut, reset, dripping, packed, another file, an error, or nothing."""

    protocol_version = "HTTP/1.1"
    dice = random.Random()

    def do_GET(self) -> None:
        self.close_connection = True
        asked = self.headers.get("Range", "bytes=0-")
        start = min(int(asked[6:-1]), len(BODY))
        ways = [self.cut, self.reset, self.drip, self.packed, self.page, self.error, self.vanish, self.absurd]
        self.whole(start) if self.dice.random() < GOOD else self.dice.choice(ways)(start)

    def head(self, start: int, length: int, **headers: str) -> None:
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(length))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()

    def whole(self, start: int) -> None:
        self.head(start, len(BODY) - start)
        self.wfile.write(BODY[start:])

    def cut(self, start: int) -> None:
        self.head(start, len(BODY) - start)
        self.wfile.write(BODY[start : start + self.dice.randrange(len(BODY))])

    def reset(self, start: int) -> None:
        self.cut(start)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def drip(self, start: int) -> None:
        what = BODY[start : start + 60]  # others, with the same ETag, nobody could tell from the right ones
        if self.dice.random() < 0.5:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            what = b"0" * 60
        else:
            self.head(start, len(BODY) - start)
        for byte in what:
            time.sleep(0.05)
            self.wfile.write(bytes([byte]))

    def packed(self, start: int) -> None:
        self.head(0, 10, Content_Encoding="gzip")
        self.wfile.write(bytes(10))

    def page(self, start: int) -> None:
        body = self.dice.choice([b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", b'{"error": 1}'])
        self.head(0, len(body))
        self.wfile.write(body)

    def error(self, start: int) -> None:
        self.send_error(self.dice.choice([403, 404, 429, 500, 503]), "\x1b[2J")

    def vanish(self, start: int) -> None:
        self.connection.close()

    def absurd(self, start: int) -> None:
        self.head(0, 10**18)
        self.wfile.write(BODY)

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    """Clients that leave are part of the campaign."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


def serve(seed: int) -> tuple[int, int]:
    """A server in a process of its own, since threads do not survive the forks here; its process id and port."""
    server = Quiet(("127.0.0.1", 0), Liar)
    pid = os.fork()
    if not pid:
        Liar.dice = random.Random(seed)
        server.serve_forever()
    server.server_close()
    return pid, server.server_port


def download(argv: Sequence[str]) -> None:
    """URL FOLDER: what download.py does, for a file of the server's; known by its size and format alone."""
    url, folder = argv
    file = RemoteFile("weights.pt", (url,), about=len(BODY), format="torch")
    fetch("weights", folder, terms=TERMS, assets={"weights": Asset("", "", (file,))})


def sockets(lab: Any) -> None:
    """Downloads from a server that cuts, resets, drips and lies, killed at random moments, until the file is there."""
    pid, port = serve(lab.dice.randrange(2**32))
    tries = kills = refusals = 0
    try:
        for _ in range(3 if lab.quick else 40):
            folder = lab.folder()
            victim = folder / "victim"
            victim.write_bytes(b"precious")
            if lab.dice.random() < 0.3:
                (folder / ".weights.pt.part").symlink_to(victim)
            for _ in range(200):
                run = lab.run(download, [f"http://127.0.0.1:{port}/file", str(folder)], folder / "out.txt")
                tries += 1
                if not run.wait(lab.dice.uniform(0, 0.5) if lab.dice.random() < 0.3 else 60):
                    lab.expect(run.codes.get(0) != 124, f"a download hung: {run.text[-600:]}")
                    run.kill()
                    kills += 1
                code = run.codes[0]
                refusals += code == 2
                good = code in (0, 2, -signal.SIGKILL) and "Traceback" not in run.text and "\x1b[2J" not in run.text
                lab.expect(good, f"a download ended with {code}: {run.text[-600:]}")
                if (folder / "weights.pt").exists():
                    break
            lab.expect((folder / "weights.pt").read_bytes() == BODY, f"{folder}: other bytes than the server's")
            lab.expect(victim.read_bytes() == b"precious", f"{folder}: a planted link was followed")
            shutil.rmtree(folder)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lab.figure("downloads from a server that lies", tries, f"{refusals} refused, {kills} killed; every file is right")


def same_content(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two exports hold the same; their bytes may differ, since safetensors writes metadata in any order."""
    weights = one["ema"].keys() == other["ema"].keys() and all(
        torch.equal(value, other["ema"][name]) for name, value in one["ema"].items()
    )
    return weights and one["config"] == other["config"]


def exports(lab: Any) -> None:
    """SIGKILL at random moments of exports: what was there before, or the whole file, and nothing else."""
    folder = lab.folder()
    total = whole = 0
    out, log = folder / "out.safetensors", folder / "log.txt"
    argv = [str(lab.predictor), "-o", str(out)]
    began = time.monotonic()
    lab.expect(lab.run(export.main, argv, log).wait(), f"export: {log.read_text()[-600:]}")
    took, right = time.monotonic() - began, load_checkpoint(out)
    # Copies: the tensors are views of the file, which is written over below.
    right["ema"] = {name: value.clone() for name, value in right["ema"].items()}
    out.write_bytes(b"before")
    for _ in range(4 if lab.quick else 60):
        run = lab.run(export.main, argv, log)
        if not run.wait(lab.dice.uniform(0, took)):
            run.kill()
        total += 1
        if out.read_bytes() != b"before":
            lab.expect(same_content(load_checkpoint(out), right), "an export is neither old nor whole")
            whole += 1
        if lab.dice.random() < 0.5:
            out.write_bytes(b"before")
    lab.expect(
        lab.run(export.main, argv, log).wait() and load_checkpoint(out).keys() == right.keys(), "no export after"
    )
    left = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp"))
    lab.expect(left == ["log.txt", "out.md", "out.safetensors"], f"exports left {left}")
    lab.figure("SIGKILLs of exports", total, f"{whole} had written the whole file, the others nothing")
