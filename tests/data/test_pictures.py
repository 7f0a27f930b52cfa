import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.data.pictures import from_uint8, grid, save_png, to_pil, to_uint8


def test_bytes_survive_the_way_to_floats_and_back():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = from_uint8(every)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), every)
    assert torch.equal(to_uint8(floats.double()), every)


@pytest.mark.parametrize(
    ("value", "byte"),
    [
        *((-1, 0), (1, 255), (-5, 0), (5, 255), (float("inf"), 255), (-float("inf"), 0)),
        *((-1 + 0.99 / 255, 0), (-1 + 1.01 / 255, 1), (1 - 0.99 / 255, 255), (1 - 1.01 / 255, 254)),
    ],
)
def test_floats_are_rounded_to_the_nearest_byte(value, byte):
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == byte


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_have_the_pixels_of_the_tensor(channels, mode, tmp_path):
    image = torch.randint(0, 256, (channels, 3, 5), dtype=torch.uint8)
    picture = to_pil(image)
    assert (picture.mode, picture.size) == (mode, (5, 3))
    save_png(tmp_path / "new" / "folder" / "a.png", picture)
    stored = np.asarray(Image.open(tmp_path / "new" / "folder" / "a.png")).reshape(3, 5, channels)
    assert np.array_equal(stored, image.permute(1, 2, 0).numpy())


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save_png(tmp_path / "a.png", Image.new("L", (2, 2), 7))
    with pytest.raises(OSError):
        save_png(tmp_path / "a.png", Image.new("F", (2, 2)))  # PNG has no such mode
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_grid_places_every_image_where_it_belongs():
    rows = [torch.randint(0, 256, (n, 3, 32, 48), dtype=torch.uint8) for n in (3, 2)]
    picture = np.asarray(grid(rows))
    assert picture.shape == (2 * (32 + 2) + 2, 3 * (48 + 2) + 2, 3)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = 2 + r * 34, 2 + c * 50
            assert np.array_equal(picture[top : top + 32, left : left + 48], image.permute(1, 2, 0).numpy())
    assert (picture[36:68, 102:150] == 255).all()  # the second row's empty place


@pytest.mark.parametrize(("side", "factor"), [(8, 4), (9, 4), (31, 2), (32, 1), (64, 1)])
def test_small_images_are_enlarged_by_a_whole_factor(side, factor):
    image = torch.randint(0, 256, (1, 1, side, side), dtype=torch.uint8)
    picture = np.asarray(grid([image]))
    gap = max(2, side * factor // 32)
    shown = picture[gap : gap + side * factor, gap : gap + side * factor, 0]
    assert np.array_equal(shown, image[0, 0].numpy().repeat(factor, 0).repeat(factor, 1))


def test_captions_stand_above_their_rows_and_are_not_cut():
    row = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    bare, short = grid([row, row]), grid([row, row], ["a", "b"])
    assert short.height - bare.height == 2 * int(12 * 1.6)
    head = np.asarray(short)[2:18]
    assert (head < 128).any()  # something is written there
    long = grid([row], ["a caption that is much wider than the one image that it belongs to"])
    assert long.width > 300
    assert (np.asarray(long)[:, -2:] == 255).all()


def test_labels_stand_below_their_images_and_are_cut_to_their_width():
    rows = [torch.zeros(2, 3, 64, 64, dtype=torch.uint8)] * 2
    bare, labelled = grid(rows), np.asarray(grid(rows, labels=[["cat", ""], ["a name that is wider than it", "dog"]]))
    line = int(12 * 1.6)
    assert labelled.shape == (bare.height + 2 * line, bare.width, 3)  # no wider for a long one
    below = [labelled[k * (64 + 2 + line) + 2 + 64 :][:line] for k in range(2)]
    assert [(text[:, 2 + c * 66 : 66 + c * 66] < 128).any() for text in below for c in range(2)] == [
        True,
        False,
        True,
        True,
    ]
    assert (below[1][:, 66:68] == 255).all()  # the gap between two labels
    assert grid(rows, labels=[["", ""], ["a", "b"]]).height == bare.height + line  # no line for a row without any


def test_a_row_without_a_caption_or_labels_has_no_place_for_them():
    row = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    line = int(12 * 1.6)
    bare = grid([row] * 3)
    some = grid([row] * 3, ["a", "", ""], ["", "", ["one", "two"]])
    assert some.height - bare.height == 2 * line
    shown = np.asarray(some)
    for top in (2 + line, 2 + line + 34, 2 + line + 68):
        assert (shown[top : top + 32, 2:34] == 0).all()
    assert (shown[2 + line + 102 :, :34] < 128).any()  # the label
