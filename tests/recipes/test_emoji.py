"""The recipe of the colour model: its pictures, its figures, and a small model from nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import train
from flowturbo.sampling.bundled import load_bundled
from flowturbo.transport import Schedule
from flowturbo.weights.registry import MODELS
from recipes import emoji, emoji_figures, emoji_pictures

LIST = """\
# subgroup: flag
1F3C1                  ; fully-qualified     # 🏁 E0.6 chequered flag
1F3F4 200D 2620 FE0F   ; fully-qualified     # 🏴‍☠️ E11.0 pirate flag
1F3F4 200D 2620        ; minimally-qualified # 🏴‍☠ E11.0 pirate flag
# subgroup: keycap
0023 FE0F 20E3         ; fully-qualified     # #️⃣ E0.6 keycap: #
"""


def installed():
    try:
        emoji_pictures.check_installed()
    except ValueError:
        return False
    return True


needs_font = pytest.mark.skipif(not installed(), reason="apt install fonts-noto-color-emoji unicode-data")


def test_the_list_is_read_by_subgroup(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(LIST, encoding="utf-8")
    found = [(emoji.text, emoji.subgroup) for emoji in emoji_pictures.read_list(path)]
    assert found == [("🏁", "flag"), ("🏴\u200d☠\ufe0f", "flag"), ("#\ufe0f\u20e3", "keycap")]


def test_no_subgroup_is_in_two_classes():
    subgroups = [each for group in emoji_pictures.CLASSES.values() for each in group]
    assert len(set(subgroups)) == len(subgroups)


def test_what_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gone\.ttf; on Debian and Ubuntu: apt install fonts-noto-color-emoji"):
        emoji_pictures.check_installed(tmp_path / "gone.ttf")
    (tmp_path / "here").touch()
    with pytest.raises(ValueError, match="apt install unicode-data"):
        emoji_pictures.check_installed(tmp_path / "here", tmp_path / "gone.txt")
    monkeypatch.setattr(emoji_pictures.features, "check", lambda _: False)
    with pytest.raises(ValueError, match="this Pillow has no raqm"):
        emoji_pictures.check_installed(tmp_path / "here", tmp_path / "here")


@needs_font
def test_the_pictures_are_squares_with_a_margin(tmp_path):
    count = emoji_pictures.render(tmp_path, classes=("heart", "animal-bird"))
    files = list(tmp_path.glob("*/*.png"))
    assert count == len(files) > 30
    for file in files:
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (32, 32, 3)
        assert min(edge.min() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])) > 200, file
        assert pixels.min() < 250
    red = np.asarray(Image.open(tmp_path / "heart" / "2764-fe0f.png"))[16, 16]
    assert red[0] > 150
    assert red[1:].max() < 100


@needs_font
def test_the_packages_model_knows_the_classes_and_counts_of_the_pictures(tmp_path):
    emoji_pictures.render(tmp_path)
    names = load_bundled("colour", refiner=False).class_names
    assert set(names.names) == set(emoji_pictures.CLASSES)
    for name, count in zip(names.names, names.counts, strict=True):
        # Another version of the font or the list may have a few more.
        assert math.isclose(count, len(list((tmp_path / name).glob("*.png"))), rel_tol=0.2)


@pytest.mark.parametrize("recipe", [emoji.FULL, emoji.SMALL], ids=["full", "small"])
def test_the_flags_are_train_pys(recipe):
    common = ["--data-path", "d", *emoji.ALWAYS]
    assert train.parse(["--target", "predictor", *common, *recipe.predictor]).target == "predictor"
    assert train.parse([*common, "--model-teacher-ckpt", "p", *recipe.refiner]).target == "refiner"


def test_the_packages_predictor_is_the_one_of_these_flags():
    config = load_bundled("colour", refiner=False).predictor.config
    made = train.parse(["--target", "predictor", "--data-path", "d", *emoji.ALWAYS, *emoji.FULL.predictor]).predictor
    for name in ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma"):
        assert config[name] == getattr(made, name)


def images(*levels):
    """One grey picture (3, 4, 4) for each level."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


DATA = emoji_figures.Data(images(0, 100, 200), [0, 1, 1])


def test_nearest_pictures_and_copies():
    found = emoji_figures.nearest(images(10, 60, 200), DATA.images)
    assert found.which.tolist() == [0, 1, 2]
    assert found.first.tolist() == pytest.approx([10, 40, 0])
    assert found.second.tolist() == pytest.approx([90, 60, 100])
    assert found.copies().tolist() == [True, False, True]
    assert emoji_figures.class_accuracy(found, DATA) == (1, 0)
    itself = emoji_figures.nearest(DATA.images, DATA.images, itself=True)
    assert itself.first.tolist() == pytest.approx([100, 100, 100])
    share, error = emoji_figures.class_accuracy(itself._replace(which=torch.tensor([1, 2, 1])), DATA)
    assert (share, error) == pytest.approx((2 / 3, (2 / 27) ** 0.5))


def test_the_distance_of_halves_grows_with_a_shift():
    pictures = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    data = emoji_figures.Data(pictures, [0] * 40)
    same, spread = emoji_figures.halves_distance(pictures, data)
    darker, _ = emoji_figures.halves_distance(pictures // 2, data)
    assert 0 < spread < same < darker


def test_schedules_are_compared_at_equal_evaluations():
    for n in emoji_figures.BUDGETS:
        for schedule, form in emoji_figures.of_budget(n):
            assert sum(Schedule.parse(schedule).evaluations(form or "released")) == n


@pytest.mark.slow
@needs_font
def test_a_small_model_from_nothing(tmp_path):
    """At most ten minutes on one core. The samples look like the pictures of their class."""
    from flowturbo.evaluation import ImageFolder
    from flowturbo.sampling.generate import find_files, load_networks
    from flowturbo.sampling.options import NetworkOptions

    emoji.main(["--small", "--out", str(tmp_path)])
    names = MODELS["colour"].options()
    files = [str(tmp_path / names[f"{network}_ckpt"]) for network in ("predictor", "refiner")]
    options = NetworkOptions(*files, vae_ckpt="none", device="cpu")
    networks = load_networks(options, find_files(options, refiner=True))
    data = emoji_figures.read(tmp_path / "pictures", networks)
    assert len(data.classes) == len(ImageFolder(tmp_path / "pictures"))
    samples = emoji_figures.draw(networks, data, "M4R1", 3.0)
    accuracy, error = emoji_figures.class_accuracy(emoji_figures.nearest(samples, data.images), data)
    assert accuracy - 2 * error > 0.8
