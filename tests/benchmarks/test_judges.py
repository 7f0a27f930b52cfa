"""The measurements of editing: that they see what they should, and the round trip's figures on real digits."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import editing
from benchmarks.judges import Classifier, Data, Distances, background, change, read_data, with_error
from flowturbo.data.pictures import from_uint8
from flowturbo.sampling.bundled import load_bundled


@pytest.fixture(scope="module")
def digits():
    return read_data(None, 200, load_bundled("digits", False))


def test_round_trips_of_200_digits(tmp_path):
    """The figures of docs/editing.md: M loses less of an image than any other block."""
    flags = ["--tables", "round-trips", "--num-images", "200", "--solvers", "M", "--json", str(tmp_path / "made.json")]
    editing.main(flags)
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    errors = {row["evaluations"]: row["figures"]["relative error"][0] for row in rows}
    assert set(errors) == {6, 8, 12}
    assert errors[6] <= 0.029
    assert errors[8] <= 0.015
    assert errors[12] <= 0.0085


def test_the_tables_of_changes_and_inpainting(capsys, tmp_path):
    flags = ["--tables", "class-changes", "inpainting", "--num-images", "24", "--strengths", "0.1", "1"]
    flags += ["--solvers", "H", "M", "--evaluations", "4", "--change-evaluations", "4", "--change-with", "D"]
    editing.main([*flags, "--fine", "M12", "--json", str(tmp_path / "made.json")])
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    share = {row["name"]: row["figures"]["new class"][0] for row in rows if row["table"] == "change of class"}
    assert len(share) == 1 + 3 * 2
    assert share["sdedit D2, strength 0.1"] < 0.2 < 0.7 < share["sdedit D2, strength 1"]
    errors = {row["name"]: row["figures"]["error in the mask"][0] for row in rows if row["table"] == "inpainting"}
    assert 0 == errors["M12"] < errors["M3"] < errors["H2"]
    assert "more than M12" in capsys.readouterr().out


def test_an_image_is_judged_by_a_classifier_that_has_not_seen_it(digits):
    """Its own label is wrong here, and still it is given the class that the others have."""
    wrong = int(digits.edited[0])
    labels = digits.labels.clone()
    labels[wrong] = (labels[wrong] + 1) % 10
    classify = Classifier(digits._replace(labels=labels))
    found = classify(from_uint8(digits.images[digits.edited]))
    assert (found == digits.labels[digits.edited]).float().mean() > 0.95
    assert found[0] == digits.labels[wrong]


def test_distances_are_paired(digits):
    """The error of a difference is far less than those of both distances, of the same images a little changed."""
    images = from_uint8(digits.images[digits.edited])
    distances = Distances(digits, 10)
    first, second = distances(images), distances(images * 0.99)
    assert with_error(first - first) == (0, 0)
    assert with_error(second - first).error < with_error(first).error / 5
    whole = distances(from_uint8(digits.images))
    assert whole[0] < 1e-6 < whole[1:].min()


def test_changes_on_the_background_alone():
    images = torch.full((2, 3, 2, 2), 255, dtype=torch.uint8)
    images[0, :, 0, 0] = torch.tensor([255, 0, 255], dtype=torch.uint8)
    where = background(images)
    assert where[0, 0].tolist() == [[False, True], [True, True]]
    before = from_uint8(images)
    after = before.clone()
    after[0, :, 0, 0] = 0.5
    assert change(after, before, where).value == 0
    after[:, :, 1, 1] -= 0.3
    assert change(after, before, where).value == pytest.approx(0.3 * (1 / 3**0.5 + 1 / 2) / 2)


def test_the_same_images_are_edited_in_every_run(digits):
    again = read_data(None, 200, load_bundled("digits", False))
    assert again.edited.equal(digits.edited)
    assert isinstance(again, Data)
    assert bool((again.targets != again.labels[again.edited]).all())
