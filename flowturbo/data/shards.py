"""Images packed in files (zip, tar as webdataset has them, parquet): one way to open them, by any path to them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flowturbo.data.archives import ArchivedImages
from flowturbo.data.images import ImageBytes
from flowturbo.data.tables import TabledImages
from flowturbo.data.walk import HIDDEN, IMAGE, SYSTEM, kind_of

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# "train-00000-of-00294.parquet", "imagenet1k-train-0000.tar": one set of several. Not "n01440764.tar", a class.
SET = re.compile(r"(.+?)[-_]\d{2,}(?:-of-\d+)?(?:-[0-9a-f]+)?\.(?:parquet|tar|zip)", re.IGNORECASE)


class Shards(Protocol):
    """Images packed in files, by number, with what is packed beside them."""

    @property
    def files(self) -> Sequence[str]:
        """The packed files."""
        ...

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many members were passed over, by kind."""
        ...

    def __len__(self) -> int: ...

    @property
    def names(self) -> list[str]:
        """What tells the images apart: paths in archives ("cat/1.png"), numbers in tables."""
        ...

    @property
    def fields(self) -> list[str]:
        """What is there beside images: "cls", "json", "txt" in archives, columns in tables."""
        ...

    def file(self, index: int) -> str:
        """The packed file that image number `index` lies in."""
        ...

    def where(self, index: int) -> str:
        """What messages call image number `index`: file and member."""
        ...

    def read(self, index: int) -> ImageBytes:
        """An image, encoded, for `read_image`. Raises ValueError naming one that is damaged."""
        ...

    def column(self, field: str) -> list[Any]:
        """A field of every image, None where there is none: bytes in archives, values in tables."""
        ...

    def pieces(self) -> Sequence[tuple[str, int]]:
        """Name and size of everything that the data are known by."""
        ...

    def digest(self, piece: int) -> str:
        """The sha256 of the content of one of the pieces."""
        ...


READERS: dict[str, Callable[[Sequence[str]], Shards]] = {
    ".zip": ArchivedImages,
    ".tar": ArchivedImages,
    ".parquet": TabledImages,
}


def open_shards(path: str | os.PathLike[str]) -> Shards | None:
    """The images packed in a file, in the files of a folder, or in those that a pattern with * names.

    None for anything else. Files come sorted by their names. Raises ValueError where there are packed files of several
    kinds or sets, or images beside them, and as the readers do.
    """
    files = shard_files(os.fspath(path))
    if not files:
        return None
    if missing := [file for file in files if not os.path.isfile(file)]:  # a pipe would be waited for, for ever
        raise ValueError(f"{missing[0]!r} is {'no file' if os.path.exists(missing[0]) else 'not there'}")
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{os.fspath(path)!r} holds files of several kinds, {', '.join(sorted(kinds))}: expected one")
    sets = sorted({found[1] for file in files if (found := SET.fullmatch(os.path.basename(file)))})
    if len(sets) > 1:
        pattern = os.path.join(os.path.dirname(files[0]), f"{sets[-1]}*{kinds.pop()}")
        raise ValueError(f"{os.fspath(path)!r} holds the sets {', '.join(sets)}: expected one, like {pattern!r}")
    shards = READERS[kinds.pop()](files)
    if not len(shards):
        raise ValueError(f"{os.fspath(path)!r} holds no images, but {', '.join(shards.fields) or 'nothing'}")
    return shards


def is_packed(path: str) -> bool:
    """Whether a path is that of packed files by its name, which may be a pattern with *."""
    return _suffix(path) in READERS or path.lower().endswith(COMPRESSED)


def shard_files(path: str) -> list[str]:
    """The packed files that a path names, sorted; none for a folder with folders, of which one may be the archive.

    Raises ValueError for a folder that holds images besides, and for a compressed tar.
    """
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            found = [entry for entry in entries if kind_of(entry.name) not in (HIDDEN, SYSTEM) and entry.name[0] != "."]
        if any(entry.is_dir() for entry in found):
            return []
        inside = [entry.name for entry in found]
    else:
        found_by = glob.escape(path).replace("[*]", "*")  # nothing but * is a pattern: folders may be called b[1]
        inside = sorted(glob.glob(found_by)) if not os.path.exists(path) and "*" in path else [path]
    if compressed := [name for name in inside if name.lower().endswith(COMPRESSED)]:
        raise ValueError(f"{compressed[0]!r} is compressed, and cannot be read by position: expected a plain tar")
    packed = sorted(name for name in inside if _suffix(name) in READERS)
    if packed and (images := [name for name in inside if kind_of(name) == IMAGE]):
        raise ValueError(f"{path!r} holds images, like {min(images)!r}, beside {packed[0]!r}: expected one of the two")
    return [os.path.join(path, name) for name in packed] if os.path.isdir(path) else packed


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
