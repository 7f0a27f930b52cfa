"""Images in zip and tar archives, read where they lie: their members are listed once, and nothing is unpacked.

Beside an image may lie fields of the same name, as webdataset has them: 1.jpg with 1.cls, 1.txt, 1.json.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flowturbo.data.images import ImageBytes
from flowturbo.data.walk import IMAGE, OTHER, kind_of_path

LARGEST = 2**28  # bytes of a member; what announces more is no image
DEFLATE_LIMIT = 1032  # deflate cannot shrink data further, so an announced size beyond it is a lie
ENCRYPTED = 1  # a flag of a zip's member
LOCAL_HEADER = 30  # bytes in a zip before a member's name and bytes
BLOCK = 512  # bytes of a tar's headers, and what members are padded to
HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)  # of what comes next
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}  # by their first two bytes


class Member(NamedTuple):
    """A file in an archive, and where it lies in it."""

    name: str
    offset: int  # of its bytes; in a zip of the header before them
    size: int
    packed: int  # bytes that it takes in the archive
    deflated: bool = False
    checksum: int = -1  # CRC-32 of a zip's member; a tar has none


class Place(NamedTuple):
    """Where a member lies: what is kept of it."""

    archive: int  # position in the list of files
    offset: int
    size: int
    packed: int
    deflated: int
    checksum: int


class ArchivedImages:
    """The images of zip or tar archives, one archive after another, and the fields beside them.

    Those of a zip come in the order of their paths, those of a tar in the order in which they lie. Hidden and system
    members are passed over, as in folders; folders that all images lie in, and below them in further ones, are not part
    of their names. It can be pickled, and read after a fork: files are opened for each reading.
    Raises ValueError naming the archive, and the member, where one is damaged, encrypted, too large or compressed in
    another way, or has a path that leads out of the archive.
    """

    def __init__(self, files: Sequence[str]):
        self.files, self.skipped = list(files), Counter[str]()
        self.names: list[str] = []
        self._images, self._others = array("q"), array("q")  # places, one behind another
        self._beside: dict[str, array[int]] = {}  # by field: which of the others lies beside each image; -1 for none
        for number, file in enumerate(self.files):
            self._add(number, _zip_members(file) if file.lower().endswith(".zip") else _tar_members(file))
        for beside in self._beside.values():
            _extend(beside, len(self))
        self._common = common_folder(self.names)
        if self._common:
            self.names = [name[len(self._common) :] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fields(self) -> list[str]:
        """The kinds of fields that lie beside images, like "cls", "json" and "txt"."""
        return sorted(self._beside)

    def file(self, index: int) -> str:
        """The archive that image number `index` lies in."""
        return self.files[_place(self._images, index).archive]

    def where(self, index: int) -> str:
        """What messages call image number `index`."""
        return f"{self.file(index)}: {self._common}{self.names[index]}"

    def read(self, index: int) -> ImageBytes:
        """An image as it is stored, encoded. Raises ValueError naming one that is damaged."""
        (content,) = self._contents([(_place(self._images, index), self._common + self.names[index])])
        return ImageBytes(self.where(index), content)

    def column(self, field: str) -> list[Any]:
        """A field of every image, as bytes; None where it has none."""
        beside = self._beside.get(field) or [-1] * len(self)
        names = (f"{self._common}{os.path.splitext(self.names[i])[0]}.{field}" for i, k in enumerate(beside) if k >= 0)
        found = self._contents(zip((_place(self._others, k) for k in beside if k >= 0), names))
        return [next(found) if k >= 0 else None for k in beside]

    def pieces(self) -> list[tuple[str, int]]:
        """Name and size of everything that the data are known by: of each image."""
        return [(name, self._images[len(Place._fields) * i + 2]) for i, name in enumerate(self.names)]

    def digest(self, piece: int) -> str:
        """The sha256 of a piece's content."""
        return hashlib.sha256(self.read(piece).content).hexdigest()

    def _add(self, archive: int, members: Iterable[Member]) -> None:
        """Take over the members of an archive, images with what lies beside them."""
        file, stems, others = self.files[archive], dict[str, int](), list[tuple[str, str, Member]]()
        for member in members:
            name = _checked(file, member)
            stem, suffix = os.path.splitext(name)
            kind = kind_of_path(name)
            if kind == OTHER and suffix:
                others.append((stem, suffix[1:].lower(), member))
            elif kind != IMAGE:
                self.skipped[kind] += 1
            else:
                if stem in stems and name == self.names[stems[stem]]:
                    raise ValueError(f"{file}: {name} comes twice")
                stems[stem] = len(self)
                self.names.append(name)
                self._images.extend((archive, *member[1:]))
        for stem, field, member in others:
            if stem in stems:
                beside = self._beside.setdefault(field, array("q"))
                _extend(beside, stems[stem] + 1)
                beside[stems[stem]] = len(self._others) // len(Place._fields)
                self._others.extend((archive, *member[1:]))
            else:
                self.skipped[OTHER] += 1

    def _contents(self, members: Iterable[tuple[Place, str]]) -> Iterator[bytes]:
        """The bytes of members, given with their names."""
        at, descriptor = -1, -1
        try:
            for place, name in members:
                if place.archive != at:
                    if descriptor >= 0:
                        os.close(descriptor)
                        descriptor = -1
                    at, descriptor = place.archive, _open(self.files[place.archive])
                try:
                    content = _read(descriptor, place)
                except (ValueError, zlib.error, OSError) as error:
                    raise ValueError(f"{self.files[at]}: {name} is damaged: {error}") from None
                yield content
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def common_folder(names: Sequence[str]) -> str:
    """The folders, as "a/b/", that all paths begin with while they lie in further ones below; empty for none."""
    common = ""
    while names:
        folder = names[0][len(common) :].partition("/")[0] + "/"
        deeper = common + folder
        if not all(name.startswith(deeper) and "/" in name[len(deeper) :] for name in names):
            break
        common = deeper
    return common


def _place(places: array[int], index: int) -> Place:
    width = len(Place._fields)
    return Place(*places[width * index : width * (index + 1)])


def _extend(beside: array[int], length: int) -> None:
    beside.extend([-1] * (length - len(beside)))


def _open(file: str) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot read {file!r}: {error.strerror}") from None


def _read(descriptor: int, place: Place) -> bytes:
    """The bytes of a member, unpacked; never more than were announced."""
    offset = place.offset
    if place.checksum >= 0:
        header = os.pread(descriptor, LOCAL_HEADER, offset)
        if len(header) < LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise ValueError("there is no header where it should begin")
        offset += LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = os.pread(descriptor, place.packed, offset)
    if len(content) < place.packed:
        raise ValueError("the archive ends in the middle of it")
    if place.deflated:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, place.size + 1)
    if len(content) != place.size or (place.checksum >= 0 and zlib.crc32(content) != place.checksum):
        raise ValueError("its checksum is another")
    return content


def _checked(file: str, member: Member) -> str:
    """The name of a member, as a plain relative path. Raises ValueError for one that cannot be taken."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{file}: the path {name!r} leads out of the archive")
    if max(member.size, member.packed) > LARGEST:
        raise ValueError(f"{file}: {name} announces {member.size:,} bytes, expected at most {LARGEST:,}")
    if member.deflated and member.size > DEFLATE_LIMIT * member.packed:
        raise ValueError(f"{file}: {name} announces {member.size:,} bytes packed into {member.packed:,}")
    return os.path.normpath(name)


def _zip_members(file: str) -> list[Member]:
    """The files in a zip, by their paths."""
    members = []
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"cannot read {file!r}: a damaged zip archive ({error})") from None
    for info in infos:
        name = info.filename.replace("\\", "/")  # as programs of Windows have written
        if info.is_dir():
            continue
        if info.flag_bits & ENCRYPTED:
            raise ValueError(f"{file}: {name} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{file}: {name} is compressed by method {info.compress_type}, expected 0 or 8 (deflate)")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        members.append(Member(name, info.header_offset, info.file_size, info.compress_size, deflated, info.CRC))
    return sorted(members, key=lambda member: member.name.replace("/", "\0"))


def _tar_members(file: str) -> Iterator[Member]:
    """The files in a tar, as they lie."""
    descriptor = _open(file)
    try:
        end, position, told = os.fstat(descriptor).st_size, 0, dict[str, str]()
        while True:
            block = os.pread(descriptor, BLOCK, position)
            if position == 0 and block[:2] in COMPRESSED:
                packing = f"compressed by {COMPRESSED[block[:2]]}"
                raise ValueError(f"{file} is {packing}, and cannot be read by position: expected a plain tar")
            if len(block) < BLOCK:
                raise ValueError(f"{file} is truncated: it ends at byte {end:,} without a mark of its end")
            if not any(block):
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                what = f"damaged at byte {position:,}" if position else "no tar archive, or a damaged one"
                raise ValueError(f"{file} is {what}") from None
            name, size = told.get("path", info.name), int(told.get("size", info.size))
            position += BLOCK
            has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in HEADERS
            stored = size if has_content else 0
            if position + stored > end:
                raise ValueError(f"{file} is truncated: it ends in the middle of {name}")
            if info.type in HEADERS:
                told |= _told(file, name, info.type, os.pread(descriptor, min(size, 2**20), position))
            else:
                if info.type == tarfile.GNUTYPE_SPARSE:
                    raise ValueError(f"{file}: {name} is stored as a sparse file")
                if info.isreg():
                    yield Member(name, position, size, size)
                told = {}
            position += -(-stored // BLOCK) * BLOCK
    finally:
        os.close(descriptor)


def _told(file: str, name: str, kind: bytes, content: bytes) -> dict[str, str]:
    """What a header says of the member after it: "path" and "size", where it does."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found = {}
    while kind == tarfile.XHDTYPE and content.strip(b"\0"):  # lines of "LENGTH KEY=VALUE\n"
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = content[len(digits) + 1 : max(0, length - 1)].partition(b"=")
        if not equals:
            raise ValueError(f"{file}: {name} is damaged: a header that says nothing")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    if not found.get("size", "0").isdigit():
        raise ValueError(f"{file}: {name} is damaged: a size of {found['size'][:20]!r}")
    return found
