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
from pathlib import Path
from typing import Any

import numpy as np

from flowturbo.system.claims import OtherSettings, check_same, read_record, write_record
from flowturbo.system.files import atomic_write, remove_leftovers, sha256

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

    def is_complete(self, settings: Mapping[str, Any]) -> bool:
        """Whether it was made with these settings (JSON types), and its outputs are there as they were recorded.

        Writes nothing. Raises OtherSettings naming the first difference where the folder was made with other
        settings or holds something else, or its record is damaged.
        """
        found = read_record(self.record)
        if found is None:
            for path in (self.archive, self.features, *self.folder.glob("[!.]*")):
                if path.exists():
                    raise OtherSettings(f"{path} is there and not of this run")
            return False
        before, digests = found.get("settings"), found.get("outputs", {})
        if not isinstance(before, dict) or not isinstance(digests, dict):
            raise OtherSettings(f"{self.record} is damaged")
        check_same(f"folder {os.fspath(self.folder)!r}", before, json.loads(json.dumps(settings)))
        return bool(digests) and all(
            os.path.isfile(self.folder.parent / name) and sha256(self.folder.parent / name) == digest
            for name, digest in digests.items()
        )

    def claim(self, settings: Mapping[str, Any]) -> bool:
        """Make the folder for these settings, or go on with one made for the same; whether it is complete.

        Raises as `is_complete`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for output in (self.archive, self.features):
            for leftover in output.parent.glob(f".{glob.escape(output.name)}.*"):
                leftover.unlink(missing_ok=True)
        complete = self.is_complete(settings)
        if not self.record.exists():
            write_record(self.record, {"settings": settings})
        return complete

    def complete(self, settings: Mapping[str, Any], outputs: Iterable[Path]) -> None:
        """Record the outputs' digests, then drop the micro-batch files."""
        digests = {os.fspath(path.relative_to(self.folder.parent)): sha256(path) for path in outputs}
        write_record(self.record, {"settings": settings, "outputs": digests})
        for k in range(self.batches):
            self._path(k).unlink(missing_ok=True)

    def write(self, k: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep micro-batch k's arrays, each with `batch` rows; the padding is cut off."""
        kept: dict[str, Any] = {name: array[: self.kept(k)] for name, array in arrays.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **kept)
        with atomic_write(self._path(k)) as file:
            file.write(hashlib.sha256(buffer.getbuffer()).digest())
            file.write(buffer.getbuffer())

    def read(self, k: int) -> dict[str, np.ndarray] | None:
        """Micro-batch k's arrays, or None where its file is missing or damaged, as its sha256 tells."""
        try:
            content = self._path(k).read_bytes()
        except OSError:
            return None
        digest, archive = content[:32], content[32:]
        if hashlib.sha256(archive).digest() != digest:
            return None
        with np.load(io.BytesIO(archive), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

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

    def _path(self, k: int) -> Path:
        return self.folder / "batches" / f"{k:06d}.batch"


def read_archive(path: str | os.PathLike[str]) -> np.ndarray:
    """The images of an archive, uint8 (N, H, W, C)."""
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"]
