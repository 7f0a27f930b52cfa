"""Images of a folder or of an ADM .npz, in order and in batches of uint8 (N, H, W, 3).

Both readers hand out three channels: grey is replicated, alpha is dropped, palettes are resolved. So a grey
PNG, an (N, H, W, 1) array and its (N, H, W, 3) replication are the same images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from flowturbo.evaluation.archive import Archive

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name says; none runs a program
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
Crop = Callable[[Image.Image], Image.Image]
MAX_PIXELS = 1 << 26  # below where Pillow warns of decompression bombs


class ImageFolder:
    """All images below a folder, sorted by path; other files are passed over.

    ValueError below two images, or, naming the file, for one that is damaged, not an 8-bit image, or of
    another size than the first.
    """

    def __init__(
        self, path: str | os.PathLike[str], crop: Callable[[Image.Image], Image.Image] | None = None
    ) -> None:
        self.path, self.crop = Path(path), crop
        self.files = sorted(
            file for file in self.path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        if len(self.files) < 2:
            raise ValueError(f"{self.path}: {len(self.files)} images in this folder, expected at least 2")

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) in the order of the paths, n = size but for the last."""
        shape = read_image(self.files[0], self.crop).shape
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
            for start in range(0, len(self.files), size):
                files = self.files[start : start + size]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image refuses
                    images = list(threads.map(read_image, files, repeat(self.crop)))
                for file, image in zip(files, images):
                    if image.shape != shape:
                        raise ValueError(
                            f"{file}: {image.shape[1]}×{image.shape[0]} pixels, but {self.files[0].name} has "
                            f"{shape[1]}×{shape[0]}: expected images of one size, or --image-size N to crop them"
                        )
                yield np.stack(images)


class ImageArchive:
    """The images arr_0 of an ADM .npz, streamed: uint8 (N, H, W, 3), or (N, H, W, 1) for grey.

    ValueError, naming the file, when there is no arr_0, it is something else, or holds fewer than two images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._archive = Archive(path)
        shape, dtype, _ = self._archive.header("arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
        if shape[0] < 2:
            raise ValueError(f"{self.path}: {shape[0]} images in arr_0, expected at least 2")
        if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
            raise ValueError(f"{self.path}: arr_0 is {dtype} {shape}, expected images of 1 to {MAX_PIXELS} pixels")
        self._count = shape[0]

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) in the order of the file, n = size but for the last."""
        for block in self._archive.blocks("arr_0", size):
            yield block if block.shape[3] == 3 else block.repeat(3, axis=3)


def read_image(path: Path, crop: Crop | None = None) -> np.ndarray:
    """An 8-bit image file, cropped if asked to, as uint8 (H, W, 3).

    ValueError naming the file when it is damaged or something else.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels, expected at most {MAX_PIXELS}")
            if image.mode not in EIGHT_BIT_MODES:
                raise ValueError(f"mode {image.mode}, expected 8 bits per channel")
            image.load()  # verify() would pass a truncated JPEG
            image = image.convert("RGB")
            return np.asarray(crop(image) if crop is not None else image)
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise ValueError(f"{path}: not a readable image ({error})") from error
