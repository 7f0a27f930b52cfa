"""The one reader of image files, for training, cached latents and evaluation: bytes on a disk -> uint8 (C, H, W).

Images are turned upright (EXIF), 16 bits become 8, and transparent pixels are shown on a background.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from flowturbo.data.options import parse_background

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # whatever the name says; none runs a program
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
READABLE = frozenset(("1", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))  # 8 bits or less
LARGEST_CROP = 2**26  # pixels that an image may have once its short side is the crop's
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
ORIENTATION_TAG = 0x0112
TURNS = {  # what turns an image of this EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The rules that change an image: the names of what `ImageReading.rules` holds.
ORIENTATION, TRANSPARENCY, DEPTH = "orientation", "transparency", "depth"

Value = TypeVar("Value")
Result = TypeVar("Result")


class ImageBytes(NamedTuple):
    """The content of an image file that lies in memory, and what messages call it."""

    name: str
    content: bytes


Source = str | os.PathLike[str] | ImageBytes  # what is read as an image


class ImageReading(NamedTuple):
    """An image, and what reading it took."""

    pixels: np.ndarray  # uint8 (C, H, W)
    rules: frozenset[str]  # of "orientation" (turned upright), "transparency" (on the background), "depth" (16 bits)


def read_image(source: Source, size: int | None = None, channels: int = 3, background: str = "white") -> ImageReading:
    """An image, as grey, RGB or RGBA by its `channels` (1, 3 or 4), with `size` as a centre-cropped square.

    `background`, "white", "black" or "#rrggbb", is what transparent pixels are shown on; RGBA keeps them. Raises
    ValueError naming a file that is damaged, too large, of more than 16 bits, or no file but a pipe or a device.
    """
    colour = parse_background(background)
    with _opened(source) as picture:
        if size is not None and size**2 * max(picture.size) > LARGEST_CROP * min(picture.size):
            raise ValueError(f"a strip of {picture.width}x{picture.height} pixels")
        picture.load()
        rules = _rules(picture, channels)
        plain = _in_8_bits(picture)
        if ORIENTATION in rules:
            plain = plain.transpose(TURNS[_orientation(picture)])
        if TRANSPARENCY in rules:
            canvas = Image.new("RGBA", plain.size, (*colour, 255))
            canvas.alpha_composite(plain.convert("RGBA"))
            plain = canvas
        plain = plain.convert(MODES[channels])
        array = np.asarray(plain if size is None else centre_crop(plain, size))
    return ImageReading(array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)), rules)


def rules_of(source: Source, channels: int = 3) -> frozenset[str]:
    """The `rules` of reading an image, without decoding it where its header tells. Raises ValueError as
    `read_image`."""
    with _opened(source) as picture:
        return _rules(picture, channels)


def inspect(source: Source, channels: int = 3) -> tuple[int, frozenset[str]]:
    """The short side of an image, and the `rules` of reading it, as `rules_of`."""
    with _opened(source) as picture:
        return min(picture.size), _rules(picture, channels)


def check_file(path: str | os.PathLike[str]) -> os.stat_result:
    """An image file's status. Raises ValueError where it is no file: a pipe would be waited for, for ever."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read image {os.fspath(path)!r}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read image {os.fspath(path)!r}: a folder, pipe or device, not a file")
    return status


def in_threads(function: Callable[[Value], Result], values: Sequence[Value], part: int = 1) -> list[Result]:
    """The function of each value, in as many threads as there are cores: Pillow and hashes compute outside the GIL.

    A thread takes `part` values at once: handing over one costs 50 microseconds.
    """
    if part > 1:
        parts = [values[start : start + part] for start in range(0, len(values), part)]
        return [result for found in in_threads(lambda part: list(map(function, part)), parts) for result in found]
    with warnings.catch_warnings(), ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as threads:
        warnings.simplefilter("ignore")  # here too: all threads share one setting, and restore each other's
        return list(threads.map(function, values))


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The ADM crop (Dhariwal & Nichol, 2021): halve by boxes while twice too large, then bicubic to the short
    side, then the centre."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """An image, its header read. Whatever goes wrong with it within becomes a ValueError that names it."""
    file: str | io.BytesIO
    if isinstance(source, ImageBytes):
        name, file = source.name, io.BytesIO(source.content)
    else:
        name = file = os.fspath(source)
        check_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities that change no pixel; of bombs MAX_PIXELS tells
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} pixels could be a decompression bomb")
                if picture.mode not in READABLE and not _is_deep(picture):
                    raise ValueError(f"mode {picture.mode} ({picture.format}), expected 8 or 16 bits per channel")
                yield picture
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise ValueError(f"cannot read image {name!r}: {error or type(error).__name__}") from None


def _rules(picture: Image.Image, channels: int) -> frozenset[str]:
    """What an opened image needs so that it shows what was meant."""
    found = []
    if picture.format != "TIFF" and _orientation(picture) in TURNS:  # Pillow itself turns TIFF
        found.append(ORIENTATION)
    if _is_deep(picture):
        found.append(DEPTH)
    if channels != 4 and picture.has_transparency_data and _least_alpha(picture) < 255:
        found.append(TRANSPARENCY)
    return frozenset(found)


def _least_alpha(picture: Image.Image) -> int:
    return int(np.asarray(_in_8_bits(picture).convert("RGBA").getchannel("A")).min())


def _is_deep(picture: Image.Image) -> bool:
    """Whether an image has 16 bits of grey; Pillow hands out colours of 16 bits in 8."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """16 bits of grey as their upper 8, as Pillow reads colours; other images as they are."""
    if not _is_deep(picture):
        return picture
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if isinstance(hidden := picture.info.get("transparency"), int):  # this value is transparent
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where there is none or the EXIF data are damaged."""
    try:
        found = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # of another dozen types; the image itself may be whole
        return 1
    return found if isinstance(found, int) else 1
