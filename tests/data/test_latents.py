import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from flowturbo.data import latents
from flowturbo.data.folders import ClassFolder, Subset
from flowturbo.data.pictures import from_uint8
from flowturbo.networks.autoencoder import load_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of seven images, a tiny autoencoder, and their cached latents."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": (8, 8),
    }
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, sample_size=16).save_pretrained(root / "vae")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(7):
            pixels = random.integers(0, 256, (18, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    cache(root)
    return root


def flags(root, *extra):
    return ["--vae-ckpt", str(root / "vae"), "--image-size", "16", "--shard-size", "4", "--num-workers", "0", *extra]


def cache(root, *extra, source="images", name="z"):
    latents.main([str(root / source), str(root / name), *flags(root, *extra)])


def opened(root, name="z", **arguments):
    return latents.LatentFolder(root / name, load_autoencoder(str(root / "vae")), **arguments)


@pytest.mark.parametrize("flipped", [False, True])
def test_cached_moments_are_the_autoencoders_to_half_precision(folder, flipped):
    images, cached = ClassFolder(folder / "images", 16), opened(folder)
    autoencoder = load_autoencoder(str(folder / "vae"))
    assert cached.classes == ["cat", "dog"]
    assert len(cached) == 14
    for index in range(14):
        image, label = images.read(index, flipped)
        moments, cached_label = cached.read(index, flipped)
        expected = autoencoder.moments(from_uint8(torch.from_numpy(np.ascontiguousarray(image))[None]))[0]
        assert cached_label == label
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments, expected.numpy(), atol=1e-3, rtol=1e-3)


def test_only_missing_and_damaged_shards_are_made_again(folder, tmp_path, monkeypatch):
    target = tmp_path / "z"
    arguments = [str(folder / "images"), str(target), *flags(folder)]
    latents.main(arguments)
    digests = json.loads((target / "index.json").read_text())["shards"]
    (target / "00000.npy").unlink()
    damaged = bytearray((target / "00002.npy").read_bytes())
    damaged[-1] ^= 1
    (target / "00002.npy").write_bytes(damaged)
    made = []
    real = latents._encoded
    monkeypatch.setattr(latents, "_encoded", lambda *a: made.append(a[-1].start // 4) or real(*a))
    latents.main(arguments)
    assert made == [0, 2]
    assert json.loads((target / "index.json").read_text())["shards"] == digests


def test_a_folder_made_otherwise_is_refused_with_the_difference(folder):
    with pytest.raises(ValueError, match="image size 16, not 32"):
        cache(folder, "--image-size", "32")
    with pytest.raises(ValueError, match="shard size 4, not 5"):
        cache(folder, "--shard-size", "5")
    Image.new("RGB", (16, 16)).save(folder / "images" / "cat" / "more.png")
    try:
        with pytest.raises(ValueError, match="another dataset"):
            cache(folder)
    finally:
        (folder / "images" / "cat" / "more.png").unlink()
    with pytest.raises(ValueError, match="something else than latents"):
        cache(folder, name="vae")


def test_reading_refuses_what_does_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="image size 16, not 8"):
        opened(folder, image_size=8)
    other = load_autoencoder(str(folder / "vae"))
    with torch.no_grad():
        next(other.network.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="another autoencoder"):
        latents.LatentFolder(folder / "z", other)
    unfinished = tmp_path / "z"
    unfinished.mkdir()
    (unfinished / "index.json").write_text('{"plan": {}}')
    with pytest.raises(ValueError, match="no finished latents"):
        latents.LatentFolder(unfinished, other)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_lost_or_truncated_shard_is_named(folder, tmp_path, damage):
    target = tmp_path / "z"
    latents.main([str(folder / "images"), str(target), *flags(folder)])
    shard = target / "00001.npy"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001\.npy is missing or damaged"):
        latents.LatentFolder(target, load_autoencoder(str(folder / "vae")))


def test_training_on_latents_follows_training_on_images(folder, tmp_path):
    losses = {}
    for data in ("images", "z"):
        train.main(
            [
                *("--target", "predictor", "--data-path", str(folder / data), "--vae-ckpt", str(folder / "vae")),
                *("--image-size", "16", "--hidden-size", "32", "--depth", "1", "--num-heads", "4", "--lr", "1e-3"),
                *("--global-batch-size", "6", "--steps", "4", "--log-every", "1", "--sample-every", "0"),
                *("--num-workers", "0", "--results-dir", str(tmp_path), "--note", data, "--device", "cpu"),
            ]
        )
        log = next(tmp_path.glob(f"*-{data}/log.txt")).read_text()
        losses[data] = [float(w.split("=")[1]) for w in log.split() if w.startswith("loss=")]
    assert len(losses["z"]) == 4
    np.testing.assert_allclose(losses["z"], losses["images"], rtol=1e-3)


def test_a_subset_takes_a_share_of_every_class_and_the_same_one_every_time(folder):
    data = ClassFolder(folder / "images", 16)
    some = Subset(data, 0.4, seed=1)
    assert sorted(some.labels) == [0, 0, 0, 1, 1, 1]
    assert some.indices.tolist() == Subset(data, 0.4, seed=1).indices.tolist()
    assert some.indices.tolist() != Subset(data, 0.4, seed=2).indices.tolist()
    assert len(Subset(data, 0.001, seed=0)) == 2
    image, label = some.read(0, False)
    expected, expected_label = data.read(int(some.indices[0]), False)
    assert (image == expected).all()
    assert label == expected_label
    with pytest.raises(ValueError, match="subset 0"):
        Subset(data, 0, seed=0)


def test_a_class_map_says_what_the_folders_are(folder, tmp_path):
    path = tmp_path / "map.json"
    path.write_text('{"cat": "tabby", "dog": 207}')
    mapped = train.read_class_map(path)
    assert mapped == {"cat": 281, "dog": 207}
    assert set(ClassFolder(folder / "images", 16, num_classes=1000, class_map=mapped).labels) == {281, 207}
    with pytest.raises(ValueError, match=r"train classes 0, 1.*--class-map"):
        ClassFolder(folder / "images", 16, num_classes=1000)
    with pytest.raises(ValueError, match="'dog' is not in the class map"):
        ClassFolder(folder / "images", 16, num_classes=1000, class_map={"cat": 1})
    with pytest.raises(ValueError, match="outside the model's classes 0 to 9"):
        ClassFolder(folder / "images", 16, num_classes=10, class_map=mapped)
    for text in ("[1]", "{", '{"cat": -1}', '{"cat": true}', '{"cat": "no such animal"}'):
        path.write_text(text)
        with pytest.raises(ValueError):
            train.read_class_map(path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3},
        {"classes": []},
        {"folders": [7] * 14},
        {"shard_size": 0},
        {"image_size": "16"},
        {"dataset": None},
    ],
    ids=str,
)
def test_an_index_that_makes_no_sense_is_named(folder, tmp_path, change):
    index = json.loads((folder / "z" / "index.json").read_text())
    index["plan"].update(change)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        latents.LatentFolder(tmp_path, load_autoencoder(str(folder / "vae")))


def test_a_flipped_bit_in_a_shard_stops_the_training_that_reads_it(folder, tmp_path):
    target = tmp_path / "z"
    latents.main([str(folder / "images"), str(target), *flags(folder)])
    content = bytearray((target / "00001.npy").read_bytes())
    content[-7] ^= 1
    (target / "00001.npy").write_bytes(content)
    cached = latents.LatentFolder(target, load_autoencoder(str(folder / "vae")))
    cached.read(0, False)
    with pytest.raises(ValueError, match=r"00001\.npy is damaged"):
        cached.read(5, False)
