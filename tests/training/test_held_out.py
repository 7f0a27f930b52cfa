"""The loss on held-out images, against the formula and for its draws."""

import numpy as np
import pytest
import torch

import train
from flowturbo.data.folders import ClassFolder
from flowturbo.data.parts import Split
from flowturbo.models import SiT
from flowturbo.networks.load import load_network
from flowturbo.refiner import VelocityRefiner
from flowturbo.training import held_out
from flowturbo.training.build import load_frozen
from flowturbo.training.held_out import FIRST, SEED, HeldOutLoss
from flowturbo.training.objective import KeyedDraws
from flowturbo.transport import flow_matching_loss


@pytest.fixture
def measured(flags, teacher, data):
    """measured(data, *flags) -> the held-out loss of the teacher, as of a predictor's training."""
    options = train.parse([*flags("predictor"), "--seed", "7"])
    ema = load_network(SiT, str(teacher))

    def of(held, options=options):
        return HeldOutLoss(options, load_frozen(options, torch.device("cpu")), ema, held), ema

    return of


def test_it_is_the_loss_of_the_images_with_fixed_draws(measured, data, monkeypatch):
    monkeypatch.setattr(held_out, "LEAST_DRAWS", 10)
    held = Split(ClassFolder(data, 8, 1), 0.6).held_out
    loss, ema = measured(held)
    text, figures = loss()
    count, passes = len(held), -(-10 // len(held))
    draws = KeyedDraws(SEED, (1, 8, 8), False)([FIRST + k for k in range(passes * count)])
    images = torch.from_numpy(np.stack([held.read(k, False)[0] for k in range(count)] * passes)) / 127.5 - 1
    labels = torch.tensor(held.labels * passes)
    with torch.no_grad():
        expected = flow_matching_loss(ema, images, labels, x0=draws.noise, t=draws.u_t, drop=draws.u_drop < 0.1)
    of_each = expected.view(passes, count).mean(0)
    assert figures["holdout"] == pytest.approx(float(of_each.mean()), rel=1e-5)
    assert figures["holdout_error"] == pytest.approx(float(of_each.std()) / count**0.5, rel=1e-4)
    assert text == f"held-out loss {figures['holdout']:.4f} ± {figures['holdout_error']:.4f} ({count} images)"
    assert loss() == (text, figures)


def test_it_does_not_depend_on_the_seed_of_the_run(measured, data, flags):
    held = Split(ClassFolder(data, 8, 1), 0.6).held_out
    options = train.parse([*flags("predictor"), "--seed", "8"])
    assert measured(held)[0]() == measured(held, options)[0]()


def test_of_many_images_the_names_pick_some(measured, class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "MOST_IMAGES", 5)
    data = ClassFolder(class_folder(tmp_path / "d", images=30, channels=1), 8, 1)
    loss = measured(Split(data, 0.5).held_out)[0]
    more = measured(Split(data, 0.9).held_out)[0]
    assert len(loss.chosen) == 5
    named = [{each.data.name(k) for k in each.chosen} for each in (loss, more)]
    assert named[0] == named[1]  # those with the smallest places are in both


def test_one_image_has_no_standard_error(measured, class_folder, tmp_path):
    data = ClassFolder(class_folder(tmp_path / "d", classes=1, images=9, channels=1), 8, 1)
    kept = Split(data, 0.5)
    kept.held_out.numbers = kept.held_out.numbers[:1]
    text, figures = measured(kept.held_out)[0]()
    assert figures["holdout"] > 0
    assert np.isnan(figures["holdout_error"])
    assert text == f"held-out loss {figures['holdout']:.4f} (1 image)"


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_refiners_is_that_of_its_recipe(flags, data, recipe):
    held = Split(ClassFolder(data, 8, 1), 0.6).held_out
    options = train.parse([*flags("refiner"), "--recipe", recipe])
    frozen = load_frozen(options, torch.device("cpu"))
    ema = VelocityRefiner(**{**frozen.teacher.config, "depth": 1}).eval()  # it refines nothing yet
    loss = HeldOutLoss(options, frozen, ema, held)
    assert loss().figures["holdout"] > 0
    assert loss.objective.recipe == recipe
    assert loss.objective.teacher is frozen.teacher
