"""Which data a run has: fingerprints of their content, the rules by which they are read, and what has changed since."""

from __future__ import annotations

import hashlib
import heapq
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowturbo.data.images import DEPTH, ORIENTATION, TRANSPARENCY, check_file, in_threads
from flowturbo.system.files import sha256
from flowturbo.system.values import shown

if TYPE_CHECKING:
    from flowturbo.data.folders import TrainingData

CONTENT_BYTES, CONTENT_FILES = 2_000_000_000, 20_000  # up to here fingerprints hold the content of all files
SAMPLED_FILES = 4096  # beyond, that of so many, as far as CONTENT_BYTES go

PROBED, WAITING = 1000, 20e-6  # files looked at first, and seconds for each from which on a disk is waited for

ORDER, CLASSES = "order", "classes"
READING_RULES = {ORDER: 2, CLASSES: 2, ORIENTATION: 2, TRANSPARENCY: 2, DEPTH: 2}  # the versions of this code
RULES_OF_0_1 = dict.fromkeys(READING_RULES, 1)
WHAT_CHANGED = {  # from version 1 to 2
    ORDER: "hidden and system entries are passed over, folders behind links read once, and files sorted by their paths",
    CLASSES: "class folders that are numbers are sorted by value",
    ORIENTATION: "images are turned upright by their EXIF orientation",
    TRANSPARENCY: "transparent pixels are shown on a background",
    DEPTH: "images of 16 bits are scaled",
}


class Fingerprint(NamedTuple):
    """A sha256, and what it holds, in words."""

    digest: str
    covers: str


@dataclass(frozen=True)
class Identity:
    """What a run records of its data, to know them again. None: not known."""

    fingerprint: str | None  # sha256 over names, sizes and content
    covers: str  # what the fingerprint holds, in words
    labels: str | None  # sha256 over the class index of each image
    fingerprint_of_0_1: str | None  # sha256 over names and sizes of the files that version 0.1 took, as it recorded
    rules: Mapping[str, int]  # READING_RULES that the images were read by
    background: str | None = None  # of transparent pixels
    latents: str | None = None  # sha256 over the cached latents, where the data are such

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def sizes_of(root: str, files: Sequence[str]) -> list[int]:
    """The size of each file, given relative to a folder. Raises ValueError naming what is no file."""
    descriptor = os.open(root, os.O_RDONLY)

    def sizes(part: Sequence[str]) -> list[int]:
        found = []
        for file in part:
            try:
                status = os.stat(file, dir_fd=descriptor)
                is_file = stat.S_ISREG(status.st_mode)
            except OSError:
                is_file = False
            found.append(status.st_size if is_file else check_file(os.path.join(root, file)).st_size)
        return found

    try:
        began = time.perf_counter()
        first = sizes(files[:PROBED])
        if time.perf_counter() - began < PROBED * WAITING:  # threads would only wait for each other
            return first + sizes(files[PROBED:])
        parts = [files[start : start + PROBED] for start in range(PROBED, len(files), PROBED)]
        return first + [size for found in in_threads(sizes, parts) for size in found]
    finally:
        os.close(descriptor)


def fingerprint_pieces(
    pieces: Sequence[tuple[str, int]], digest: Callable[[int], str], what: str = "files"
) -> Fingerprint:
    """A fingerprint of pieces of data (`what` they are), by name and size: these and their content, in their order.

    `digest` gives the sha256 of the content of a piece. Where they are more than CONTENT_FILES or CONTENT_BYTES, the
    fingerprint holds the content of SAMPLED_FILES of them, which their names and sizes pick; of less where these are
    larger than CONTENT_BYTES.
    """
    lines = _lines(pieces)
    chosen: Sequence[int] = range(len(pieces))
    covers = f"the content of all {len(pieces):,} {what}"
    if len(pieces) > CONTENT_FILES or sum(size for _, size in pieces) > CONTENT_BYTES:
        chosen = sample_of(lines)
        total = np.cumsum([pieces[i][1] for i in chosen])
        chosen = chosen[: max(1, int((total <= CONTENT_BYTES).sum()))]
        covers = f"names and sizes of all {len(pieces):,} {what}, and the content of {len(chosen):,}"
    digests = in_threads(digest, chosen)
    content = (f"{i} {digest}\n".encode() for i, digest in sorted(zip(chosen, digests)))
    return Fingerprint(hashlib.sha256(b"".join([*lines, *content])).hexdigest(), covers)


def fingerprint_files(root: str, files: Sequence[str], sizes: Sequence[int]) -> Fingerprint:
    """That of files, given relative to a folder."""
    return fingerprint_pieces(list(zip(files, sizes)), lambda i: sha256(os.path.join(root, files[i])))


def fingerprint_sizes(files: Sequence[str], sizes: Sequence[int]) -> str:
    """Version 0.1's fingerprint, over relative paths and sizes."""
    return hashlib.sha256(b"".join(_lines(zip(files, sizes)))).hexdigest()


def sample_of(lines: Sequence[bytes]) -> list[int]:
    """The positions of at most SAMPLED_FILES lines, picked by their content alone."""
    return heapq.nsmallest(SAMPLED_FILES, range(len(lines)), key=lambda i: hashlib.sha256(lines[i]).digest())


def _lines(pieces: Iterable[tuple[str, int]]) -> list[bytes]:
    return [os.fsencode(f"{name}\0{size}\n") for name, size in pieces]


def fingerprint_labels(labels: Sequence[int]) -> str:
    """A sha256 over the class index of each image, in order."""
    return hashlib.sha256(np.asarray(labels, np.int64).tobytes()).hexdigest()


def data_changes(before: object, data: TrainingData) -> list[str]:
    """What has changed in the data since a run recorded `before`, in words; none where they are the same images.

    `before` is the record of an Identity, the fingerprint that version 0.1 recorded, or None where none was.
    """
    if before is None:
        return []
    if isinstance(before, str):  # version 0.1's
        before = {"fingerprint_of_0_1": before, "rules": RULES_OF_0_1}
    if not isinstance(before, Mapping) or not isinstance(before.get("rules"), Mapping):
        return ["the record of the data is damaged"]
    now = data.identity()
    changes = [_rule_change(rule, before["rules"].get(rule), version, data) for rule, version in now.rules.items()]
    changes = [change for change in changes if change]
    name = "fingerprint" if before.get("fingerprint") and now.fingerprint else "fingerprint_of_0_1"
    if before.get(name) != getattr(now, name):
        changes.append("the data have other images")
    if before.get("labels") not in (None, now.labels):
        changes.append("the images have other classes")
    if before.get("latents") and now.latents and before["latents"] != now.latents:
        changes.append("the cached latents have other content")
    backgrounds = before.get("background"), now.background
    if None not in backgrounds and backgrounds[0] != backgrounds[1] and data.read_otherwise(TRANSPARENCY) != 0:
        changes.append(f"the background was {shown(backgrounds[0])}, is {shown(backgrounds[1])}")
    return changes


def _rule_change(rule: str, before: object, now: int, data: TrainingData) -> str:
    """What a rule of another version changes in the data; empty where it changes none of their images."""
    if before == now:
        return ""
    known = {before, now} == {1, 2} if isinstance(before, int) else False
    count = data.read_otherwise(rule) if known else None
    if count == 0:
        return ""
    what = f" ({WHAT_CHANGED[rule]}; images that this changes: {count or 'not known'})" if known else ""
    return f"the rule {rule!r} of reading images was of version {shown(before)}, is of version {now}{what}"
