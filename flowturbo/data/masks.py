"""Masks of an edit, white where something is generated: reading, fitting to the model, and composing the result."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from flowturbo.data.images import read_image

NEAR = 16  # grey values so near to black or white count as these: JPEG smears them


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """A mask file as uint8 (H, W): 255 is generated, 0 kept; transparent pixels are kept.

    Raises ValueError naming a file that is no image.
    """
    mask = torch.from_numpy(read_image(path, channels=1, background="black").pixels[0].copy())
    return torch.where(mask < NEAR, 0, torch.where(mask > 255 - NEAR, 255, mask))


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raises ValueError unless a mask (H, W) has the size of an image (C, H, W), and both white or grey and black."""
    if mask.shape != image.shape[1:]:
        sizes = [" x ".join(map(str, reversed(shape[-2:]))) for shape in (mask.shape, image.shape)]
        raise ValueError(f"the mask has {sizes[0]} pixels, the image {sizes[1]}: expected the same size")
    if not mask.any():
        raise ValueError("the mask is all black, so nothing is to be generated: expected white where something is")
    if (mask == 255).all():
        raise ValueError("the mask is all white, so nothing is kept: expected black there, or no mask")


def centre_square(image: Tensor) -> tuple[slice, slice]:
    """The rows and columns of the largest square in the middle of an image (..., H, W)."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return slice(top, top + side), slice(left, left + side)


def share_outside(mask: Tensor) -> float:
    """How much of what is white or grey in a mask (H, W) lies outside its centre square, in [0, 1]."""
    touched = mask > 0
    return 1 - touched[centre_square(mask)].sum().item() / touched.sum().item()


def fit_mask(mask: Tensor, size: int) -> Tensor:
    """The centre square of a mask (H, W), as an image is cropped, at size x size: each pixel is the largest of those it
    covers."""
    square = mask[centre_square(mask)]
    if square.shape == (size, size):
        return square
    values = square[None, None].float()
    fitted = F.adaptive_max_pool2d(values, size) if len(square) > size else F.interpolate(values, size)
    return fitted[0, 0].to(torch.uint8)


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask (H, W) for latents `factor` times smaller: (1, 1, h, w) in [0, 1], on every latent that it touches."""
    return F.max_pool2d(mask[None, None].float() / 255, factor)


def opacity(mask: Tensor, feather: int = 0) -> Tensor:
    """How much of what was generated shows at each pixel of a mask (H, W), in [0, 1]: 0 where it is black.

    Grey shows whole: it says how strongly was edited. With `feather` it rises from 0 within so many pixels, inside the
    mask, so that what is black stays untouched.
    """
    inside = (mask > 0).float()[None, None]
    total = inside
    for _ in range(feather):
        if not inside.any():  # all further ones add nothing
            break
        outside = F.pad(1 - inside, (1, 1, 1, 1))  # the image's border is no edge of the mask
        inside = 1 - F.max_pool2d(outside, 3, 1)
        total = total + inside
    return total[0, 0] / (feather + 1)


def compose(original: Tensor, generated: Tensor, shown: Tensor) -> Tensor:
    """uint8 images (N, C, H, W): `generated` over `original` (C, H, W), as far as `shown` (H, W) in [0, 1] says.

    Where it is 0, the bytes are the original's.
    """
    mixed = original + shown * (generated.float() - original.float())
    return mixed.round().clamp(0, 255).to(torch.uint8)
