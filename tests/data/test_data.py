import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.data.folders import Batch, ClassFolder, TrainingSamples, centre_crop, read_image, training_loader
from flowturbo.system import cli
from flowturbo.system.distributed import World

CPU = torch.device("cpu")


def one(rank=0, size=1):
    return World(rank, rank, size, CPU)


def noise_picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


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
    (16, 16),
    (17, 16),
    (16, 33),
    (64, 64),
    (63, 101),
    (100, 31),
    (5, 3),
    (1, 1),
    (1, 9),
    (250, 20),
    (31, 32),
    (33, 47),
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
    pixels = np.random.default_rng(0).integers(0, 64, (16, 16), dtype=np.uint8) * 4
    expected = pixels.reshape(8, 2, 8, 2).astype(int).sum((1, 3)) / 4
    assert np.abs(np.asarray(centre_crop(Image.fromarray(pixels), 8)) - expected).max() <= 0.5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_the_channels_asked_for(tmp_path, mode, channels):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    noise_picture(8, 8, mode).save(path)
    array = read_image(path, 8, channels)
    assert (array.shape, array.dtype) == ((channels, 8, 8), np.uint8)
    expected = np.asarray(noise_picture(8, 8, mode).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    assert np.array_equal(array, np.moveaxis(expected.reshape(8, 8, channels), -1, 0))


# ---- folders


def test_labels_are_the_sorted_folders(class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d", classes=3, images=2), 8)
    assert data.classes == ["c0", "c1", "c2"]
    assert data.labels == [0, 0, 1, 1, 2, 2]
    for i in range(6):
        stored = np.asarray(Image.open(tmp_path / "d" / f"c{i // 2}" / f"{i % 2}.png"))
        for flipped in (False, True):
            image, label = data.read(i, flipped)
            assert np.array_equal(image, stored[:, :: -1 if flipped else 1].transpose(2, 0, 1))
            assert label == i // 2


def test_wordnet_folders_get_imagenets_labels(class_folder, tmp_path):
    class_folder(tmp_path, classes=2, images=1)
    (tmp_path / "c0").rename(tmp_path / "n09472597")
    (tmp_path / "c1").rename(tmp_path / "golden_retriever")
    data = ClassFolder(tmp_path, 8, num_classes=1000)
    assert dict(zip(data.classes, data.labels)) == {"golden_retriever": 207, "n09472597": 980}


def empty_class(root):
    (root / "empty").mkdir()


def only_files(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "a.png").touch()


@pytest.mark.parametrize(
    ("damage", "classes", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), None, "does not exist: expected one folder of images"),
        (only_files, None, "expected one folder of images per class, like data/cat/1.png"),
        (empty_class, None, "Found no valid file for the classes empty.*expected one folder"),
        (lambda root: None, 1, "2 class folders, the model 1 classes"),
        (lambda root: None, 1000, "'c0', 'c1' is no WordNet id or ImageNet class name.*--target predictor"),
        (lambda root: None, 10, "nothing says which of them they are.*--target predictor"),
    ],
)
def test_a_folder_that_does_not_fit_is_explained(class_folder, tmp_path, damage, classes, message):
    root = class_folder(tmp_path / "data")
    damage(root)
    with pytest.raises(ValueError, match=message) as caught:
        ClassFolder(root, 8, num_classes=classes)
    assert len(cli.one_line(caught.value)) < 500


def test_images_of_two_channels_are_refused(class_folder, tmp_path):
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        ClassFolder(class_folder(tmp_path / "d"), 8, channels=2)


def test_a_damaged_image_is_named_wherever_it_breaks(tmp_path):
    for kind in ("png", "jpg", "webp", "bmp"):
        path = tmp_path / f"a.{kind}"
        noise_picture(9, 9).save(path)
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


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for width, height in ((8, 9), (50, 50)):  # a warning of Pillow's; an error
        noise_picture(width, height).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"cannot read image .*a\.png.*decompression bomb"):
            read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_in_a_loader_is_told_in_one_line(class_folder, tmp_path, workers):
    root = class_folder(tmp_path / "d", images=4)
    (root / "c1" / "2.png").write_bytes((root / "c1" / "2.png").read_bytes()[:40])
    samples = TrainingSamples(ClassFolder(root, 8), 0, (3, 8, 8))
    line = None
    try:  # not pytest.raises, which would keep the loader and its worker alive until the interpreter's end
        list(training_loader(samples, 4, one(), first=0, last=2, workers=workers))
    except ValueError as error:
        line = cli.one_line(error)
    assert line is not None
    assert line.startswith(f"cannot read image '{root / 'c1' / '2.png'}': ")
    assert "Traceback" not in line
    assert "\n" not in line


def test_images_are_read_once_where_they_fit_into_memory(class_folder, tmp_path, monkeypatch):
    root = class_folder(tmp_path / "d")
    kept = ClassFolder(root, 8)
    before = [kept.read(i, False)[0].copy() for i in range(len(kept))]
    monkeypatch.setattr("flowturbo.data.folders.MEMORY_BYTES", 10)
    fresh = ClassFolder(root, 8)
    assert all(np.array_equal(fresh.read(i, False)[0], before[i]) for i in range(len(kept)))
    for path in root.rglob("*.png"):
        path.unlink()
    assert all(np.array_equal(kept.read(i, False)[0], before[i]) for i in range(len(kept)))
    with pytest.raises(ValueError, match="cannot read image"):
        fresh.read(0, False)


# ---- training samples


@pytest.fixture(scope="module")
def data(class_folder, tmp_path_factory):
    """Seven images in two classes, whose first pixel is their number."""
    root = class_folder(tmp_path_factory.mktemp("data") / "d", images=4)
    (root / "c1" / "3.png").unlink()
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] = pixels[0, -1] = number
        Image.fromarray(pixels).save(path)
    return ClassFolder(root, 8)


def samples_of(data, seed=0, **options):
    return TrainingSamples(data, seed, (2, 4, 4), **options)


def test_every_pass_takes_each_image_once_in_an_order_of_its_own(data):
    passes = [samples_of(data).__getitems__(range(7 * e, 7 * e + 7)).images[:, 0, 0, 0].tolist() for e in range(6)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len(set(map(tuple, passes))) == 6
    assert passes[0] != samples_of(data, seed=1).__getitems__(range(7)).images[:, 0, 0, 0].tolist()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_sample_depends_on_seed_and_number_alone(data):
    whole = samples_of(data).__getitems__(range(30))
    assert [tuple(v.shape) for v in whole] == [
        (30, 3, 8, 8),
        (30,),
        (30, 2, 4, 4),
        (30, 2, 4, 4),
        (30,),
        (30,),
        (30,),
    ]
    assert [v.dtype for v in whole] == [torch.uint8, torch.int64] + [torch.float32] * 5
    for number in (0, 13, 29):
        assert same(samples_of(data).__getitems__([number]), Batch(*(v[number : number + 1] for v in whole)))
    assert not torch.equal(samples_of(data, seed=1).__getitems__(range(30)).noise, whole.noise)


def test_the_draws_of_a_sample_are_unlike(data):
    batch = samples_of(data).__getitems__(range(3000))
    for draws in (batch.u_t, batch.u_dt, batch.u_drop):
        assert abs(draws.mean() - 0.5) < 0.03
        assert 0 <= draws.min() < draws.max() < 1
    assert len({tuple(u.tolist()) for u in (batch.u_t, batch.u_dt, batch.u_drop)}) == 3
    for a, b in ((batch.u_t, batch.u_dt), (batch.u_t, batch.u_drop), (batch.u_dt, batch.u_drop)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1
    for noise in (batch.noise, batch.posterior_noise):
        assert abs(noise.mean()) < 0.02
        assert abs(noise.var() - 1) < 0.03
    assert abs((batch.noise * batch.posterior_noise).mean()) < 0.02


def test_flips_are_of_half_the_samples_and_change_nothing_else(data):
    flipped, plain = samples_of(data).__getitems__(range(400)), samples_of(data, flip=False).__getitems__(range(400))
    kept = (flipped.images == plain.images).flatten(1).all(1)
    turned = (flipped.images == plain.images.flip(3)).flatten(1).all(1)
    assert (kept ^ turned).all()
    assert 150 < turned.sum() < 250
    assert same(flipped[1:], plain[1:])
    first = {int(i): {bool(t) for t in turned[plain.images[:, 0, 0, 0] == i]} for i in range(7)}
    assert all(seen == {True, False} for seen in first.values())  # of the sample, not of the image


def test_pixel_models_draw_no_posterior_noise(data):
    batch = samples_of(data, posterior=False).__getitems__(range(5))
    assert batch.posterior_noise.shape == (0,)
    assert batch.noise.shape == (5, 2, 4, 4)


def batches(data, size, rank=0, ranks=1, first=0, last=3, workers=0):
    loader = training_loader(samples_of(data), size, one(rank, ranks), first=first, last=last, workers=workers)
    assert len(loader) == last - first
    return list(loader)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_ranks_share_each_global_batch(data, ranks):
    whole = samples_of(data)
    per_rank = [batches(data, 18, rank, ranks) for rank in range(ranks)]
    for step in range(3):
        parts = [per_rank[rank][step] for rank in range(ranks)]
        together = Batch(*(torch.cat(values) for values in zip(*parts)))
        assert same(together, whole.__getitems__(range(18 * step, 18 * step + 18)))


def test_batches_know_neither_workers_nor_where_the_run_started(data):
    reference = batches(data, 5, last=4)
    for other in (
        batches(data, 5, last=4, workers=2),
        batches(data, 5, first=0, last=2) + batches(data, 5, 0, 1, 2, 4),
    ):
        assert len(other) == 4
        assert all(same(a, b) for a, b in zip(other, reference))


def test_more_ranks_than_samples_are_refused(data):
    with pytest.raises(ValueError, match="global batch size 2 over 3 ranks: needs at least 3 samples"):
        batches(data, 2, 0, 3)
