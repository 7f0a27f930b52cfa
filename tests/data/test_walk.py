import os
import random

import pytest

from flowturbo.data import walk as module
from flowturbo.data.walk import HIDDEN, OTHER, OUTSIDE, REPEATED, SYSTEM, describe, walk


def grow(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def link(root, path, target):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).symlink_to(target)


def test_images_are_known_by_their_suffix_in_any_case(tmp_path):
    names = ["a.png", "b.JPG", "c.jpeg", "d.webp", "e.bmp", "f.ppm", "g.pgm", "h.tif", "i.TIFF"]
    found = walk(grow(tmp_path, *names, "j.txt", "k.gif", "png", "settings.json"))
    assert found.files == names
    assert found.skipped == {OTHER: 4}


def test_files_come_in_the_order_of_the_parts_of_their_paths(tmp_path):
    """As sorted paths come; as texts "a b/x.png" would stand before "a/x.png", since a space is less than a slash."""
    names = ["a/x.png", "a/y/z.png", "a/z.png", "a b/x.png", "a-b/x.png", "b.png", "c/1.png"]
    found = walk(grow(tmp_path, *sorted(names, key=hash)))
    assert found.files == names
    assert [tmp_path / name for name in found.files] == sorted(tmp_path / name for name in names)
    assert found.folders == ["a", "a b", "a-b", "c"]


HIDDEN_OR_SYSTEM = {
    ".ipynb_checkpoints/a.png": HIDDEN,
    "cat/.a.png": HIDDEN,
    "cat/._b.png": HIDDEN,
    "__MACOSX/cat/a.png": SYSTEM,
    "cat/__pycache__/a.png": SYSTEM,
    "cat/Thumbs.db": SYSTEM,
    "cat/desktop.ini": SYSTEM,
    "$RECYCLE.BIN/a.png": SYSTEM,
    "@eaDir/a.png": SYSTEM,
    "lost+found/a.png": SYSTEM,
    "cat/.DS_Store": OTHER,
}


@pytest.mark.parametrize(("path", "kind"), HIDDEN_OR_SYSTEM.items())
def test_hidden_and_system_entries_are_passed_over_and_counted(tmp_path, path, kind):
    found = walk(grow(tmp_path, "cat/a.png", "dog/a.png", path))
    assert (found.files, found.folders) == (["cat/a.png", "dog/a.png"], ["cat", "dog"])
    assert found.skipped == {kind: 1}


def test_version_0_1_took_hidden_entries(tmp_path):
    grow(tmp_path, "cat/a.png", *HIDDEN_OR_SYSTEM)
    assert len(walk(tmp_path, hidden=True).files) == 1 + sum(path.endswith(".png") for path in HIDDEN_OR_SYSTEM)


def test_the_root_may_be_hidden_or_a_link(tmp_path):
    grow(tmp_path, ".cache/a/b.png")
    link(tmp_path, "here", ".cache/a")
    assert walk(tmp_path / ".cache" / "a").files == walk(tmp_path / "here").files == ["b.png"]


def test_links_to_folders_are_followed(tmp_path):
    grow(tmp_path, "pets/cat/a.png")
    link(tmp_path, "mine/cat", "../pets/cat")
    assert walk(tmp_path / "mine") == (["cat/a.png"], ["cat"], {})


def test_a_folder_counts_once_and_where_it_stands_rather_than_where_a_link_leads_to_it(tmp_path):
    grow(tmp_path, "z/a.png", "other/b.png")
    root = tmp_path / "z"
    grow(root, "cat/a.png")
    for name in ("1", "cat 2"):
        link(root, name, "cat")
    for name in ("2", "3"):
        link(root, name, tmp_path / "other")
    found = walk(root)
    assert found.files == ["2/b.png", "a.png", "cat/a.png"]
    assert found.folders == ["2", "cat"]
    assert found.skipped == {REPEATED: 3}


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_a_link_to_a_folder_that_holds_it_is_not_followed(tmp_path, target):
    grow(tmp_path, "root/c0/a.png", "beside/b.png")
    link(tmp_path / "root", "c0/loop", target)
    assert walk(tmp_path / "root") == (["c0/a.png"], ["c0"], {REPEATED: 1})


def test_file_systems_of_the_kernel_are_not_followed(tmp_path):
    grow(tmp_path, "a/b.png")
    for name in ("proc", "sys", "dev"):
        link(tmp_path, f"a/{name}", f"/{name}")
    assert walk(tmp_path) == (["a/b.png"], ["a"], {OUTSIDE: 3})


def test_what_is_no_file_is_left_to_the_reader_which_names_it(tmp_path):
    link(tmp_path, "gone.png", "nowhere")
    link(tmp_path, "itself.png", "itself.png")
    link(tmp_path, "itself", "itself")
    os.mkfifo(tmp_path / "pipe.png")
    assert walk(tmp_path) == (["gone.png", "itself.png", "pipe.png"], [], {OTHER: 1})


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read folder '.*gone': No such file"):
        walk(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"cannot read folder '.*a\.png': Not a directory"):
        walk(grow(tmp_path, "a.png") / "a.png")
    (tmp_path / "shut").mkdir()
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(module.os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read folder '.*shut': Permission denied"):
        walk(tmp_path)


def test_names_that_are_no_text_are_kept(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png")
    with open(path, "wb"):
        pass
    assert [os.fsencode(name) for name in walk(tmp_path).files] == [b"\xff\xfe.png"]


def test_what_was_passed_over_in_words():
    assert describe({}) == ""
    assert describe({SYSTEM: 2, OTHER: 1}) == "files that are no images: 1, system entries: 2"


@pytest.mark.parametrize("seed", range(40))
def test_every_image_is_found_once_whatever_the_links(tmp_path, seed):
    """Random trees with links between any folders, in and out of the root: each walk ends, and finds the same."""
    dice = random.Random(seed)
    places = [tmp_path / "root", tmp_path / "beside"]
    for place in places:
        place.mkdir()
    for number in range(12):
        place = dice.choice(places) / f"{dice.choice('abc')}{number}"
        place.mkdir()
        places.append(place)
        for image in range(dice.randrange(3)):
            (place / f"{image}.png").touch()
    for number in range(dice.randrange(12)):
        (dice.choice(places) / f"{dice.choice('abc')}-link{number}").symlink_to(dice.choice([*places, tmp_path]))
    found = walk(tmp_path / "root")
    assert found.files == sorted(found.files, key=lambda path: path.split("/"))
    reached = [os.path.realpath(tmp_path / "root" / path) for path in found.files]
    assert len(reached) == len(set(reached))
    real = {str(path) for path in (tmp_path / "root").rglob("*.png")}  # rglob follows no links
    assert real <= set(reached)
    for path in found.files:  # where a path without links leads to it, that is the one
        full = str(tmp_path / "root" / path)
        assert (os.path.realpath(full) == full) == (os.path.realpath(full) in real)
    assert found == walk(tmp_path / "root")
