import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from flowturbo.data import labelled
from flowturbo.data.folders import OUTSIDE_CLASSES, ClassFolder, class_names
from flowturbo.data.images import TRANSPARENCY
from flowturbo.data.walk import HIDDEN, OTHER, SYSTEM
from flowturbo.system import cli
from flowturbo.system.advice import advice_for


def stored(root, number):
    return np.asarray(Image.open(root / f"c{number // 2}" / f"{number % 2}.png")).transpose(2, 0, 1)


def test_labels_are_the_sorted_folders(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", classes=3, images=2)
    data = ClassFolder(root, 8)
    assert (data.classes, data.class_indices, data.labels) == (["c0", "c1", "c2"], [0, 1, 2], [0, 0, 1, 1, 2, 2])
    assert (len(data), data.skipped, data.note) == (6, {}, "")
    for i in range(6):
        assert data.path(i) == str(root / f"c{i // 2}" / f"{i % 2}.png")
        for flipped in (False, True):
            image, label = data.read(i, flipped)
            assert np.array_equal(image, stored(root, i)[:, :, :: -1 if flipped else 1])
            assert label == i // 2


def test_folders_within_a_class_belong_to_it(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", classes=2, images=1)
    class_folder(root / "c1" / "more", classes=2, images=1, seed=1)
    data = ClassFolder(root, 8)
    assert data.files == ["c0/0.png", "c1/0.png", "c1/more/c0/0.png", "c1/more/c1/0.png"]
    assert data.labels == [0, 1, 1, 1]


def test_numbered_folders_are_sorted_by_value_and_that_is_said(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", classes=12, images=1)
    for k in range(12):
        (root / f"c{k}").rename(root / str(k + 1))
    data = ClassFolder(root, 8)
    assert {int(file.split("/")[0]): label for file, label in zip(data.files, data.labels)} == {
        k + 1: k for k in range(12)
    }
    assert "folder 1 is class 0, folder 12 is class 11" in data.note
    assert ClassFolder(root, 8, num_classes=13).labels == [int(file.split("/")[0]) for file in data.files]


def test_wordnet_folders_get_imagenets_labels(class_folder, tmp_path):
    class_folder(tmp_path, classes=2, images=1)
    (tmp_path / "c0").rename(tmp_path / "n09472597")
    (tmp_path / "c1").rename(tmp_path / "golden_retriever")
    data = ClassFolder(tmp_path, 8, num_classes=1000)
    assert dict(zip(data.classes, data.labels)) == {"golden_retriever": 207, "n09472597": 980}


def test_what_other_programs_leave_makes_no_class(class_folder, tmp_path):
    root = class_folder(tmp_path / "d")
    before = ClassFolder(root, 8)
    class_folder(root / ".ipynb_checkpoints", classes=1, images=1)
    class_folder(root / "__MACOSX", classes=1, images=1)
    for name in (".x.png", "._0.png", "Thumbs.db", "notes.txt"):
        (root / "c1" / name).write_text("no image")
    (root / "readme.txt").touch()
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    (root / "c0" / "loop").symlink_to("..")
    data = ClassFolder(root, 8)
    assert (data.files, data.labels, data.classes) == (before.files, before.labels, before.classes)
    assert data.skipped[HIDDEN] == 3
    assert data.skipped[SYSTEM] == 2
    assert data.skipped[OTHER] == 2
    assert data.skipped[OUTSIDE_CLASSES] == 1
    assert data.fingerprint() == before.fingerprint()


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
        (only_files, None, "holds no folders: expected one folder of images per class, like data/cat/1.png"),
        (empty_class, None, "class folders without images: empty in .*expected one folder"),
        (lambda root: None, 1, "2 class folders, the model 1 classes"),
        (lambda root: None, 1000, "'c0', 'c1' is no WordNet id or ImageNet class name.*--target predictor"),
        (lambda root: None, 10, "nothing says which of them they are.*train classes 0, 1.*--class-map"),
    ],
)
def test_a_folder_that_does_not_fit_is_explained(class_folder, tmp_path, damage, classes, message):
    root = class_folder(tmp_path / "data")
    damage(root)
    with pytest.raises(ValueError) as caught:
        ClassFolder(root, 8, num_classes=classes)
    assert "--" not in str(caught.value)  # flags are the scripts' business
    line = cli.one_line(caught.value) + advice_for(caught.value)
    assert re.search(message, line)
    assert len(line) < 500


def test_impossible_channels_and_backgrounds_are_refused(class_folder, tmp_path):
    root = class_folder(tmp_path / "d")
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        ClassFolder(root, 8, channels=2)
    with pytest.raises(ValueError, match="background 'red': expected"):
        ClassFolder(root, 8, background="red")


def test_the_background_reaches_the_images_and_is_counted(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", channels=4)
    for path in root.rglob("0.png"):
        Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(path)
    for background, value in (("white", 255), ("black", 0)):
        data = ClassFolder(root, 8, background=background)
        assert [(data.read(i, False)[0] == value).all() for i in range(6)] == [True, False, False] * 2
    for path in root.rglob("[12].png"):
        Image.open(path).convert("RGB").save(path)
    assert data.applied == ({TRANSPARENCY: 2}, 6)
    assert ClassFolder(root, 8, channels=4).applied == ({}, 6)


def test_images_are_read_once_where_they_fit_into_memory(class_folder, tmp_path, monkeypatch):
    root = class_folder(tmp_path / "d")
    kept = ClassFolder(root, 8)
    before = [kept.read(i, False)[0].copy() for i in range(len(kept))]
    monkeypatch.setattr(labelled, "MEMORY_BYTES", 10)
    fresh = ClassFolder(root, 8)
    assert all(np.array_equal(fresh.read(i, False)[0], before[i]) for i in range(len(kept)))
    for path in root.rglob("*.png"):
        path.unlink()
    assert all(np.array_equal(kept.read(i, False)[0], before[i]) for i in range(len(kept)))
    with pytest.raises(ValueError, match="cannot read image"):
        fresh.read(0, False)


def test_loader_workers_get_all_that_was_found_out(class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d"), 8)
    data.fingerprint()
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again.read(3, True)[0], data.read(3, True)[0])
    assert again.fingerprint() == data.fingerprint()


def test_the_names_of_the_classes_and_how_many_images_each_has(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", classes=3, images=2)
    os.unlink(root / "c2" / "0.png")
    names = class_names(ClassFolder(root, 8, num_classes=5, class_map={"c0": 4, "c1": 1, "c2": 4}), 5)
    assert names.config() == {"classes": ["", "c1", "", "", "c0, c2"], "class_counts": [0, 2, 0, 0, 3]}
