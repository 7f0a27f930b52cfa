import os
import shutil

import numpy as np
import pytest

from flowturbo.data.folders import ClassFolder, class_names
from flowturbo.data.latents import LatentFolder
from flowturbo.data.parts import Part, Split, Subset, held_out_of, place_of, whole_of


def test_a_subset_takes_a_share_of_every_class_and_the_same_one_every_time(class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d", images=7), 8)
    some = Subset(data, 0.4, seed=1)
    assert sorted(some.labels) == [0, 0, 0, 1, 1, 1]
    assert (some.classes, some.class_indices, some.image_size) == (data.classes, data.class_indices, 8)
    assert some.numbers.tolist() == Subset(data, 0.4, seed=1).numbers.tolist()
    assert some.numbers.tolist() != Subset(data, 0.4, seed=2).numbers.tolist()
    assert len(Subset(data, 0.001, seed=0)) == 2
    image, label = some.read(0, False)
    expected, expected_label = data.read(int(some.numbers[0]), False)
    assert (image == expected).all()
    assert label == expected_label
    assert class_names(some, 2).counts == (3, 3)
    for fraction in (0, 1.1, -1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            Subset(data, fraction, seed=0)


def test_the_share_is_the_one_that_version_0_1_took(class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d", images=7), 8)
    assert Subset(data, 0.4, seed=1).numbers.tolist() == [1, 2, 5, 10, 11, 13]


# ---- what is held out


def names_of(part):
    return {part.name(index) for index in range(len(part))}


def test_what_is_held_out_and_what_is_left_are_the_whole(class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d", images=40), 8)
    kept = Split(data, 0.25)
    held = kept.held_out
    assert names_of(kept) | names_of(held) == set(data.files)
    assert not names_of(kept) & names_of(held)
    assert 8 <= len(held) <= 32  # 20 are expected of 80
    image, label = held.read(3, True)
    expected, expected_label = data.read(int(held.numbers[3]), True)
    assert (image == expected).all()
    assert label == expected_label
    assert class_names(kept, 2).counts == tuple(np.bincount(kept.labels))
    assert kept.identity().labels != data.identity().labels
    assert (whole_of(Subset(kept, 0.5, 0)), held_out_of(Subset(kept, 0.5, 0))) == (data, held)
    assert held_out_of(Subset(data, 0.5, 0)) is None


def test_an_image_stays_on_its_side_when_the_folder_grows_or_moves(class_folder, tmp_path):
    root = class_folder(tmp_path / "d", images=30)
    before = names_of(Split(ClassFolder(root, 8), 0.3).held_out)
    shutil.move(root, tmp_path / "moved")
    for label in range(2):
        shutil.copy(tmp_path / "moved" / "c0" / "0.png", tmp_path / "moved" / f"c{label}" / "0a.png")
    os.unlink(tmp_path / "moved" / "c1" / "7.png")
    after = names_of(Split(ClassFolder(tmp_path / "moved", 8), 0.3).held_out)
    assert before - {"c1/7.png"} == after - {"c0/0a.png", "c1/0a.png"}
    assert before < names_of(Split(ClassFolder(tmp_path / "moved", 8), 0.6).held_out) | {"c1/7.png"}


def test_places_are_evenly_spread_and_do_not_depend_on_how_letters_are_composed():
    places = np.array([place_of(f"c/{k}.png") for k in range(4000)])
    assert np.histogram(places, bins=10, range=(0, 1))[0] == pytest.approx([400] * 10, abs=80)
    assert place_of("caf\u00e9/1.png") == place_of("cafe\u0301/1.png")
    assert place_of("c/\udcff.png") < 1  # of a name that is no UTF-8


def test_every_class_keeps_an_image_to_train_on(class_folder, tmp_path):
    kept = Split(ClassFolder(class_folder(tmp_path / "d", classes=3, images=2), 8), 0.9)
    assert sorted(kept.labels) == [0, 1, 2]


@pytest.mark.parametrize(
    ("images", "share", "message"),
    [
        *((4, share, r"must lie in \(0, 1\)") for share in (0, 1, 2, -0.1, float("nan"))),
        (1, 0.9, "holdout 0.9 takes none of 1 images"),
        (4, 1e-6, "holdout 1e-06 takes none of 4 images"),
    ],
)
def test_shares_that_leave_nothing_on_one_side(class_folder, tmp_path, images, share, message):
    data = ClassFolder(class_folder(tmp_path / "d", classes=1, images=images), 8)
    with pytest.raises(ValueError, match=message):
        Split(data, share)


def test_cached_latents_are_told_apart_by_class_and_place(class_folder, cached, encoder, tmp_path):
    root = class_folder(tmp_path / "d", images=7, size=(24, 18))
    cached(root, tmp_path / "z")
    data = LatentFolder(tmp_path / "z", encoder().fingerprint())
    assert [data.name(index) for index in (0, 6, 7, 13)] == ["c0/0", "c0/6", "c1/0", "c1/6"]
    kept = Split(data, 0.5)
    assert isinstance(kept.held_out, Part)
    assert len(kept) + len(kept.held_out) == 14
