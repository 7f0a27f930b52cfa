"""Images in memory: conversion to bytes, PNG files, and captioned grids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowturbo.system.files import atomic_write


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> uint8, rounded to nearest: clamp(127.5·x + 128, 0, 255) truncated."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1], the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """One uint8 image (C, H, W) with 1, 3 or 4 channels as a grey, RGB or RGBA picture."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def save_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a PNG, whole or not at all; makes the folder."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def save_gif(path: str | os.PathLike[str], frames: Sequence[Image.Image], milliseconds: int = 200) -> None:
    """Write pictures of one size as a moving one that repeats, whole or not at all; the last stays for a second."""
    shown = [milliseconds] * (len(frames) - 1) + [max(1000, milliseconds)]
    with atomic_write(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)


def grid(
    rows: Sequence[Tensor],
    captions: Sequence[str] = (),
    names: Sequence[Sequence[str]] = (),
    *,
    least_side: int = 32,
) -> Image.Image:
    """Rows of uint8 images, each (N, C, H, W), as one RGB picture.

    `captions`, if any, stand above their rows; `names`, if any, are for each row what stands under each of its images,
    cut to their width. A row with an empty one has no place for it. Images smaller than `least_side` pixels are
    enlarged by a whole factor, so that a person can look at them.
    """
    height, width = rows[0].shape[-2:]
    factor = max(1, -(-least_side // min(height, width)))
    height, width = height * factor, width * factor
    gap = max(2, height // 32)
    font_size = max(12, height // 12)
    font, line = ImageFont.load_default(size=font_size), int(font_size * 1.6)
    captions = captions or [""] * len(rows)
    names = names or [()] * len(rows)
    columns = max(len(row) for row in rows)
    text_width = max(int(font.getlength(caption)) for caption in captions)
    lines = sum(map(bool, captions)) + sum(map(bool, names))
    size = (max(columns * (width + gap), text_width + gap) + gap, len(rows) * (height + gap) + lines * line + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, caption, below in zip(rows, captions, names, strict=True):
        if caption:
            draw.text((gap, top + line // 8), caption, fill="black", font=font)
            top += line
        for column, image in enumerate(row):
            picture = to_pil(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + column * (width + gap), top))
        top += height + gap
        if below:
            for column, name in enumerate(below):
                middle = gap + column * (width + gap) + width // 2
                draw.text((middle, top), cut_to(name, width, font), fill="black", font=font, anchor="ma")
            top += line
    return canvas


def cut_to(text: str, width: int, font: Any) -> str:
    """A text on one line, with … for its end where it is wider than `width` pixels."""
    text = " ".join(text.split())[:200]
    if font.getlength(text) <= width:
        return text
    return next((f"{text[:end]}…" for end in range(len(text), 0, -1) if font.getlength(f"{text[:end]}…") <= width), "")
