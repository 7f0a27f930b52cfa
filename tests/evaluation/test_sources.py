import io
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from flowturbo.data.folders import ClassFolder
from flowturbo.data.images import ORIENTATION, TRANSPARENCY
from flowturbo.data.walk import HIDDEN, OTHER
from flowturbo.evaluation import Archive, ImageArchive, ImageFolder, sources
from flowturbo.evaluation.sides import Side
from flowturbo.evaluation.sources import UnevenImages


def noise_images(count=5, size=(6, 7), channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def npy(array=None, shape=None, descr="|u1", version=(1, 0)):
    """The bytes of an .npy, or of a header that promises what it likes."""
    stream = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(stream, array, version=version)
    else:
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def write_zip(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


# ---- archives


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive_reads_what_numpy_wrote(tmp_path, save):
    arrays = {
        "arr_0": noise_images(),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "text": np.array("random"),
        "empty": np.empty((0, 3)),
    }
    save(tmp_path / "a.npz", **arrays)
    archive = Archive(tmp_path / "a.npz")
    for name, array in arrays.items():
        np.testing.assert_array_equal(archive.read(name), array)
    blocks = list(archive.blocks("arr_0", 2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), arrays["arr_0"])


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy(shape=(10**9, 1024, 1024, 3)), "announces .* bytes are stored"),
        (npy(shape=(2, 4, 4, 3)) + bytes(10), "announces .* but"),
        (npy(np.zeros((2, 4, 4, 3), np.uint8)) + b"!", "announces .* but"),
        (npy(np.zeros((2, 4, 4, 3), np.uint8), version=(3, 0)), "version"),
        (npy(np.array([{}, {}])), "object array"),
        (b"no array at all", "magic"),
        (b"", "magic|EOF|header"),
    ],
)
def test_false_promises_are_refused(tmp_path, member, message):
    path = write_zip(tmp_path / "bad.npz", arr_0=member)
    with pytest.raises(ValueError, match=rf"bad\.npz: arr_0: .*({message})"):
        Archive(path).header("arr_0")


def test_zip_directory_that_lies_about_sizes_is_refused(tmp_path):
    size = 1 << 40
    content = npy(shape=(size,))
    path = write_zip(tmp_path / "bad.npz", arr_0=content)
    archive = Archive(path)
    archive._members["arr_0"].file_size = archive._members["arr_0"].compress_size = len(content) + size
    with pytest.raises(ValueError, match="announces"):
        archive.read("arr_0")


def test_flipped_pixel_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=noise_images())
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: .*CRC"):
        list(ImageArchive(path).batches(2))


# ---- folders


def test_folder_is_read_in_the_order_of_its_paths(tmp_path):
    images = noise_images(6)
    (tmp_path / "sub").mkdir()
    for name, image in zip(["a.png", "b.PNG", "c.bmp", "sub/000.png", "sub/001.png", "z.png"], images):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "settings.json").write_text("{}")
    folder = ImageFolder(tmp_path)
    assert len(folder) == 6
    batches = list(folder.batches(4))
    assert [len(batch) for batch in batches] == [4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_grey_is_the_same_however_it_is_stored(tmp_path):
    grey = noise_images(channels=1)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(grey[..., 0]):
        Image.fromarray(image).save(tmp_path / "folder" / f"{index}.png")
    np.savez(tmp_path / "one.npz", arr_0=grey)
    np.savez(tmp_path / "three.npz", arr_0=grey.repeat(3, axis=3))
    for images in (
        ImageFolder(tmp_path / "folder"),
        ImageArchive(tmp_path / "one.npz"),
        ImageArchive(tmp_path / "three.npz"),
    ):
        np.testing.assert_array_equal(np.concatenate(list(images.batches(2))), grey.repeat(3, axis=3))


def all_of(images, size=50):
    return np.concatenate(list(images.batches(size)))


def test_a_folder_is_read_as_for_training(tmp_path, class_folder):
    """Orientation, transparency, 16 bits, hidden entries and links: the evaluator sees what a model was trained on."""
    root = class_folder(tmp_path / "d", images=2, size=(20, 13))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise_images(1, (13, 20))[0]).save(root / "c0" / "turned.jpg", exif=exif)
    Image.new("RGBA", (13, 20), (1, 2, 3, 0)).save(root / "c1" / "veiled.png")
    Image.fromarray(np.full((13, 20), 40_000, np.uint16)).save(root / "c1" / "deep.png")
    (root / "c0" / "._x.png").touch()
    (root / "c0" / "loop").symlink_to("..")
    for background in ("white", "#102030"):
        evaluated = ImageFolder(root, 8, background)
        trained = ClassFolder(root, 8, background=background)
        assert evaluated.files == [trained.path(i) for i in range(len(trained))]
        expected = np.stack([trained.read(i, False)[0] for i in range(len(trained))])
        assert np.array_equal(all_of(evaluated, 3), expected.transpose(0, 2, 3, 1))
        assert evaluated.skipped == trained.skipped
        assert evaluated.applied == trained.applied.counts


def test_packed_images_are_those_of_a_folder(tmp_path, class_folder):
    root = class_folder(tmp_path / "d", images=2)
    shutil.make_archive(tmp_path / "x", "zip", root)
    shutil.make_archive(tmp_path / "x", "tar", root)
    folder = ImageFolder(root)
    for suffix in ("zip", "tar"):
        packed = Side.open(str(tmp_path / f"x.{suffix}")).images
        assert isinstance(packed, ImageFolder)
        assert sorted(packed.files) == [os.path.relpath(file, root) for file in folder.files]
        order = np.argsort(packed.files)
        assert np.array_equal(all_of(packed, 3)[order], all_of(folder))


def test_a_folder_of_a_link_to_images_is_those_images(tmp_path):
    """A link to the reference set once gave an FID of 107 of that set with itself."""
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    for index, image in enumerate(noise_images()):
        Image.fromarray(image).save(tmp_path / "pets" / "cat" / f"{index}.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat").symlink_to("../pets/cat")
    assert np.array_equal(all_of(ImageFolder(tmp_path / "mine")), all_of(ImageFolder(tmp_path / "pets")))


def test_what_was_passed_over_and_changed_is_counted(tmp_path):
    for index, image in enumerate(noise_images(4, (6, 6))):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (6, 6)).save(tmp_path / "4.jpg", exif=exif)
    Image.new("LA", (6, 6), (7, 128)).save(tmp_path / "5.png")
    (tmp_path / ".6.png").touch()
    (tmp_path / "settings.json").touch()
    folder = ImageFolder(tmp_path)
    for _ in range(2):  # counted anew each time
        all_of(folder, 2)
        assert folder.applied == {ORIENTATION: 1, TRANSPARENCY: 1}
    assert folder.skipped == {HIDDEN: 1, OTHER: 1}


def test_batches_lie_in_memory_as_archives_do(tmp_path):
    """Another layout would let a network take other kernels, whose last bits differ."""
    images = noise_images(4, (6, 7))
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    assert all(batch.flags.c_contiguous for batch in ImageFolder(tmp_path).batches(3))


def test_bad_images_are_named(tmp_path):
    image = Image.fromarray(noise_images(1, (40, 40))[0])
    image.save(tmp_path / "a.png")
    for name, content, message in [
        ("b.png", b"text", "cannot identify"),
        ("b.jpg", None, "truncated"),
        ("c.png", Image.new("RGB", (40, 30)), "40×30 pixels, but a.png has 40×40: expected images of one size"),
        ("d.tif", Image.new("F", (40, 40)), "mode F .*expected 8 or 16 bits"),
    ]:
        path = tmp_path / name
        if isinstance(content, Image.Image):
            content.save(path)
        elif content is None:
            image.save(path)
            path.write_bytes(path.read_bytes()[:-200])  # a truncated JPEG still passes verify()
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*: .*{message}") as caught:
            list(ImageFolder(tmp_path).batches(2))
        assert isinstance(caught.value, UnevenImages) == (name == "c.png")
        path.unlink()
    with pytest.raises(ValueError, match="1 images in this folder, expected at least 2"):
        ImageFolder(tmp_path)


def test_images_of_several_sizes_can_be_cropped_to_one(tmp_path):
    for side in (8, 9, 30):
        Image.fromarray(noise_images(1, (side, side + 3))[0]).save(tmp_path / f"{side}.png")
    assert all_of(ImageFolder(tmp_path, 8)).shape == (3, 8, 8, 3)
    with pytest.raises(UnevenImages):
        all_of(ImageFolder(tmp_path))


def test_impossible_backgrounds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="background 'red': expected"):
        ImageFolder(tmp_path, background="red")


@pytest.mark.parametrize("copies", [1, 40])
def test_an_archive_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path, monkeypatch, copies):
    """2.7 GB of 2.7 MB would be read for minutes; in many parts too."""
    monkeypatch.setattr(sources, "FREE", 1 << 20)
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(copies):
            with archive.open(f"arr_{k}.npy", "w") as member:
                np.lib.format.write_array(member, np.zeros((1 + 300 // copies, 100, 100), np.uint8))
    with pytest.raises(ValueError, match=r"bomb\.npz: file: [0-9,]+ bytes packed into [0-9,]+, expected at most 100"):
        Archive(path)


def test_what_packs_well_and_is_small_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((100, 64, 64, 3), np.uint8))
    assert (tmp_path / "a.npz").stat().st_size * 100 < 100 * 64 * 64 * 3
    assert all_of(ImageArchive(tmp_path / "a.npz")).shape == (100, 64, 64, 3)


def test_an_archive_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz: it is no file"):
        Archive(tmp_path / "a.npz")
