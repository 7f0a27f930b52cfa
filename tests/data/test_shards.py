"""Images packed in files: what the readers of zip, tar and parquet have in common, and what they refuse."""

import io
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from flowturbo.data.images import read_image
from flowturbo.data.shards import open_shards
from flowturbo.data.tables import MissingReader
from flowturbo.data.walk import HIDDEN, OTHER, SYSTEM
from flowturbo.system.advice import advice_for


def png(shade, size=8):
    content = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade, np.uint8)).save(content, "PNG")
    return content.getvalue()


IMAGES = {f"{name}/{k}.png": png(10 * k + ord(name)) for name in "ab" for k in range(3)}


def pack_all(pack, folder):
    """The same images in every kind of packed file."""
    pack[".zip"](IMAGES, folder / "x.zip", zipfile.ZIP_DEFLATED)
    pack[".tar"](IMAGES, folder / "x.tar")
    rows = [{"bytes": content, "path": name} for name, content in IMAGES.items()]
    pack[".parquet"]({"image": rows, "label": [0, 0, 0, 1, 1, 1]}, folder / "x.parquet")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".parquet"])
def test_images_are_read_by_number_in_any_order_and_after_pickling(pack, tmp_path, suffix):
    pack_all(pack, tmp_path)
    shards = open_shards(tmp_path / f"x{suffix}")
    for reader in (shards, pickle.loads(pickle.dumps(shards))):
        assert len(reader) == len(reader.names) == 6
        for k in (5, 0, 3, 3):
            name, content = list(IMAGES.items())[k]
            assert reader.read(k).content == content
            assert str(tmp_path / f"x{suffix}") in reader.where(k) == reader.read(k).name
            assert read_image(reader.read(k)).pixels[0, 0, 0] == 10 * int(name[2]) + ord(name[0])
    if suffix != ".parquet":
        assert shards.names == list(IMAGES)
        assert shards.pieces() == [(name, len(content)) for name, content in IMAGES.items()]


def test_shards_come_one_after_another_by_their_names(pack, tmp_path):
    for k in (10, 2, 1):
        pack[".tar"]({f"{k}.png": png(k)}, tmp_path / f"{k:03}.tar")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache").mkdir()
    for path in (tmp_path, tmp_path / "*.tar"):
        shards = open_shards(path)
        assert shards.names == ["1.png", "2.png", "10.png"]
        assert [shards.read(k).content for k in range(3)] == [png(1), png(2), png(10)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_fields_lie_beside_images(pack, tmp_path, format):
    long = "ö" * 40 if format == tarfile.USTAR_FORMAT else "ö" * 120
    files = {f"./{long}/1.jpg": png(1), f"./{long}/1.cls": b"7", "2.png": png(2), "2.txt": b"two", "3.txt": b"-"}
    pack[".tar"](files, tmp_path / "x.tar", format)
    shards = open_shards(tmp_path)
    assert (shards.names, shards.fields) == ([f"{long}/1.jpg", "2.png"], ["cls", "txt"])
    assert (shards.column("cls"), shards.column("txt")) == ([b"7", None], [None, b"two"])
    assert (shards.read(1).content, shards.column("json"), shards.skipped) == (png(2), [None, None], {OTHER: 1})


def test_columns_of_tables_are_fields(pack, tmp_path):
    for part, numbers in enumerate(([1, 2, 3, 4], [5])):
        columns = {"img": [png(k) for k in numbers], "fine": [k % 2 for k in numbers], "text": list(map(str, numbers))}
        features = {"fine": {"_type": "ClassLabel", "names": ["even", "odd"]}, "text": {"dtype": "string"}}
        pack[".parquet"](columns, tmp_path / f"train-{part:05}-of-00002.parquet", features)
    shards = open_shards(tmp_path)
    assert (shards.image, shards.fields) == ("img", ["fine", "text"])
    assert (shards.column("text"), shards.column("fine")) == (list("12345"), [1, 0, 1, 0, 1])
    assert (shards.class_names("fine"), shards.class_names("text")) == (["even", "odd"], None)
    assert shards.where(4) == f"{tmp_path / 'train-00001-of-00002.parquet'}: row 0"
    assert [shards.read(k).content for k in range(5)] == [png(k) for k in range(1, 6)]
    assert len({shards.digest(k) for k in range(len(shards.pieces()))}) == 3


def test_hidden_and_system_members_are_passed_over(pack, tmp_path):
    files = {"a/1.png": png(1), "__MACOSX/a/._1.png": b"", "a/.2.png": b"", ".git/3.png": b"", "a/Thumbs.db": b""}
    pack[".zip"]({**files, "a/readme": b""}, tmp_path / "x.zip")
    shards = open_shards(tmp_path)
    assert (shards.names, shards.skipped) == (["a/1.png"], {SYSTEM: 2, HIDDEN: 2, OTHER: 1})


def test_folders_with_folders_are_no_shards(pack, tmp_path):
    (tmp_path / "a").mkdir()
    pack[".zip"]({"a/1.png": png(1)}, tmp_path / "a.zip")
    assert open_shards(tmp_path) is None
    assert open_shards(tmp_path / "a") is None
    assert open_shards(tmp_path / "gone") is None


def broken_zip(path, change, method=zipfile.ZIP_STORED):
    """A zip of one image whose record in the central directory was changed."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/1.png", png(1, 64))
    content = bytearray(path.read_bytes())
    change(content, content.rindex(b"PK\1\2"))
    path.write_bytes(content)


def write(offset, value, length=2):
    def change(content, directory):
        content[directory + offset : directory + offset + length] = value.to_bytes(length, "little")

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (write(8, 1), "x.zip: a/1.png is encrypted"),
        (write(10, 12), "x.zip: a/1.png is compressed by method 12"),
        (write(24, 2**31, 4), "x.zip: a/1.png announces 2,147,483,648 bytes, expected at most"),
        (write(24, 2**27, 4), "x.zip: a/1.png announces 134,217,728 bytes packed into"),
        (write(16, 5, 4), "x.zip: a/1.png is damaged: its checksum"),
        (write(42, 9, 4), "x.zip: a/1.png is damaged: there is no header"),
        (lambda content, at: content.__setitem__(slice(80, 90), b"0123456789"), "x.zip: a/1.png is damaged"),
        (lambda content, at: content.__delitem__(slice(at + 20, None)), "x.zip': a damaged zip archive"),
    ],
)
def test_a_damaged_or_lying_zip_is_refused(tmp_path, change, said):
    broken_zip(tmp_path / "x.zip", change, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=re.escape(said)):
        open_shards(tmp_path).read(0)


@pytest.mark.parametrize("name", ["../1.png", "/1.png", "a/../../1.png", "..\\1.png"])
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_paths_that_lead_out_are_refused(pack, tmp_path, name, suffix):
    if "\\" in name and suffix == ".tar":
        name = name.replace("\\", "/")
    pack[suffix]({name: png(1)}, tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match=rf"x{suffix}: the path .*1.png' leads out of the archive"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (slice(0, 560), "x.tar is truncated: it ends in the middle of 1.png"),
        (slice(0, 1024), "x.tar is truncated: it ends at byte 1,024 without a mark of its end"),
        (slice(0, 1100), "x.tar is truncated: it ends at byte 1,100"),
        (slice(512, None), "x.tar is no tar archive"),
        (slice(0, 0), "x.tar is truncated: it ends at byte 0"),
    ],
)
def test_a_truncated_tar_is_refused(pack, tmp_path, cut, said):
    pack[".tar"]({"1.png": png(1), "2.png": png(2)}, tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[cut])
    with pytest.raises(ValueError, match=re.escape(said)):
        open_shards(tmp_path)


def test_a_tar_that_shrinks_is_told_when_it_is_read(pack, tmp_path):
    pack[".tar"]({"1.png": png(1), "2.png": png(2)}, tmp_path / "x.tar")
    shards = open_shards(tmp_path)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1600])
    assert shards.read(0).content == png(1)
    with pytest.raises(ValueError, match=r"x.tar: 2.png is damaged: the archive ends in the middle"):
        shards.read(1)


def test_compressed_tars_are_refused(pack, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"x.tar is compressed by gzip, .* expected a plain tar"):
        open_shards(tmp_path)
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    for path in (tmp_path, tmp_path / "x.tar.gz"):
        with pytest.raises(ValueError, match=r"x.tar.gz' is compressed"):
            open_shards(path)


def test_a_pattern_may_lie_below_a_folder_with_brackets(pack, tmp_path):
    folder = tmp_path / "b[1]"
    folder.mkdir()
    pack_all(pack, folder)
    assert open_shards(folder / "*.tar").files == [str(folder / "x.tar")]


def test_mixed_folders_are_refused(pack, tmp_path):
    pack_all(pack, tmp_path)
    with pytest.raises(ValueError, match=r"several kinds, .parquet, .tar, .zip"):
        open_shards(tmp_path)
    (tmp_path / "y.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"holds images, like 'y.png', beside 'x.parquet'"):
        open_shards(tmp_path)


def test_tables_of_several_sets_are_refused(pack, tmp_path):
    for name in ("train", "test"):
        pack[".parquet"]({"image": [png(1)]}, tmp_path / f"{name}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"holds the sets test, train: expected one, like .*train\*.parquet"):
        open_shards(tmp_path)
    assert len(open_shards(tmp_path / "train-*.parquet")) == 1


@pytest.mark.parametrize(("names", "refused"), [(("train-0000", "validation-00"), True), (("n0144", "n0151"), False)])
def test_archives_of_several_sets_are_refused(pack, tmp_path, names, refused):
    """Not those of several classes, as ImageNet's own are."""
    for name in names:
        pack[".tar"]({"a.png": png(1)}, tmp_path / f"{name}.tar")
    if refused:
        with pytest.raises(ValueError, match=r"the sets train, validation: expected one, like .*validation\*.tar"):
            open_shards(tmp_path)
    else:
        assert len(open_shards(tmp_path)) == 2


def test_tables_without_images_are_refused(pack, tmp_path):
    pack[".parquet"](
        {"image": [{"bytes": None, "path": "1.png"}, {"bytes": b"-", "path": "-"}]}, tmp_path / "x.parquet"
    )
    with pytest.raises(ValueError, match=r"x.parquet: row 0 holds no image bytes"):
        open_shards(tmp_path).read(0)
    pack[".parquet"]({"url": ["a"], "text": ["b"]}, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet has the columns url, text: expected image"):
        open_shards(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(ValueError, match=r"x.parquet': a damaged parquet table"):
        open_shards(tmp_path)


def test_damage_within_a_table_names_the_column(pack, tmp_path):
    pack[".parquet"]({"image": [png(k, 64) for k in range(4)]}, tmp_path / "x.parquet")
    shards = open_shards(tmp_path)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[4:30] = bytes(26)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.parquet: image is damaged"):
        shards.read(0)


def test_without_pyarrow_one_line_says_what_is_missing(pack, tmp_path, monkeypatch):
    pack[".parquet"]({"image": [png(1)]}, tmp_path / "x.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingReader, match=r"x.parquet' needs pyarrow, which is not installed") as caught:
        open_shards(tmp_path)
    assert "flowturbo[shards]" in advice_for(caught.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x.zip' is not there"):
        open_shards(tmp_path / "x.zip")
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a").mkdir()
    assert open_shards(tmp_path / "x.tar") is None


def test_a_member_that_comes_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(ValueError, match=r"x.tar: 1.png comes twice"):
        open_shards(tmp_path)
