"""The one walk over a folder of images, for training, cached latents and evaluation: the same files in one order."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
USUAL = frozenset(spelled for suffix in SUFFIXES for spelled in (suffix[1:], suffix[1:].upper()))
SYSTEM_NAMES = frozenset(  # what macOS, Windows, file servers, disks and Python leave in folders; in lower case
    (
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "#recycle", "lost+found", "__pycache__"),
    )
)
PSEUDO = ("/proc", "/sys", "/dev")  # file systems of the kernel, which hold no images
NOT_PSEUDO = "/dev/shm"

IMAGE = "images"

# The kinds of entries that are passed over.
HIDDEN = "hidden images and folders"
SYSTEM = "system entries"
OTHER = "files that are no images"
REPEATED = "links to folders that are read already"
OUTSIDE = "links to /proc, /sys or /dev"


class Walk(NamedTuple):
    """What a walk has found."""

    files: list[str]  # the images, relative to the root, sorted by the parts of their paths
    folders: list[str]  # the folders right below the root, sorted
    skipped: dict[str, int]  # entries that were passed over, by kind


def kind_of(name: str, hidden: bool = False) -> str:
    """IMAGE, or the kind of entry that a file of this name is passed over as."""
    lower = name.lower()
    if os.path.splitext(lower)[1] not in SUFFIXES:
        return SYSTEM if lower in SYSTEM_NAMES else OTHER
    return IMAGE if hidden else _kind_of_unseen(lower) or IMAGE


def kind_of_path(path: str) -> str:
    """As `kind_of`, for a path whose folders may be hidden, or a system's, too."""
    *folders, name = path.split("/")
    return next(filter(None, map(_kind_of_unseen, map(str.lower, folders))), None) or kind_of(name)


def _kind_of_unseen(name: str) -> str:
    """SYSTEM or HIDDEN for a file or folder of such a name, in lower case; else empty."""
    return SYSTEM if name in SYSTEM_NAMES else HIDDEN if name.startswith(".") else ""


def describe(skipped: Mapping[str, int]) -> str:
    """What was passed over, in words: "system entries: 2, files that are no images: 1"; empty for nothing."""
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(skipped.items()))


def walk(root: str | os.PathLike[str], hidden: bool = False) -> Walk:
    """All images below a folder, by their names' suffixes; folders behind links too, each once.

    Hidden and system entries are passed over, but with `hidden`, as version 0.1 did not, they count. A folder is known
    by its device and inode; where several paths lead to it, the one without links counts, then the first. A link to a
    folder that holds the link is never followed, so that a walk ends. Raises ValueError naming a folder that cannot be
    read.
    """
    top, files, inside, skipped = os.fspath(root), [], [], Counter[str]()
    folders, links = [("", False)], list[tuple[str, bool]]()  # heaps of (relative path, reached through a link)
    seen = set()
    while folders or links:
        folder, linked = heapq.heappop(folders or links)
        number, entries = _read_folder(os.path.join(top, folder) if folder else top)
        if linked and number in seen:
            skipped[REPEATED] += 1
            continue
        seen.add(number)
        if folder and os.sep not in folder:
            inside.append(folder)
        prefix, names = os.path.join(folder, ""), []
        for entry in entries:
            name = entry.name
            stem, _, suffix = name.rpartition(".")
            if suffix in USUAL and stem and stem[0] != "." and not _is_folder(entry):
                names.append(prefix + name)  # without the questions below: most of a million entries end here
                continue
            kind = _kind(entry, hidden)
            if kind == IMAGE:
                names.append(prefix + name)
            elif kind == "folder":
                heapq.heappush(folders, (prefix + name, linked))
            elif kind == "link":
                heapq.heappush(links, (prefix + name, True))
            else:
                skipped[kind] += 1
        names.sort()  # what is nearly sorted is soon sorted
        files += names
    files.sort(key=lambda path: path.replace(os.sep, "\0"))  # as parts: "a/x" comes before "a b/x"
    return Walk(files, sorted(inside), dict(skipped))


def _read_folder(path: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """A folder's device and inode, and what is in it."""
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            return (status.st_dev, status.st_ino), list(entries)
    except OSError as error:
        raise ValueError(f"cannot read folder {path!r}: {error.strerror}") from None


def _kind(entry: os.DirEntry[str], hidden: bool) -> str:
    """IMAGE, "folder", "link" (to a folder that is to be walked), or the kind of entry that is passed over."""
    if not _is_folder(entry):
        return kind_of(entry.name, hidden)
    if not hidden and (unseen := _kind_of_unseen(entry.name.lower())):
        return unseen
    return _kind_of_link(entry.path) if entry.is_symlink() else "folder"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind_of_link(link: str) -> str:
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    if _within(here, target):
        return REPEATED
    if any(_within(target, place) for place in PSEUDO) and not _within(target, NOT_PSEUDO):
        return OUTSIDE
    return "link"


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
