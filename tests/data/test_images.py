import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from flowturbo.data import images
from flowturbo.data.images import DEPTH, ORIENTATION, TRANSPARENCY, centre_crop, in_threads, read_image, rules_of
from flowturbo.data.options import parse_background


def noise_picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(path, picture, **settings):
    picture.save(path, **settings)
    return path


def pixels(picture):
    """As the reader hands them out: (C, H, W)."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# ---- the crop


def adm_crop(picture, size):
    """ADM's center_crop_arr, guided-diffusion's image_datasets.py, as it stands there."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


SIZES = [
    *((16, 16), (17, 16), (16, 33), (64, 64), (63, 101), (100, 31)),
    *((5, 3), (1, 1), (1, 9), (250, 20), (31, 32), (33, 47)),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [16, 7])
def test_the_crop_is_adms(width, height, size):
    picture = noise_picture(width, height)
    cropped = np.asarray(centre_crop(picture, size))
    assert cropped.shape == (size, size, 3)
    assert np.array_equal(cropped, adm_crop(picture, size))


def test_an_image_of_the_right_size_is_taken_as_it_is():
    picture = noise_picture(8, 8)
    assert np.array_equal(np.asarray(centre_crop(picture, 8)), np.asarray(picture))


def test_halving_by_boxes_is_a_mean_of_four():
    values = np.random.default_rng(0).integers(0, 64, (16, 16), dtype=np.uint8) * 4
    expected = values.reshape(8, 2, 8, 2).astype(int).sum((1, 3)) / 4
    assert np.abs(np.asarray(centre_crop(Image.fromarray(values), 8)) - expected).max() <= 0.5


# ---- modes


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_the_channels_asked_for(tmp_path, mode, channels):
    path = saved(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), noise_picture(8, 8, mode))
    found = read_image(path, 8, channels)
    assert (found.pixels.shape, found.pixels.dtype, found.rules) == ((channels, 8, 8), np.uint8, frozenset())
    expected = pixels(noise_picture(8, 8, mode).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    assert np.array_equal(found.pixels, expected)


def test_without_a_size_the_whole_image_is_read(tmp_path):
    path = saved(tmp_path / "a.png", noise_picture(9, 5))
    assert np.array_equal(read_image(path).pixels, pixels(noise_picture(9, 5)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, channels):
    grey = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(grey))
    found = read_image(path, channels=channels)
    assert found.rules == rules_of(path) == {DEPTH}
    assert np.array_equal(found.pixels, np.broadcast_to(grey >> 8, (channels, 8, 8)))


def test_16_bits_of_grey_and_of_colour_are_scaled_alike(tmp_path):
    """Pillow writes no colours of 16 bits: a PPM is made by hand."""
    grey = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    colour = np.repeat(grey[..., None], 3, axis=2).astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6 8 8 65535\n" + colour)
    theirs = read_image(tmp_path / "a.ppm").pixels.astype(int)
    ours = read_image(saved(tmp_path / "a.png", Image.fromarray(grey))).pixels.astype(int)
    assert np.abs(theirs - ours).max() <= 1  # Pillow rounds this one


@pytest.mark.parametrize(("mode", "suffix"), [("I", "tif"), ("F", "tif"), ("F", "ppm")])
def test_numbers_of_more_than_16_bits_are_refused_by_name(tmp_path, mode, suffix):
    path = saved(tmp_path / f"a.{suffix}", noise_picture(8, 8, "L").convert(mode))
    for read in (read_image, rules_of):
        with pytest.raises(ValueError, match=rf"a\.{suffix}': mode {mode} .*expected 8 or 16 bits"):
            read(path)


# ---- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", noise_picture(12, 8), exif=exif, **settings)
    with Image.open(path) as picture:
        expected = pixels(ImageOps.exif_transpose(picture))
    found = read_image(path)
    assert found.pixels.shape == ((3, 8, 12) if orientation < 5 else (3, 12, 8))
    assert np.array_equal(found.pixels, expected)
    turned = orientation > 1 and suffix != "tif"  # which Pillow turns by itself, and always has
    assert found.rules == rules_of(path) == ({ORIENTATION} if turned else set())


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01", b"junk"]
)
def test_damaged_exif_data_leave_the_image_as_it_is(tmp_path, exif):
    path = saved(tmp_path / "a.jpg", noise_picture(8, 8), exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).rules == frozenset()


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist_leave_the_image_as_it_is(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    path = saved(tmp_path / "a.png", noise_picture(8, 8), exif=exif)
    assert np.array_equal(read_image(path).pixels, pixels(noise_picture(8, 8)))


# ---- transparency


def veiled(mode="RGBA"):
    """A picture whose left part is transparent, its middle half so, and its right part not."""
    picture = noise_picture(8, 8, mode[:-1])
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :3], alpha[:, 3:5] = 0, 128
    picture.putalpha(Image.fromarray(alpha))
    return picture


@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#0a141E", (10, 20, 30))]
)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pixels_show_the_background(tmp_path, background, colour, suffix):
    path = saved(tmp_path / f"a.{suffix}", veiled(), **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    found = read_image(path, background=background)
    assert found.rules == rules_of(path) == {TRANSPARENCY}
    seen = pixels(noise_picture(8, 8)).astype(float)
    assert (found.pixels[:, :, :3] == np.array(colour)[:, None, None]).all()
    assert np.array_equal(found.pixels[:, :, 5:], seen[:, :, 5:])
    half = seen * 128 / 255 + np.array(colour)[:, None, None] * 127 / 255
    assert np.abs(found.pixels - half)[:, :, 3:5].max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_grey_images_show_the_background_in_grey(tmp_path, mode):
    found = read_image(saved(tmp_path / "a.png", veiled(mode)), channels=1, background="#ff0000")
    assert (found.pixels[0, :, :3] == 76).all()  # what Pillow's luma makes of red
    assert np.array_equal(found.pixels[0, :, 5:], np.asarray(noise_picture(8, 8, mode[:-1]).convert("L"))[:, 5:])


def test_rgba_keeps_its_transparency(tmp_path):
    found = read_image(saved(tmp_path / "a.png", veiled()), channels=4)
    assert found.rules == frozenset()
    assert np.array_equal(found.pixels, pixels(veiled()))


def test_a_transparent_colour_shows_the_background(tmp_path):
    """Palettes, grey of 8 and of 16 bits, and RGB with one colour that is transparent; palettes also with many."""
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    palette.putpalette([value for k in range(4) for value in (60 * k, 5, 7)])
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    deep = grey.astype(np.uint16) * 1000 + 3
    cases = {
        "palette": (palette, 2, np.arange(64).reshape(8, 8) % 4 == 2),
        "palette-of-alphas": (palette, b"\xff\x00\xff\x00", np.arange(64).reshape(8, 8) % 2 == 1),
        "grey": (Image.fromarray(grey), 9, grey == 9),
        "deep": (Image.fromarray(deep), 9003, grey == 9),
        "rgb": (Image.fromarray(rgb), (9, 9, 9), grey == 9),
    }
    for name, (picture, transparency, hidden) in cases.items():
        path = saved(tmp_path / f"{name}.png", picture, transparency=transparency)
        found = read_image(path, background="#010203")
        assert TRANSPARENCY in found.rules, name
        assert found.rules == rules_of(path), name
        shown = (found.pixels == np.array([1, 2, 3])[:, None, None]).all(axis=0)
        assert np.array_equal(shown, hidden), name


def test_alpha_that_hides_nothing_changes_no_bit(tmp_path):
    for mode in ("LA", "RGBA"):
        path = saved(tmp_path / "a.png", noise_picture(8, 8, mode))
        found = read_image(path, background="black")
        assert found.rules == frozenset()
        assert np.array_equal(found.pixels, pixels(noise_picture(8, 8, mode).convert("RGB")))


def test_backgrounds_are_white_black_or_a_colour():
    assert parse_background("#102aFF") == (16, 42, 255)
    for text in ("red", "#12345", "#1234567", "#12345g", "", "White"):
        with pytest.raises(ValueError, match="expected white, black or #rrggbb"):
            parse_background(text)


# ---- what is refused


def test_a_damaged_image_is_named_wherever_it_breaks(tmp_path):
    for kind in ("png", "jpg", "webp", "bmp"):
        path = saved(tmp_path / f"a.{kind}", noise_picture(9, 9))
        whole = path.read_bytes()
        refused = 0
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            try:
                read_image(path, 8)
            except ValueError as error:
                refused += f"cannot read image '{path}'" in str(error)
            else:
                refused += length > len(whole) - 24  # what is cut off is not part of the picture
        assert refused == len(range(0, len(whole), 7))


def test_a_picture_too_large_to_be_meant_is_refused_without_a_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", noise_picture(8, 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow warns at 72 pixels, and raises at 101
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (read_image, lambda path: in_threads(read_image, [path])):
            with pytest.raises(ValueError, match=r"cannot read image .*a\.png.*8x9 pixels.*decompression bomb"):
                read(path)
        saved(path, noise_picture(50, 50))
        with pytest.raises(ValueError, match=r"cannot read image .*a\.png.*decompression bomb"):
            read_image(path)


def test_a_strip_that_would_grow_enormous_is_refused(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (500_000, 1)))
    with pytest.raises(ValueError, match=r"a\.png': a strip of 500000x1 pixels"):
        read_image(path, 256)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "itself.png").symlink_to("itself.png")
    says = {"pipe": "not a file", "device": "not a file", "folder": "not a file", "gone": "No such", "itself": "levels"}
    for name, reason in says.items():
        for read in (read_image, rules_of):
            with pytest.raises(ValueError, match=rf"cannot read image '.*{name}\.png': .*{reason}"):
                read(tmp_path / f"{name}.png")


@pytest.mark.parametrize("form", ["EPS", "ICNS", "PCX"])
def test_formats_that_nobody_trains_on_are_not_opened(tmp_path, form):
    """Whatever the name says; Pillow reads EPS by running Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"cannot read image '.*a\.png'"):
        read_image(tmp_path / "a.png", 8)


def test_threads_keep_the_order_and_leave_warnings_as_they_were(tmp_path):
    paths = [saved(tmp_path / f"{k}.png", Image.new("L", (4, 4), k)) for k in range(40)]
    before = list(warnings.filters)
    assert [found.pixels[0, 0, 0] for found in in_threads(read_image, paths)] == list(range(40))
    assert warnings.filters == before
