import contextlib
import io
import random
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.evaluation import Archive, FeatureSet, GaussianStatistics, ImageArchive, ImageFolder, atomic_write
from flowturbo.evaluation.extractors import INCEPTION_IDENTITY


def feature_set(count=6, **changes):
    pool = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    statistics = GaussianStatistics(4)
    statistics.update(pool)
    known = {"pool": pool, "logits": pool[:, :3], "pool_statistics": statistics.gaussian(), "count": count}
    return FeatureSet(**{"source": "made up", "extractor": "pixels", "labels": "random"} | known | changes)


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


def test_damage_raises_value_errors_only(tmp_path):
    path = tmp_path / "whole.npz"
    feature_set().save(path)
    whole, noise, accepted = path.read_bytes(), random.Random(0), 0
    damaged = tmp_path / "damaged.npz"
    for trial in range(200):
        content = bytearray(whole)
        if trial % 2:
            content[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
        else:
            del content[noise.randrange(len(content)) :]
        damaged.write_bytes(content)
        with contextlib.suppress(ValueError):
            FeatureSet.load(damaged)
            accepted += 1
    assert accepted < 30  # some bits, such as dates, mean nothing


def test_flipped_pixel_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=noise_images())
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: .*CRC"):
        list(ImageArchive(path).batches(2))


def test_feature_set_round_trip(tmp_path):
    saved = feature_set()
    saved.save(tmp_path / "f.npz")
    loaded = FeatureSet.load(tmp_path / "f.npz")
    assert (loaded.source, loaded.extractor, loaded.count, loaded.labels) == ("made up", "pixels", 6, "random")
    assert torch.equal(loaded.pool, saved.pool)
    assert torch.equal(loaded.logits, saved.logits)
    assert torch.equal(loaded.pool_statistics.covariance, saved.pool_statistics.covariance)
    assert loaded.spatial_statistics is None
    assert [file.name for file in tmp_path.iterdir()] == ["f.npz"]


def test_reference_of_the_adm_suite(tmp_path):
    mu, sigma = np.arange(4, dtype=np.float32), np.eye(4)
    np.savez(tmp_path / "ref.npz", arr_0=noise_images(), mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    loaded = FeatureSet.load(tmp_path / "ref.npz")
    assert loaded.extractor == INCEPTION_IDENTITY
    assert loaded.count is None
    assert loaded.pool_statistics.mean.dtype == torch.float64
    assert torch.equal(loaded.spatial_statistics.covariance, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.array([0, np.nan, 0, 0])}, "mu contains NaN"),
        ({"mu": np.zeros(3)}, r"mu \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(4, np.int64)}, "mu is int64"),
        ({"pool": np.full((6, 4), np.nan, np.float32)}, "pool contains NaN"),
        ({"pool": np.zeros((6, 5), np.float32)}, r"pool \(6, 5\): expected \(N, 4\)"),
        ({"pool": np.zeros((5, 4), np.float32)}, r"pool, logits and count speak of \[5, 6, 6\] images"),
        ({"logits": np.zeros(6, np.float32)}, r"logits \(6,\)"),
        ({"count": np.array(1)}, "count is .* at least 2"),
        ({"count": np.array([6, 6])}, "count is"),
        ({"extractor": np.array(7)}, r"extractor is array\(7\), expected text"),
        ({"extractor": np.array("")}, "extractor is .* expected text"),
    ],
)
def test_bad_feature_files_are_refused(tmp_path, changes, message):
    feature_set().save(tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:
        np.savez(tmp_path / "bad.npz", **{**arrays, **changes})
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{message}"):
        FeatureSet.load(tmp_path / "bad.npz")


def test_atomic_write_leaves_whole_files_or_none(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert path.read_text() == "old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="there is no folder"), atomic_write(tmp_path / "no" / "file"):
        pass


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


def test_bad_images_are_named(tmp_path):
    image = Image.fromarray(noise_images(1, (40, 40))[0])
    image.save(tmp_path / "a.png")
    for name, content, message in [
        ("b.png", b"text", "not a readable image"),
        ("b.jpg", None, "not a readable image"),
        ("c.png", Image.new("RGB", (40, 30)), "40×30 pixels, but a.png has 40×40"),
        ("d.png", Image.new("I;16", (40, 40)), "mode I;16, expected 8 bits"),
    ]:
        path = tmp_path / name
        if isinstance(content, Image.Image):
            content.save(path)
        elif content is None:
            image.save(path)
            path.write_bytes(path.read_bytes()[:-200])  # a truncated JPEG still passes verify()
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            list(ImageFolder(tmp_path).batches(2))
        path.unlink()
    with pytest.raises(ValueError, match="1 images in this folder, expected at least 2"):
        ImageFolder(tmp_path)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("L", (40, 40)).save(tmp_path / name)
    monkeypatch.setattr("flowturbo.evaluation.images.MAX_PIXELS", 1599)
    with pytest.raises(ValueError, match=r"a\.png: .*40×40 pixels, expected at most 1599"):
        list(ImageFolder(tmp_path).batches(2))
