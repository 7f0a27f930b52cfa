import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.data.masks import (
    centre_square,
    check_mask,
    compose,
    fit_mask,
    latent_mask,
    opacity,
    read_mask,
    share_outside,
)


def white_at(*places, size=(6, 8)):
    mask = torch.zeros(size, dtype=torch.uint8)
    for row, column in places:
        mask[row, column] = 255
    return mask


def test_a_mask_file_is_read_as_grey_and_transparency_as_black(tmp_path):
    values = np.array([[0, 10, 128, 250, 255, 255]], np.uint8)
    alpha = np.array([[255, 255, 255, 255, 255, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([values, values, values, alpha], -1)).save(tmp_path / "colours.png")
    assert read_mask(tmp_path / "grey.png").tolist() == [[0, 0, 128, 255, 255, 255]]
    assert read_mask(tmp_path / "colours.png").tolist() == [[0, 0, 128, 255, 255, 0]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (white_at((0, 0), size=(6, 7)), "the mask has 7 x 6 pixels, the image 8 x 6"),
        (white_at(), "the mask is all black"),
        (torch.full((6, 8), 255, dtype=torch.uint8), "the mask is all white"),
    ],
)
def test_masks_that_say_nothing_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, torch.zeros(3, 6, 8, dtype=torch.uint8))


def test_a_mask_is_cropped_as_images_are_and_no_pixel_of_it_is_lost():
    mask = white_at((0, 1), (5, 6), (2, 0))  # the last lies outside the square
    assert centre_square(mask) == (slice(0, 6), slice(1, 7))
    assert share_outside(mask) == pytest.approx(1 / 3)
    assert fit_mask(mask, 3).tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 255]]
    assert fit_mask(mask, 6).equal(mask[:, 1:7])
    assert fit_mask(mask, 12)[:2, :2].eq(255).all()
    assert fit_mask(mask, 12).sum() == 2 * 4 * 255


def test_a_latent_that_is_touched_anywhere_is_generated():
    mask = white_at((3, 3), size=(8, 8))
    mask[7, 0] = 128
    assert latent_mask(mask, 4).tolist() == [[[[1, 0], [pytest.approx(128 / 255), 0]]]]
    assert latent_mask(mask, 1).shape == (1, 1, 8, 8)


def test_a_feather_rises_inside_the_mask_alone():
    mask = torch.zeros(7, 9, dtype=torch.uint8)
    mask[:, 2:] = 255
    mask[3, 5] = 90
    assert opacity(mask)[3].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert opacity(mask, 3)[3].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]  # the border is no edge

    small = white_at((2, 2), (2, 3))
    assert opacity(small, 10**9)[2, 2:5].tolist() == pytest.approx([1e-9, 1e-9, 0])  # at once


def test_what_does_not_show_keeps_its_bytes_and_what_shows_whole_has_the_new_ones():
    random = torch.Generator().manual_seed(0)
    old, new = (torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=random) for _ in range(2))
    shown = torch.rand(5, 4, generator=random)
    shown[0], shown[1] = 0, 1
    made = compose(old[0], new, shown)
    assert made[:, :, 0].equal(old[:1, :, 0].expand(2, -1, -1))
    assert made[:, :, 1].equal(new[:, :, 1])
    low, high = torch.minimum(old[:1], new), torch.maximum(old[:1], new)
    assert bool(((low <= made) & (made <= high)).all())
