"""One file from one mirror: a partial file is continued, and is complete and verified in the end."""

from __future__ import annotations

import re
import shutil
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from flowturbo.system.files import open_own, sha256
from flowturbo.system.values import plain, shown
from flowturbo.weights.cache import CacheUnusable, read_notes, write_notes
from flowturbo.weights.http import BLOCK, Again, Answer, Gone, Refusal, Terms
from flowturbo.weights.registry import RemoteFile

LARGEST = 1 << 36  # where neither registry nor mirror tells a length
ABOUT = 3  # how many times larger or smaller than expected a file of unpublished size may be
HEAD = 512  # bytes by which a file's format is known
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
POINTER = re.compile(rb"version https://git-lfs")
FORMATS = {  # of RemoteFile.format
    "torch": re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"),
    "safetensors": re.compile(rb"[\s\S]{8}\s*\{"),
    "json": re.compile(rb"\s*\{"),
    "npz": re.compile(rb"PK\x03\x04"),
}


def transfer(url: str, part: Path, file: RemoteFile, size: int | None, digest: str | None, terms: Terms) -> str:
    """Complete the partial file from one mirror; returns its sha256. Raises Refusal with the mirror's last word.

    `size` and `digest` are those that the file must have; None where they are not known.
    """
    _drop_planted(part)
    old, reached, failures = part.is_file(), 0, 0
    name = Path(file.path).name
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:
        while True:
            try:
                _receive(url, part, file, size, terms, bar)
                found = sha256(part)
                if digest in (None, found):
                    return found
                part.unlink()
                if not old:
                    raise Refusal(f"sent a file of sha256 {found}, expected {digest}")
                old = False  # what an earlier process left may be at fault
                raise Again("what was continued did not fit")
            except Again as reason:
                here = part.stat().st_size if part.is_file() else 0
                failures = 1 if here >= reached + BLOCK else failures + 1
                reached = max(reached, here)
                if failures >= terms.attempts:
                    raise Refusal(f"{reason} ({failures} attempts)") from None
                bar.set_postfix_str(str(reason))
                time.sleep(min(30.0, terms.delay * 2 ** (failures - 1)))


def _receive(url: str, part: Path, file: RemoteFile, size: int | None, terms: Terms, bar: tqdm) -> None:
    """One request: append to the partial file where it is the same file's, else begin it anew.

    Raises Again or Refusal where it is not complete afterwards, OSError where it cannot be written.
    """
    before = read_notes(part)
    have = part.stat().st_size if part.is_file() and before.get("url") == url else 0
    if have and have == before.get("total"):  # a process ended between the last byte and the renaming
        return
    try:
        answer = Answer(url, have, terms)
    except Gone:
        part.unlink(missing_ok=True)
        raise
    with answer:
        headers = answer.response.headers
        _check_kind(answer)
        mark = headers.get("ETag") or headers.get("Last-Modified")
        if answer.response.status == 206:
            span = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18})", headers.get("Content-Range", ""))
            total = int(span[2]) if span else None
            if span is None or int(span[1]) != have or (mark, total) != (before.get("mark"), before.get("total")):
                part.unlink(missing_ok=True)
                raise Again("the file there has changed; starting over")
        else:
            have, total = 0, answer.length
            if total is None and size is None and not answer.response.chunked:
                raise Refusal("does not say how long the file is, so that a cut would pass for its end")
        _check_size(total, file, size)
        expected = size if size is not None else total
        _check_space(part, expected)
        bar.total = expected
        bar.n = bar.initial = have
        bar.refresh()
        with open_own(part, append=bool(have)) as out:
            if not have:
                write_notes(part, url=url, mark=mark, total=total)
            have = _write(answer.blocks() if have else _sniffed(answer.blocks(), file), out, have, expected, bar)
    needed = expected or 1  # nobody registers an empty file
    if have < needed:
        raise Again(f"cut off after {have:,} of {needed:,} bytes")
    try:
        _check_size(have, file, size)
        if _starts(part, b"PK\3\4") and not zipfile.is_zipfile(part):
            raise Refusal("sent an archive without its end")
    except Refusal:
        part.unlink()
        raise


def _write(blocks: Iterator[bytes], out: IO[bytes], have: int, expected: int | None, bar: tqdm) -> int:
    """Write the blocks behind the `have` bytes that are there; returns how many there are then."""
    for block in blocks:
        have += len(block)
        if have > (LARGEST if expected is None else expected):
            out.truncate(0)
            raise Refusal(f"sends more than the {expected or LARGEST:,} bytes expected")
        out.write(block)
        bar.update(len(block))
        if have == expected:
            break
    return have


def _check_kind(answer: Answer) -> None:
    """Raises Refusal for headers that announce something else than the file's own bytes."""
    headers = answer.response.headers
    if "html" in headers.get_content_type():
        raise Refusal("sent a web page in place of the file")
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):  # which nobody asked for
        raise Refusal(f"sent the file packed ({plain(encoding, 40)})")


def _check_size(found: int | None, file: RemoteFile, size: int | None) -> None:
    """Raises Refusal for a length that is not the file's, as far as that is known."""
    if found is None:
        return
    if size is not None and found != size:
        raise Refusal(f"offers {found:,} bytes, expected {size:,}")
    least, most = (0, LARGEST) if file.about is None else (file.about // ABOUT, file.about * ABOUT)
    if size is None and not least <= found <= most:
        known = f"at most {most:,}" if file.about is None else f"about {file.about:,}"
        raise Refusal(f"offers {found:,} bytes, expected {known}")


def _sniffed(blocks: Iterator[bytes], file: RemoteFile) -> Iterator[bytes]:
    """The blocks of a file from its beginning, once that is the beginning of such a file. Raises Refusal."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= HEAD:
            break
    if PAGE.match(head):
        raise Refusal("sent a web page in place of the file")
    if POINTER.match(head):
        raise Refusal("sent a pointer of git-lfs in place of the file")
    if head and file.format and not FORMATS[file.format].match(head):
        raise Refusal(f"sent no {file.format} file, it begins with {shown(head[:16])}")
    yield head
    yield from blocks


def _drop_planted(part: Path) -> None:
    """Remove what is no file of its own in the place of a partial one: a link would have another file written to."""
    with suppress(FileNotFoundError):
        status = part.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            part.unlink()


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
