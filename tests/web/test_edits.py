"""Edits of the page are those of edit.py with the files and the command that it offers, to the byte."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import edit as script
from flowturbo.data.images import centre_crop
from flowturbo.web.edits import CHANGE, INPAINT, REDRAW, REMOVE, TASKS, drawn_mask, edit_options, enlarged


def picture(width, height, mode="RGB", seed=0):
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def layer(width, height, box, alpha=255):
    """What an editor makes of a rectangle that was drawn over a picture."""
    drawn = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    drawn.paste((99, 102, 241, alpha), box)
    return drawn


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("masked", [True, False])
def test_an_edit_is_that_of_the_command(studio, silent, tmp_path, monkeypatch, task, masked):
    if TASKS[task].needs_mask and not masked:
        pytest.skip("this task needs a mask")
    given = enlarged(picture(8, 8), 64).convert("RGBA")
    layers = [layer(64, 64, (8, 16, 40, 48))] if masked else []
    mask = drawn_mask(layers, given.size, TASKS[task].needs_mask)
    options = edit_options(task, "M2", "7", "1", strength=TASKS[task].strength, num_images=2)
    sampling = studio.settings(5, 2.0)
    made = studio.edit(given, mask, options, sampling, tmp_path, silent)
    results = [file.read_bytes() for file in made.files[:2]]
    python, name, *words = shlex.split(studio.command("edit.py", *made.flags, options=(options, sampling)))
    assert (python, name) == ("python", "edit.py")
    for file in made.files[:2]:
        file.unlink()
    monkeypatch.chdir(tmp_path)
    script.main(words)
    assert [file.read_bytes() for file in made.files[:2]] == results
    assert results[0] != results[1]
    assert [file.name for file in made.files[2:]] == (["image.png", "mask.png"] if masked else ["image.png"])


def test_outside_of_what_was_drawn_the_bytes_are_kept(studio, silent, tmp_path):
    small = picture(8, 8)
    mask = drawn_mask([layer(256, 256, (64, 64, 128, 128))], (256, 256), needed=True)
    options = edit_options(INPAINT, "A2", "7", None)
    made = studio.edit(enlarged(small), mask, options, studio.settings(0, 2.0), tmp_path, silent)
    before, after = np.asarray(small), np.asarray(Image.open(made.files[0]))
    changed = (before != after).any(-1)
    assert changed[2:4, 2:4].any()
    changed[2:4, 2:4] = False
    assert not changed.any()


@pytest.mark.parametrize(("width", "height"), [(8, 8), (32, 32), (9, 8), (256, 300)])
def test_an_enlarged_picture_shrinks_to_the_same_bytes(width, height):
    small = picture(width, height)
    large = enlarged(small)
    assert min(large.size) >= 256
    assert large.width * height == large.height * width
    if width == height:
        assert np.array_equal(np.asarray(centre_crop(large, width)), np.asarray(small))


def test_a_mask_is_where_any_layer_is_drawn_on():
    one, other = layer(20, 10, (0, 0, 5, 5)), layer(20, 10, (10, 5, 20, 10))
    mask = drawn_mask([one, other, layer(20, 10, (5, 0, 10, 5), alpha=100)], (20, 10), needed=True)
    assert mask.shape == (10, 20)
    assert mask.dtype == torch.uint8
    assert int((mask == 255).sum()) == 25 + 50
    assert drawn_mask([], (20, 10), needed=False) is None
    with pytest.raises(ValueError, match="nothing is drawn over the picture"):
        drawn_mask([layer(20, 10, (0, 0, 0, 0))], (20, 10), needed=True)
    assert drawn_mask([layer(10, 5, (0, 0, 5, 5))], (20, 10), needed=True)[:, :10].all()  # of another size


def test_each_task_uses_the_classes_that_it_knows():
    options = {task: edit_options(task, "M2", "7", "1") for task in TASKS}
    assert {
        task: (each.to_class, each.from_class, each.remove, each.chosen_method) for task, each in options.items()
    } == {
        INPAINT: ("7", None, False, "sdedit"),
        REMOVE: (None, None, True, "sdedit"),
        REDRAW: ("7", None, False, "sdedit"),
        CHANGE: ("7", "1", False, "flowedit"),
    }


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("Dance", {}, "no kind of edit is called 'Dance'"),
        (INPAINT, {"to_class": None}, "no class is chosen: expected the one to draw"),
        (CHANGE, {"from_class": None}, "no class is chosen that the picture shows"),
        (REDRAW, {"strength": 0.0}, "strength 0 must lie in"),
        (REDRAW, {"num_images": 0}, "must be at least 1"),
        (INPAINT, {"schedule": "dopri5"}, "an edit takes a schedule of blocks, not dopri5"),
        (INPAINT, {"feather": -1}, "feather at least 0"),
    ],
)
def test_impossible_edits_are_told(task, given, message):
    with pytest.raises(ValueError, match=message):
        edit_options(task, **{"schedule": "M2", "to_class": "7", "from_class": "1", **given})


def test_too_many_results_are_refused(studio, silent, tmp_path):
    options = edit_options(REDRAW, "M2", "7", None, num_images=65)
    with pytest.raises(ValueError, match="65 images: expected 1 to 64"):
        studio.edit(picture(8, 8), None, options, studio.settings(0, 2.0), tmp_path, silent)
