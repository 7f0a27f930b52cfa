import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import cache_latents
from flowturbo.data.folders import ClassFolder
from flowturbo.data.latents import LatentFolder, OtherLatents
from flowturbo.data.options import CachingOptions
from flowturbo.networks.autoencoder import load_autoencoder


@pytest.fixture(scope="module")
def made(class_folder, cached, tmp_path_factory):
    """Two classes of seven images in `images`, and their latents of four images a shard in `z`."""
    root = tmp_path_factory.mktemp("caching")
    class_folder(root / "images", images=7, size=(24, 18))
    assert cached(root / "images", root / "z").images == 14
    return root


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def index_of(root):
    return json.loads((root / "index.json").read_text())


def test_only_missing_and_damaged_shards_are_made_again(folder, cached, encoder):
    target, index = folder / "z", index_of(folder / "z")
    assert cached(folder / "images", target).images == 0
    (target / "00000.npy").unlink()
    damaged = bytearray((target / "00002.npy").read_bytes())
    damaged[-1] ^= 1
    (target / "00002.npy").write_bytes(damaged)
    counting = encoder()
    assert cached(folder / "images", target, counting).images == 8
    assert counting.encoded == 16  # both flips
    assert index_of(target) == index
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".sha256") == [
        *(".lock", "00000.npy", "00001.npy", "00002.npy", "00003.npy", "index.json")
    ]


def test_the_record_is_that_of_the_images(made):
    plan, data = index_of(made / "z")["plan"], ClassFolder(made / "images", 16)
    assert (plan["dataset"], plan["dataset_of_0_1"]) == (data.fingerprint(), data.fingerprint_of_0_1)
    assert plan["reading_rules"] == dict(data.identity().rules)
    assert set(plan["read_otherwise"].values()) == {0}


def test_half_precision_is_the_encoders_too(made, cached, encoder, tmp_path):
    half = encoder()
    cached(made / "images", tmp_path / "z", half, precision="bf16")
    assert half.dtype == torch.bfloat16
    plan = index_of(tmp_path / "z")["plan"]
    assert (plan["precision"], plan["autoencoder"]) == ("bf16", encoder().fingerprint())
    with pytest.raises(OtherLatents, match="precision 'bf16', not 'fp32'"):
        cached(made / "images", tmp_path / "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 32}, "image_size 16, not 32"), ({"shard_size": 5}, "shard_size 4, not 5")],
    ids=str,
)
def test_a_folder_made_otherwise_is_refused_with_the_difference(folder, cached, change, message):
    with pytest.raises(OtherLatents, match=message):
        cached(folder / "images", folder / "z", **change)


def test_a_folder_of_other_weights_or_images_is_refused(folder, cached, encoder):
    with pytest.raises(OtherLatents, match="autoencoder"):
        cached(folder / "images", folder / "z", encoder((1.0,)))
    path = folder / "images" / "c0" / "0.png"
    before = path.read_bytes()
    path.write_bytes(before[:-20] + b"\0" + before[-19:])  # of the same size
    with pytest.raises(OtherLatents, match="the data have other images"):
        cached(folder / "images", folder / "z")
    path.write_bytes(before)
    assert cached(folder / "images", folder / "z").images == 0
    Image.new("RGB", (16, 16)).save(folder / "images" / "c0" / "more.png")
    with pytest.raises(OtherLatents, match="made otherwise"):
        cached(folder / "images", folder / "z")
    with pytest.raises(ValueError, match="something else than latents"):
        cached(folder / "images", folder / "images")


@pytest.mark.parametrize("index", [{}, {"plan": 3}, {"plan": {"dataset": 3}}], ids=str)
def test_an_index_without_a_plan_is_refused(folder, cached, index):
    (folder / "z" / "index.json").write_text(json.dumps(index))
    with pytest.raises(OtherLatents, match="for images that its index does not name"):
        cached(folder / "images", folder / "z")


def test_latents_of_version_0_1_are_gone_on_with_where_the_images_are_read_as_then(folder, cached):
    new = index_of(folder / "z")
    old = {**new["plan"], "dataset": new["plan"]["dataset_of_0_1"]}
    for name in ("dataset_covers", "dataset_of_0_1", "reading_rules", "read_otherwise", "background"):
        del old[name]
    (folder / "z" / "index.json").write_text(json.dumps({"plan": old}))
    (folder / "z" / "00001.npy").unlink()
    assert cached(folder / "images", folder / "z").images == 4
    assert index_of(folder / "z") == new
    exif = Image.Exif()
    exif[0x0112] = 3
    path = folder / "images" / "c0" / "0.png"
    Image.open(path).save(path, exif=exif)
    old["dataset"] = ClassFolder(folder / "images", 16).fingerprint_of_0_1
    (folder / "z" / "index.json").write_text(json.dumps({"plan": old}))
    with pytest.raises(OtherLatents, match="the rule 'orientation' of reading images was of version 1"):
        cached(folder / "images", folder / "z")


def test_transparency_is_cached_on_its_background(class_folder, cached, encoder, tmp_path):
    root = class_folder(tmp_path / "images", images=1, size=(16, 16), channels=4)
    for path in root.rglob("*.png"):
        Image.new("RGBA", (16, 16), (1, 2, 3, 0)).save(path)
    cached(root, tmp_path / "z", background="black")
    moments, _ = LatentFolder(tmp_path / "z", encoder().fingerprint()).read(0, False)
    assert (moments[:3] == -1).all()
    with pytest.raises(OtherLatents, match="the background was 'black', is 'white'"):
        cached(root, tmp_path / "z")


def test_moments_that_half_precision_cannot_hold_are_named_and_nothing_is_finished(made, cached, encoder, tmp_path):
    class Overflowing(encoder):
        def moments(self, images):
            found = super().moments(images)
            self.seen = getattr(self, "seen", 0) + len(images)
            if self.seen > 12:  # the mirror images of the second shard
                found[1] = 1e6
            return found

    with pytest.raises(ValueError, match=r"the moments of '.*c0/5\.png' are not finite in float16"):
        cached(made / "images", tmp_path / "z", Overflowing(), batch_size=4)
    assert "shards" not in index_of(tmp_path / "z")


@pytest.mark.parametrize("size", [0, 15])
def test_sizes_that_the_encoder_cannot_halve_are_refused(made, cached, tmp_path, size):
    with pytest.raises(ValueError, match=f"image_size {size} is not a multiple of 2"):
        cached(made / "images", tmp_path / "z", image_size=size)


# ---- the script


def test_the_script_caches_what_a_real_autoencoder_makes(made, vae_folder, tmp_path, capsys):
    flags = ["--vae_ckpt", str(vae_folder), "--image-size", "16", "--num-workers", "0", "--device", "cpu"]
    cache_latents.main([str(made / "images"), str(tmp_path / "z"), *flags])
    assert "14 images in 2 classes" in capsys.readouterr().out
    autoencoder = load_autoencoder(str(vae_folder))
    latents = LatentFolder(tmp_path / "z", autoencoder.fingerprint(), 16, 2)
    assert latents.read(0, False)[0].shape == (8, 8, 8)
    assert not np.array_equal(latents.read(0, False)[0], latents.read(0, True)[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "0"], "image_size 0 must be at least 1"),
        (["--batch-size", "0"], "batch_size 0 must be at least 1"),
        (["--shard-size", "-1"], "shard_size -1 must be at least 1"),
        (["--num-workers", "-1"], "num_workers -1 must be at least 0"),
        (["--vae-ckpt", "none"], "vae_ckpt 'none' has no latents to cache"),
        (["--background", "red"], "background 'red': expected"),
        (["--device", "tpu"], "device 'tpu'"),
    ],
)
def test_impossible_values_are_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        cache_latents.main([str(tmp_path), str(tmp_path / "z"), *flags])


def test_options_are_checked_in_python_too():
    with pytest.raises(ValueError, match="num_workers -1 must be at least 0"):
        CachingOptions(num_workers=-1)
