"""The report on a folder of images: what it counts, what it refuses, and what it remembers."""

import numpy as np
import pytest
from PIL import Image

from flowturbo.data import report
from flowturbo.data.folders import ClassFolder
from flowturbo.data.report import check_data, contact_sheet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def images(class_folder, tmp_path):
    """Six images of 12x10 in two classes, one of them transparent, one turned, one of 16 bits; and a hidden one."""
    root = class_folder(tmp_path / "images", size=(12, 10))
    pixels = np.zeros((10, 12, 4), np.uint8)
    Image.fromarray(pixels).save(root / "c0" / "0.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "c0" / "1.png", exif=turned)
    Image.fromarray(np.zeros((10, 12), np.uint16)).save(root / "c1" / "0.png")
    (root / "c1" / "._0.png").write_bytes(b"macOS")
    return root


def test_what_there_is_to_know(images):
    data = ClassFolder(images, 16)
    found = check_data(data)
    assert (found.headers, found.decoded, found.unreadable) == (6, 6, [])
    assert found.rules == {"depth": 1, "orientation": 1, "transparency": 1}
    assert (found.sides, found.enlarged) == ([10, 10, 30], 5)
    assert found.lines(data) == [
        "data: 6 images in 2 classes of 3 to 3: c0 (3), c1 (3)",
        "data: short sides of 10 to 30 pixels, median 10",
        "data: 5 images are smaller than the crop of 16 pixels: enlarged",
        "data: 1 images of 16 bits, scaled to 8",
        "data: 1 images turned upright by their EXIF orientation",
        "data: 1 images with transparent pixels, shown on white",
        "data: passed over: hidden images and folders: 1",
        "data: 6 headers read, 6 images decoded; the run knows its data by the content of all 6 files",
    ]


def test_unreadable_files_are_named_whether_it_is_their_header_or_their_pixels(images, cache):
    whole = (images / "c1" / "2.png").read_bytes()
    (images / "c1" / "2.png").write_bytes(whole[: len(whole) // 2])
    (images / "c0" / "2.png").write_bytes(b"nothing")
    found = check_data(ClassFolder(images, 16))
    assert [text.partition(": ")[0] for text in found.unreadable] == [
        f"cannot read image '{images / 'c0' / '2.png'}'",
        f"cannot read image '{images / 'c1' / '2.png'}'",
    ]
    with pytest.raises(ValueError, match=r"c0/2\.png.*; cannot read image .*c1/2\.png"):
        found.refuse()
    assert not cache.exists()


def test_what_was_found_is_remembered_until_the_content_changes(images, cache, monkeypatch):
    first = check_data(ClassFolder(images, 16))
    assert len(list(cache.iterdir())) == 1
    looked = []
    inspect = report.inspect
    monkeypatch.setattr(report, "inspect", lambda *given: looked.append(given) or inspect(*given))
    assert check_data(ClassFolder(images, 16), thorough=True) == first
    assert looked == []
    (images / "c0" / "2.png").write_bytes((images / "c1" / "2.png").read_bytes())
    check_data(ClassFolder(images, 16))
    assert len(looked) == 6


def test_many_images_delay_nothing(images, monkeypatch):
    """Headers as far as the time goes, no pixels; thoroughly, all."""
    monkeypatch.setattr(report, "CONTENT_FILES", 3)
    monkeypatch.setattr(report, "AT_ONCE", 1)
    monkeypatch.setattr(report, "HEADER_SECONDS", -1.0)
    data = ClassFolder(images, 16)
    found = check_data(data)
    assert (found.headers, found.decoded, found.sides) == (0, 0, [])
    assert found.lines(data)
    found = check_data(data, thorough=True)
    assert (found.headers, found.decoded) == (6, 6)
    assert check_data(data) == found


def test_the_contact_sheet_shows_crops(images):
    sheet = contact_sheet(ClassFolder(images, 16))
    assert sheet.size == (6 * 34 + 2, 34 + 2)
