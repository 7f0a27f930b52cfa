import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowturbo.data.folders import ClassFolder, class_names
from flowturbo.data.identity import data_changes
from flowturbo.data.latents import LatentFolder, OtherLatents, UnfinishedLatents, is_latent_folder
from flowturbo.data.parts import Subset

OLD = Path(__file__).parents[1] / "compatibility" / "v0.1.0"


@pytest.fixture(scope="module")
def folder(class_folder, cached, tmp_path_factory):
    """Two classes of seven images in `images`, and their latents of four images a shard in `z`."""
    root = tmp_path_factory.mktemp("latents")
    class_folder(root / "images", images=7, size=(24, 18))
    cached(root / "images", root / "z")
    return root


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder / "z", tmp_path / "z")
    return tmp_path / "z"


@pytest.mark.parametrize("flipped", [False, True])
def test_cached_moments_are_the_encoders_to_half_precision(folder, encoder, flipped):
    images, latents = ClassFolder(folder / "images", 16), LatentFolder(folder / "z", encoder().fingerprint())
    assert (latents.classes, latents.class_indices, len(latents)) == (["c0", "c1"], [0, 1], 14)
    for index in range(14):
        image, label = images.read(index, flipped)
        moments, cached_label = latents.read(index, flipped)
        assert cached_label == label
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments, encoder().of_bytes(image), atol=1e-3, rtol=1e-3)
    assert class_names(latents, 2).config() == {"classes": ["c0", "c1"], "class_counts": [7, 7]}


def test_latents_of_version_0_1_load():
    plan = json.loads((OLD / "latents" / "index.json").read_text())["plan"]
    latents = LatentFolder(OLD / "latents", plan["autoencoder"], 8, 2)
    assert (len(latents), latents.classes, latents.labels) == (8, ["cat", "dog"], [0] * 4 + [1] * 4)
    for index in range(8):
        moments, _ = latents.read(index, index % 2 == 1)
        assert moments.dtype == np.float16
        assert moments.ndim == 3
        assert np.isfinite(moments).all()
    run = json.loads((OLD / "results" / "000-predictor-no-note" / "config.json").read_text())
    assert data_changes(run["data"], latents) == []  # it was trained on the same images, read by the same rules
    assert data_changes(latents.identity().record(), latents) == []


def test_reading_refuses_what_does_not_fit(folder, encoder, tmp_path):
    fingerprint = encoder().fingerprint()
    with pytest.raises(OtherLatents, match="image_size 16, not 8"):
        LatentFolder(folder / "z", fingerprint, image_size=8)
    with pytest.raises(OtherLatents, match="made with another autoencoder \\(tiny\\)"):
        LatentFolder(folder / "z", "0" * 64)
    with pytest.raises(ValueError, match="2 class folders, the model 5 classes"):
        LatentFolder(folder / "z", fingerprint, num_classes=5)
    (tmp_path / "index.json").write_text('{"plan": {}}')
    for root in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UnfinishedLatents, match="no finished latents"):
            LatentFolder(root, fingerprint)
    assert is_latent_folder(tmp_path)
    assert not is_latent_folder(folder / "images")


def test_a_class_map_says_what_the_folders_are(folder, encoder):
    latents = LatentFolder(folder / "z", encoder().fingerprint(), 16, 9, {"c0": 8, "c1": 3})
    assert latents.labels == [8] * 7 + [3] * 7
    assert latents.read(0, False)[1] == 8


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_lost_or_truncated_shard_is_named(copy, encoder, damage):
    shard = copy / "00001.npy"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UnfinishedLatents, match=r"00001\.npy is missing or damaged"):
        LatentFolder(copy, encoder().fingerprint())


@pytest.mark.parametrize(
    "change",
    [
        *({"classes": 3}, {"classes": []}, {"folders": [7] * 14}, {"shard_size": 0}, {"image_size": "16"}),
        *({"dataset": None}, {"autoencoder_name": 3}, {"reading_rules": 3}, {"read_otherwise": []}),
    ],
    ids=str,
)
def test_an_index_that_makes_no_sense_is_named(folder, encoder, tmp_path, change):
    index = json.loads((folder / "z" / "index.json").read_text())
    index["plan"].update(change)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UnfinishedLatents, match=r"index\.json is damaged"):
        LatentFolder(tmp_path, encoder().fingerprint())


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000])
def test_an_index_that_is_no_object_is_named(encoder, tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        LatentFolder(tmp_path, encoder().fingerprint())


def test_a_flipped_bit_in_a_shard_stops_who_reads_it(copy, encoder):
    content = bytearray((copy / "00001.npy").read_bytes())
    content[-7] ^= 1
    (copy / "00001.npy").write_bytes(content)
    latents = LatentFolder(copy, encoder().fingerprint())
    latents.read(0, False)
    with pytest.raises(UnfinishedLatents, match=r"00001\.npy is damaged"):
        latents.read(5, False)


# ---- which images they were made of


def test_latents_stand_for_the_images_they_were_made_of(folder, encoder):
    images, latents = ClassFolder(folder / "images", 16), LatentFolder(folder / "z", encoder().fingerprint())
    assert latents.fingerprint() == images.fingerprint()
    assert data_changes(images.identity().record(), latents) == []
    assert data_changes(latents.identity().record(), images) == []
    assert data_changes(images.fingerprint_of_0_1, latents) == []  # a run of version 0.1
    halves = Subset(images, 0.5, 1), Subset(latents, 0.5, 1)
    assert data_changes(halves[0].identity().record(), halves[1]) == []
    assert data_changes("0" * 64, latents) == ["the data have other images"]


def as_of_0_1(root):
    """Turn an index into what version 0.1 wrote of the same images."""
    index = json.loads((root / "index.json").read_text())
    plan = index["plan"]
    plan["dataset"] = plan.pop("dataset_of_0_1")
    for name in ("dataset_covers", "reading_rules", "read_otherwise", "background"):
        del plan[name]
    (root / "index.json").write_text(json.dumps(index))


def test_latents_made_under_older_rules_are_noticed_where_the_images_were_read_by_newer(folder, copy, encoder):
    as_of_0_1(copy)
    latents, images = LatentFolder(copy, encoder().fingerprint()), ClassFolder(folder / "images", 16)
    assert data_changes(images.fingerprint_of_0_1, latents) == []  # a run as old as they
    assert data_changes(latents.identity().record(), latents) == []
    found = data_changes(images.identity().record(), latents)
    assert {change.split("'")[1] for change in found} == {"order", "orientation", "transparency", "depth"}
    assert all("was of version 2, is of version 1" in change for change in found)


def test_newer_latents_of_images_that_are_read_otherwise_now_are_noticed(class_folder, cached, encoder, tmp_path):
    root = class_folder(tmp_path / "images", images=2, size=(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 16)).save(root / "c0" / "turned.jpg", exif=exif)
    cached(root, tmp_path / "z")
    before = ClassFolder(root, 16).fingerprint_of_0_1
    (found,) = data_changes(before, LatentFolder(tmp_path / "z", encoder().fingerprint()))
    assert "the rule 'orientation'" in found
    assert "images that this changes: 1" in found


def test_other_latents_of_the_same_images_are_noticed(folder, copy, encoder):
    before = LatentFolder(folder / "z", encoder().fingerprint()).identity().record()
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0] = "0" * 64
    (copy / "index.json").write_text(json.dumps(index))
    after = LatentFolder(copy, encoder().fingerprint())
    assert data_changes(before, after) == ["the cached latents have other content"]
