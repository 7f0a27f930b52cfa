"""Images in memory: conversion to bytes, PNG files, and captioned grids."""

from __future__ import annotations

import os
from collections.abc import Sequence

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


def save_gif(
    path: str | os.PathLike[str], frames: Sequence[Image.Image], milliseconds: int = 200, last: int = 1000
) -> None:
    """Write pictures of one size as a moving one that repeats, whole or not at all; the last stays for longer."""
    shown = [milliseconds] * (len(frames) - 1) + [max(last, milliseconds)]
    with atomic_write(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)


def grid(
    rows: Sequence[Tensor],
    captions: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    *,
    least_side: int = 32,
) -> Image.Image:
    """Rows of uint8 images, each (N, C, H, W), as one RGB picture.

    `captions`, if any, stand above their rows; `labels`, a row of texts for each row of images, below the images.
    Images smaller than `least_side` pixels are enlarged by a whole factor, so that a person can look at them.
    """
    height, width = rows[0].shape[-2:]
    factor = max(1, -(-least_side // min(height, width)))
    height, width = height * factor, width * factor
    gap = max(2, height // 32)
    font_size = max(12, height // 12)
    font = ImageFont.load_default(size=font_size)
    line = int(font_size * 1.6)
    heads = [line if k < len(captions) and captions[k] else 0 for k in range(len(rows))]
    feet = [line if k < len(labels) and any(labels[k]) else 0 for k in range(len(rows))]
    columns = max(len(row) for row in rows)
    text_width = max((int(font.getlength(caption)) for caption in captions), default=0)
    size = (
        max(columns * (width + gap), text_width + gap) + gap,
        len(rows) * (height + gap) + sum(heads) + sum(feet) + gap,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for index, (row, head, foot) in enumerate(zip(rows, heads, feet)):
        if head:
            draw.text((gap, top + head // 8), captions[index], fill="black", font=font)
        top += head
        for column, image in enumerate(row):
            picture = to_pil(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            left = gap + column * (width + gap)
            canvas.paste(picture, (left, top))
            if foot:
                text = shortened(labels[index][column], font, width)
                draw.text((left + width // 2, top + height + foot // 8), text, fill="black", font=font, anchor="ma")
        top += height + foot + gap
    return canvas


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut and ended by dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
