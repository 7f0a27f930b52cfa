"""A folder of samples in the making: settings, one file per micro-batch, and the archive at the end.

Micro-batch k holds samples k·B … k·B+B−1 of the run, whichever rank makes it; its file appears whole or not at
all. What is missing is found by asking for each k, never by counting what lies in the folder.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowturbo.system.claims import OtherSettings, check_same, read_record, write_record
from flowturbo.system.files import atomic_write, remove_leftovers, sha256

COUNT = "num_fid_samples"  # the setting that may grow
STORED = "stored"  # in the record of a set that is made again or grows: the digests of its outputs before
_EPOCH = (1980, 1, 1, 0, 0, 0)  # archives of equal content are equal byte for byte


class SampleFolder:
    """`count` samples in micro-batches of `batch` under `folder`; the last one may be trimmed."""

    def __init__(self, folder: str | os.PathLike[str], count: int, batch: int):
        self.folder, self.count, self.batch = Path(folder), count, batch
        self.archive = self.folder.with_name(self.folder.name + ".npz")
        self.features = self.folder.with_name(self.folder.name + "-features.npz")
        self.record = self.folder / "settings.json"
        self.batches = -(-count // batch)

    def numbers(self, k: int) -> range:
        """The sample numbers of micro-batch k, padding included: always `batch` of them."""
        return range(k * self.batch, (k + 1) * self.batch)

    def kept(self, k: int) -> int:
        """How many of micro-batch k's samples belong to the run."""
        return min(self.batch, self.count - k * self.batch)

    def is_complete(self, settings: Mapping[str, Any], maker: Mapping[str, str] | None = None) -> bool:
        """Whether it was made with these settings (JSON types), and its outputs are there as they were recorded.

        It may have fewer samples, which it then is to grow by. `maker` says what would make the rest: code and torch.
        Writes nothing. Raises OtherSettings naming the first difference where the folder was made with other settings,
        is unfinished and of another maker, or holds something else, or its record is damaged.
        """
        found = read_record(self.record)
        if found is None:
            for path in (self.archive, self.features, *self.folder.glob("[!.]*")):
                if path.exists():
                    raise OtherSettings(f"{path} is there and not of this run")
            return False
        before, digests, made = found.get("settings"), found.get("outputs", {}), found.get("made_by")
        if not isinstance(before, dict) or not all(isinstance(part, dict) for part in (digests, found.get(STORED, {}))):
            raise OtherSettings(f"{self.record} is damaged")
        what, settings = f"folder {os.fspath(self.folder)!r}", json.loads(json.dumps(settings))
        grows = type(before.get(COUNT)) is int and before[COUNT] < self.count
        check_same(what, {**before, COUNT: self.count} if grows else before, settings)
        whole = set() if grows else self._whole(digests)
        if digests and whole == digests.keys():
            return True
        all_is_there = self.archive.name in whole  # what else is lost is made of it
        if maker is not None and isinstance(made, dict) and not all_is_there:
            check_same(f"the first part of {what}", made, maker)
        return False

    def claim(self, settings: Mapping[str, Any], maker: Mapping[str, str] | None = None) -> bool:
        """Make the folder for these settings, or go on with one made for the same; whether it is complete.

        Raises as `is_complete`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for output in (self.archive, self.features):
            for leftover in output.parent.glob(f".{glob.escape(output.name)}.*"):
                leftover.unlink(missing_ok=True)
        if self.is_complete(settings, maker):
            return True
        found = read_record(self.record) or {}
        record = {"settings": settings, "made_by": found.get("made_by") or maker}
        if stored := found.get("outputs") or found.get(STORED):  # what has been made is taken from there
            record[STORED] = stored
        write_record(self.record, record)
        return False

    def complete(
        self, settings: Mapping[str, Any], outputs: Iterable[Path], maker: Mapping[str, str] | None = None
    ) -> None:
        """Record the outputs' digests, then drop the micro-batch files."""
        digests = {os.fspath(path.relative_to(self.folder.parent)): sha256(path) for path in outputs}
        maker = (read_record(self.record) or {}).get("made_by") or maker
        write_record(self.record, {"settings": settings, "made_by": maker, "outputs": digests})
        for k in range(self.batches):
            self._path(k).unlink(missing_ok=True)

    def stored(self) -> Stored:
        """The outputs that were made before, as far as they are still as they were recorded."""
        digests = (read_record(self.record) or {}).get(STORED, {})
        return Stored(self, frozenset(self._whole(digests)))

    def _whole(self, digests: Mapping[str, str]) -> set[str]:
        """The names of outputs that have their digests."""
        files = {name: self.folder.parent / name for name in digests}
        return {name for name, path in files.items() if path.is_file() and sha256(path) == digests[name]}

    def write(self, k: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep micro-batch k's arrays, each with `batch` rows; the padding is cut off."""
        kept: dict[str, Any] = {name: array[: self.kept(k)] for name, array in arrays.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **kept)
        with atomic_write(self._path(k)) as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())

    def read(self, k: int) -> dict[str, np.ndarray] | None:
        """Micro-batch k's arrays, or None where its file is missing, short or damaged, as its sha256 tells."""
        try:
            content = self._path(k).read_bytes()
        except OSError:
            return None
        digest, archive = content[:32], content[32:]
        if hashlib.sha256(archive).digest() != digest:
            return None
        with np.load(io.BytesIO(archive), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays if all(len(rows) == self.kept(k) for rows in arrays.values()) else None  # else: of a smaller set

    def write_archive(self) -> None:
        """The .npz with arr_0 alone, uint8 (count, H, W, C), one micro-batch in memory at a time."""
        first = self.expect(0)["images"]
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape[1:])}
        with (
            atomic_write(self.archive) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for arrays in self:
                member.write(arrays["images"].tobytes())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of every micro-batch, in order."""
        return (self.expect(k) for k in range(self.batches))

    def expect(self, k: int) -> dict[str, np.ndarray]:
        """Micro-batch k's arrays. Raises OSError where its file is missing or damaged."""
        arrays = self.read(k)
        if arrays is None:
            raise OSError(f"{self._path(k)} is missing or damaged; sampling again redoes it")
        return arrays

    def pictures(self, k: int) -> list[Path]:
        """Where the pictures of micro-batch k lie, if there are any."""
        return [self.folder / "png" / f"{number:06d}.png" for number in self.numbers(k)[: self.kept(k)]]

    def _path(self, k: int) -> Path:
        return self.folder / "batches" / f"{k:06d}.batch"


class Stored:
    """The images in the outputs of a set that was complete once: its archive, or else its pictures."""

    def __init__(self, folder: SampleFolder, whole: frozenset[str]):
        self.folder, self.whole = folder, whole

    def images(self, k: int) -> np.ndarray | None:
        """The images of micro-batch k (n, H, W, C); None where they are not all there."""
        folder, first = self.folder, k * self.folder.batch
        if self._has(folder.archive) and first + folder.kept(k) <= len(self._archive):
            return np.array(self._archive[first : first + folder.kept(k)])
        if all(map(self._has, folder.pictures(k))):
            return np.stack([np.atleast_3d(np.asarray(Image.open(path))) for path in folder.pictures(k)])
        return None

    def _has(self, path: Path) -> bool:
        return os.fspath(path.relative_to(self.folder.folder.parent)) in self.whole

    @cached_property
    def _archive(self) -> np.ndarray:
        """The archive's images, which stay on the disk."""
        with zipfile.ZipFile(self.folder.archive) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, _ = np.lib.format.read_array_header_1_0(member)
            inside, header = member.tell(), archive.getinfo("arr_0.npy").header_offset
        with open(self.folder.archive, "rb") as file:
            file.seek(header + 26)  # a member's header ends with its name and extra field, of these lengths
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        return np.memmap(self.folder.archive, np.uint8, "r", header + 30 + lengths + inside, shape)


def read_archive(path: str | os.PathLike[str]) -> np.ndarray:
    """The images of an archive, uint8 (N, H, W, C)."""
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"]
