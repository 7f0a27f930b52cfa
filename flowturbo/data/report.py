"""What there is to know of a folder of images before one trains on it, and whether all of them can be read."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flowturbo.data.identity import CONTENT_FILES, READING_RULES
from flowturbo.data.images import DEPTH, ORIENTATION, TRANSPARENCY, inspect
from flowturbo.data.labelled import LabelledImages
from flowturbo.data.pictures import grid
from flowturbo.data.walk import describe
from flowturbo.system.claims import read_record, write_record
from flowturbo.weights.cache import cache_folder

HEADER_SECONDS = 40.0  # for the headers before a training, so that a million files delay it by less than a minute
AT_ONCE = 256  # files handed to the threads at once
SHOWN = 20  # classes and unreadable files that are listed
SHEET = 64  # crops on the contact sheet
RULES = {  # what is said of images that a rule of reading changes
    ORIENTATION: "turned upright by their EXIF orientation",
    TRANSPARENCY: "with transparent pixels, shown on {background}",
    DEPTH: "of 16 bits, scaled to 8",
}


@dataclass(frozen=True)
class DataReport:
    """What looking at images has found. `headers` and `decoded` are how many of them were looked at so."""

    headers: int
    decoded: int
    rules: dict[str, int]  # how many images each rule of reading changes
    sides: list[int]  # the least, the median and the greatest short side; empty without images
    enlarged: int  # images whose short side is below that of the crop
    unreadable: list[str]  # messages that name a file each

    def lines(self, data: LabelledImages) -> list[str]:
        """The report in words."""
        total, size = len(data), data.image_size
        counts = Counter(data.folders)
        order = sorted(range(len(data.classes)), key=lambda k: (data.class_indices[k], data.classes[k]))
        each = [f"{data.classes[k]} ({counts[k]})" for k in order[:SHOWN]]
        more = f" and {len(data.classes) - SHOWN} more" if len(data.classes) > SHOWN else ""
        lines = [
            f"data: {total:,} images in {len(data.classes):,} classes of {min(counts.values()):,} to "
            f"{max(counts.values()):,}: {', '.join(each)}{more}"
        ]
        if self.sides:
            least, middle, greatest = self.sides
            lines.append(f"data: short sides of {least} to {greatest} pixels, median {middle}")
        if self.enlarged:
            lines.append(f"data: {self.enlarged:,} images are smaller than the crop of {size} pixels: enlarged")
        for rule, count in self.rules.items():
            lines.append(f"data: {count:,} images {RULES[rule].format(background=data.background)}")
        lines += [f"data: passed over: {describe(data.skipped)}"] if data.skipped else []
        lines += [f"data: {data.note}"] if data.note else []
        looked = f"data: {self.headers:,} headers read, {self.decoded:,} images decoded"
        return [*lines, f"{looked}; the run knows its data by {data.fingerprint_covers}"]

    def refuse(self) -> None:
        """Raises ValueError where there are images that cannot be read."""
        if self.unreadable:
            more = f"; and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
            raise ValueError("; ".join(self.unreadable[:3]) + more)


class _Found(NamedTuple):
    side: int
    rules: frozenset[str]


def check_data(data: LabelledImages, thorough: bool = False) -> DataReport:
    """Look at the headers of all images, and decode them all where they are at most CONTENT_FILES, or `thorough`.

    Without `thorough`, headers are read for HEADER_SECONDS at most, in random order. What was found of data of the
    same content is remembered in the cache folder.
    """
    place = cache_folder() / "checked" / f"{_key(data)}.json"
    whole = thorough or len(data) <= CONTENT_FILES
    with suppress(ValueError, TypeError):
        known = DataReport(**(read_record(place) or {}))
        if known.decoded == len(data) or not whole:
            return known
    order = list(range(len(data))) if whole else np.random.default_rng(0).permutation(len(data)).tolist()
    unreadable: dict[int, str] = {}

    def look(index: int) -> _Found | None:
        return _try(lambda: _Found(*inspect(data.source(index), data.channels)), index, unreadable)

    headers = [found for found in _each(look, order, "headers", None if thorough else HEADER_SECONDS) if found]
    decoded = 0
    if whole:
        left = [index for index in range(len(data)) if index not in unreadable]
        decoded = len(
            _each(lambda index: _try(lambda: data.read(index, False), index, unreadable) and None, left, "images")
        )
    sides = sorted(found.side for found in headers)
    report = DataReport(
        headers=len(headers),
        decoded=decoded,
        rules=dict(sorted(Counter(rule for found in headers for rule in found.rules).items())),
        sides=[sides[0], median_low(sides), sides[-1]] if sides else [],
        enlarged=sum(side < data.image_size for side in sides),
        unreadable=[unreadable[index] for index in sorted(unreadable)],
    )
    if not report.unreadable:
        with suppress(OSError):  # what cannot be remembered is looked at again
            write_record(place, asdict(report))
    return report


def contact_sheet(data: LabelledImages) -> Image.Image:
    """Crops of images from all over the data, as they are trained on."""
    chosen = np.unique(np.linspace(0, len(data) - 1, min(SHEET, len(data))).round().astype(int))
    images = torch.from_numpy(np.stack([data.read(int(index), False)[0] for index in chosen]))
    return grid(list(images.split(8)))


def _key(data: LabelledImages) -> str:
    how = repr((sorted(READING_RULES.items()), data.channels, data.image_size))
    return hashlib.sha256((data.fingerprint() + how).encode()).hexdigest()


def _try(function: Callable[[], Any], index: int, failed: dict[int, str]) -> Any:
    try:
        return function()
    except ValueError as error:
        failed[index] = str(error)
        return None


def _each(function: Callable[[int], Any], indices: Sequence[int], what: str, seconds: float | None = None) -> list:
    """The function of each index, in threads and with a progress bar, until `seconds` have passed."""
    results: list = []
    limit = None if seconds is None else time.monotonic() + seconds
    with (
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads,
        tqdm(total=len(indices), desc=what, unit="img", leave=False, disable=None, dynamic_ncols=True) as bar,
    ):
        for start in range(0, len(indices), AT_ONCE):
            if limit is not None and time.monotonic() > limit:
                break
            results += threads.map(function, indices[start : start + AT_ONCE])
            bar.update(len(results) - bar.n)
    return results
