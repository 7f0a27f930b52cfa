"""Training on packed images: the same batches, classes and identities as from a folder of the same pictures."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from test_loader import draw, same

from flowturbo.data import identity
from flowturbo.data.folders import ClassFolder, class_names
from flowturbo.data.identity import data_changes
from flowturbo.data.latents import LatentFolder
from flowturbo.data.loader import TrainingSamples, training_loader
from flowturbo.data.packed import PackedImages, open_images
from flowturbo.data.parts import Subset
from flowturbo.data.report import check_data, contact_sheet
from flowturbo.system.distributed import World

LAYOUTS = [
    "zip",
    "wrapped zip",
    "tar",
    "tar with cls",
    "tar with json",
    "tars by class",
    "parquet",
    "parquet of numbers",
]


@pytest.fixture
def folder(class_folder, tmp_path):
    return class_folder(tmp_path / "images", classes=3, images=4)


def packed(pack, folder, layout, root):
    """The images of a folder in one of the layouts; returns the path to them."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
    labels = [name.split("/")[0] for name in files]
    root.mkdir()
    if layout == "zip":
        pack[".zip"](dict(reversed(files.items())), root / "x.zip")
        return root / "x.zip"
    if layout == "wrapped zip":
        pack[".zip"]({f"some/train/{name}": content for name, content in files.items()}, root / "x.zip")
    if layout == "tar":
        pack[".tar"](files, root / "x.tar")
    if layout in ("tar with cls", "tar with json"):
        for part in range(2):
            members = {}
            for k, (content, label) in list(enumerate(zip(files.values(), labels)))[6 * part : 6 * part + 6]:
                text = label.encode() if layout.endswith("cls") else json.dumps({"label": label, "width": 8}).encode()
                members |= {f"{k:04}.{layout.split()[-1]}": text, f"{k:04}.png": content}
            pack[".tar"](members, root / f"{part}.tar")
    if layout == "tars by class":
        for label in sorted(set(labels)):
            chosen = {name.split("/")[1]: content for name, content in files.items() if name.startswith(label)}
            pack[".tar"](chosen, root / f"{label}.tar")
    if layout.startswith("parquet"):
        numbers = [int(label[1:]) for label in labels]
        column = [{"bytes": content, "path": name.split("/")[1]} for name, content in files.items()]
        names = {"label": {"_type": "ClassLabel", "names": ["c0", "c1", "c2"]}} if layout == "parquet" else None
        for part in range(2):
            rows = slice(6 * part, 6 * part + 6)
            path = root / f"train-{part:05}-of-00002.parquet"
            pack[".parquet"]({"image": column[rows], "label": numbers[rows]}, path, names, rows_in_group=4)
        return root / "*.parquet"
    return root


def batches(data, workers=0):
    world = World(0, 0, 1, torch.device("cpu"))
    return list(training_loader(TrainingSamples(data, 3, draw), 5, world, first=0, last=4, workers=workers))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_those_of_a_folder_of_the_same_pictures(pack, folder, tmp_path, layout):
    plain, data = ClassFolder(folder, 8), open_images(packed(pack, folder, layout, tmp_path / "x"), 8)
    assert isinstance(data, PackedImages)
    assert len(data) == len(plain) == 12
    assert data.classes == (["0", "1", "2"] if layout == "parquet of numbers" else plain.classes)
    assert (data.labels, data.folders, data.class_indices) == (plain.labels, plain.folders, plain.class_indices)
    assert all(map(same, batches(data), batches(plain)))
    assert data.applied == plain.applied
    assert data.identity().labels == plain.identity().labels
    if layout in ("zip", "wrapped zip", "tar"):  # names, sizes and content are those of the folder
        assert data.fingerprint() == plain.fingerprint()
        assert data_changes(plain.identity().record(), data) == []


@pytest.mark.parametrize("layout", ["zip", "tar with cls", "parquet"])
def test_workers_open_what_they_read(pack, folder, tmp_path, layout):
    """Forked ones after their parent has read, and started ones, which get a pickle."""
    data = open_images(packed(pack, folder, layout, tmp_path / "x"), 8)
    expected = batches(open_images(folder, 8))
    data.read(0, False)
    data._memory = None
    assert all(map(same, batches(data, workers=2), expected))
    samples = pickle.loads(pickle.dumps(TrainingSamples(data, 3, draw)))
    assert same(samples.__getitems__(range(5)), expected[0])


@pytest.mark.parametrize("layout", ["zip", "tar with cls", "parquet"])
def test_identities_change_with_content_and_classes(pack, folder, class_folder, tmp_path, layout):
    first = open_images(packed(pack, folder, layout, tmp_path / "x"), 8)
    again = open_images(packed(pack, folder, layout, tmp_path / "y"), 8)
    assert first.identity() == again.identity()
    assert data_changes(first.identity().record(), again) == []
    other = class_folder(tmp_path / "other", classes=3, images=4, seed=1)
    changed = open_images(packed(pack, other, layout, tmp_path / "z"), 8)
    assert data_changes(first.identity().record(), changed) == ["the data have other images"]
    turned = open_images(tmp_path / "y", 8, class_map={"c0": 2, "c1": 1, "c2": 0})
    assert data_changes(first.identity().record(), turned) == ["the images have other classes"]


def test_large_sets_are_known_by_a_sample(pack, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "CONTENT_BYTES", 300)
    for layout, what in (("tar", "12 files"), ("parquet", "4 row groups")):
        data = open_images(packed(pack, folder, layout, tmp_path / layout), 8)
        assert data.fingerprint_covers.startswith(f"names and sizes of all {what}, and the content of ")


def test_class_names_of_a_table_are_kept_and_its_numbers_are_the_classes(pack, tmp_path, folder):
    """Two classes of one name, like ImageNet's two cranes, stay two."""
    content = next(folder.rglob("*.png")).read_bytes()
    names = [f"n{k}" for k in range(1000)]
    names[134] = names[517] = "crane"
    features = {"label": {"_type": "ClassLabel", "names": names}}
    pack[".parquet"]({"image": [content] * 3, "label": [517, 134, 2]}, tmp_path / "x.parquet", features)
    data = open_images(tmp_path / "x.parquet", 8, num_classes=1000)
    assert data.labels == [517, 134, 2]
    known = class_names(data, 1000)
    assert (known.names[134], known.names[517], known.names[2], known.counts[517]) == ("crane", "crane", "n2", 1)
    assert len(Subset(data, 0.5, 0)) == 3


def test_latents_of_a_table_keep_its_classes(pack, folder, tmp_path, cached, encoder):
    cached(packed(pack, folder, "parquet", tmp_path / "x"), tmp_path / "z")
    latents = LatentFolder(tmp_path / "z", encoder().fingerprint(), num_classes=5)
    assert (latents.classes, latents.labels) == (["c0", "c1", "c2"], [0] * 4 + [1] * 4 + [2] * 4)
    plain = ClassFolder(folder, 16)
    assert np.array_equal(latents.read(7, False)[0], encoder().of_bytes(plain.read(7, False)[0]).astype(np.float16))


def test_reports_and_sheets_take_packed_images(pack, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    data = open_images(packed(pack, folder, "tar with cls", tmp_path / "x"), 8)
    report = check_data(data)
    assert (report.decoded, report.unreadable) == (12, [])
    assert "12 images in 3 classes" in report.lines(data)[0]
    assert contact_sheet(data).size == contact_sheet(ClassFolder(folder, 8)).size


def test_an_image_that_cannot_be_read_is_named_by_file_and_member(pack, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    (folder / "c1" / "2.png").write_bytes(b"no image")
    path = packed(pack, folder, "wrapped zip", tmp_path / "x") / "x.zip"
    with pytest.raises(ValueError, match=re.escape(f"cannot read image '{path}: some/train/c1/2.png'")):
        check_data(open_images(path, 8)).refuse()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"1.png": b"", "1.cls": b"0", "2.png": b""}, "x.tar: 2.png has no label"),
        ({"1.png": b"", "1.cls": b"-1"}, "x.tar: 1.png has the label -1"),
        ({"1.png": b"", "2.png": b"", "1.json": b'{"label": 1}', "2.json": b"{"}, "x.tar: 2.png has no label"),
        ({"1.png": b""}, "x.tar: 1.png lies in no class folder, and no label lies beside it"),
        ({"a.txt": b""}, "holds no images"),
    ],
)
def test_images_without_a_class_are_named(pack, tmp_path, files, said):
    pack[".tar"](files, tmp_path / "x.tar")
    with pytest.raises(ValueError, match=re.escape(said)):
        open_images(tmp_path, 8)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [b"x"], "kind": [1]}, "x.parquet has no column 'label' beside the images, but kind"),
        ({"image": [b"x", b"x"], "label": [1, None]}, "x.parquet: row 1 has no label"),
        ({"image": [b"x"], "label": [-1]}, "x.parquet: row 0 has the label -1"),
        ({"image": [b"x"], "label": [0.5]}, "x.parquet: row 0 has no label"),
    ],
)
def test_tables_without_labels_are_refused(pack, tmp_path, columns, said):
    pack[".parquet"](columns, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=re.escape(said)):
        open_images(tmp_path, 8)


def test_labels_beyond_the_names_are_refused(pack, tmp_path):
    features = {"label": {"_type": "ClassLabel", "names": ["a"]}}
    pack[".parquet"]({"image": [b"x"], "label": [1]}, tmp_path / "x.parquet", features)
    with pytest.raises(ValueError, match="label 1 is none of its 1 class names"):
        open_images(tmp_path, 8)


def test_more_classes_than_the_model_has_are_refused(pack, folder, tmp_path):
    with pytest.raises(ValueError, match="the data has 3 class folders, the model 2 classes"):
        open_images(packed(pack, folder, "tar", tmp_path / "x"), 8, num_classes=2)
