"""What the page computes: the pictures are those of the command that it shows, to the byte."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch

import sample
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.picture_options import PictureOptions
from flowturbo.sampling.solvers import LearnedSolver, write_solver
from flowturbo.system import cli
from flowturbo.transport import Guidance
from flowturbo.web.options import PageOptions
from flowturbo.web.studio import MOST_IMAGES, Studio, named_schedule
from flowturbo.weights.fetch import MissingWeights


@pytest.fixture
def draw(studio, silent):
    """draw(schedule, **options) -> (pictures on the way, settings, options)."""

    def run(schedule="A2", seed=3, cfg_scale=2.0, studio=studio, **given):
        options = PictureOptions(schedule, **{"classes": ("1", "7"), "num_images": 3, **given})
        sampling = studio.settings(seed, cfg_scale)
        return list(studio.draw(options, sampling, silent)), sampling, options

    return run


def by_command(command, tmp_path):
    """The bytes that the command shown on the page writes."""
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "sample.py")
    sample.main([*words, "--out", str(tmp_path / "by-command.png")])
    return (tmp_path / "by-command.png").read_bytes()


@pytest.mark.parametrize(
    ("schedule", "given", "count"),
    [
        ("A3", {}, 4),  # the noise, and after each step
        ("H1P1R2", {"num_images": 5}, 5),
        ("M2@shift2", {"num_images": 19, "classes": ("0", "9", "4")}, 6),  # two batches
        ("dopri5", {}, 1),
        ("sde3", {"num_images": 18}, 2),
    ],
)
def test_the_pictures_bytes_are_those_of_the_command(draw, studio, tmp_path, schedule, given, count):
    pictures, sampling, options = draw(schedule, **given)
    assert len(pictures) == count
    path = studio.save(pictures[-1], sampling, tmp_path)
    assert path.read_bytes() == by_command(studio.command("sample.py", options=(options, sampling)), tmp_path)


def test_the_bundled_models_command_is_short_and_draws_the_same(draw, tmp_path):
    values = MODEL_PRESETS.values["digits"]
    networks = NetworkOptions(*(values[name] for name in ("predictor_ckpt", "refiner_ckpt", "vae_ckpt")), device="cpu")
    studio = Studio.open(networks, SamplingOptions(cfg_scale=1.0), PageOptions(schedule="M2"))
    pictures, sampling, options = draw("M2", 1, 1.0, studio=studio)
    command = studio.command("sample.py", options=(options, sampling))
    assert command == (
        "python sample.py --model digits --device cpu --schedule M2 --classes 1 7 --num-images 3 --cfg-scale 1 --seed 1"
    )
    assert studio.save(pictures[-1], sampling, tmp_path).read_bytes() == by_command(command, tmp_path)
    assert studio.about.startswith("digits: 8x8 pixels, 10 classes, ")


def test_a_command_gives_back_every_setting(pixel_models):
    _, predictor, _, refiner, *_ = pixel_models
    networks = NetworkOptions(predictor, refiner, "none", device="cpu", precision="fp32")
    kept = SamplingOptions(
        cfg_scale=1.25, cfg_channels="all", cfg_interval=(0.1, 0.9), refiner_step="single", atol=1e-5
    )
    studio = Studio.open(networks, kept, PageOptions())
    sampling = studio.settings(2**53 - 1, 1.25)
    options = PictureOptions("H1R1", classes=("3",), num_images=2)
    words = shlex.split(studio.command("sample.py", options=(options, sampling)))[2:]
    kinds = {"what": PictureOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    assert cli.parse(cli.new_parser(""), words, kinds, MODEL_PRESETS) == [options, networks, sampling]
    assert sampling == replace(kept, seed=2**53 - 1)


def test_the_steps_lead_to_the_picture(draw):
    pictures, *_ = draw("A4", num_images=1)
    last = pictures[-1].rows[0].images.float()
    distances = [float((picture.rows[0].images.float() - last).abs().mean()) for picture in pictures]
    assert distances[0] > 3 * distances[2]  # from noise
    assert distances[-1] == 0
    assert [len(picture.rows[0].steps) for picture in pictures] == [1, 2, 3, 4, 5]


def test_what_is_not_sampled_yet_is_grey(draw):
    pictures, *_ = draw("A1", num_images=17)
    first, *_, last = (picture.rows[0].images for picture in pictures)
    assert (first[16] == 128).all()
    assert first[:16].float().std() > 10
    assert last[16].float().std() > 10


def test_two_schedules_are_compared_from_the_same_noise(draw, studio):
    pictures, sampling, options = draw(compare=("A2", "A2"))
    assert [len(picture.rows) for picture in pictures] == [1, 2]
    one, other = pictures[-1].rows
    assert torch.equal(one.images, other.images)
    assert one.evaluations == (2, 0)
    assert one.seconds > 0
    alone, *_ = draw("A2")
    assert torch.equal(one.images, alone[-1].rows[0].images)
    command = studio.command("sample.py", options=(options, sampling))
    assert "--compare A2 A2 " in command
    assert "--schedule" not in command


def test_pictures_of_other_settings_have_other_names(draw, studio, tmp_path):
    paths = set()
    for given in ({}, {"seed": 4}, {"classes": ("2",)}, {"num_images": 4}, {"cfg_scale": 1.5}, {"schedule": "A3"}):
        pictures, sampling, _ = draw(**given)
        paths.add(studio.save(pictures[-1], sampling, tmp_path))
    assert len(paths) == 6
    assert {path.suffix for path in paths} == {".png"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_images": MOST_IMAGES + 1}, f"{MOST_IMAGES + 1} images: expected 1 to {MOST_IMAGES}"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"schedule": "A9999"}, "takes 9999 evaluations: expected 1000 at most"),
        ({"compare": ("A2", "sde5000")}, "takes 5000 evaluations"),
        ({"schedule": "X9"}, "cannot read schedule 'X9'"),
        ({"classes": ("10",)}, "class 10 is outside this model's classes 0 to 9"),
        ({"classes": ("cat",)}, "class 'cat': a model of 10 classes takes indices"),
        ({"seed": -1}, "seed -1: expected a whole number"),
        ({"seed": 2.0**60}, "seed .*: expected a whole number from 0 to 2\\^53 - 1"),
        ({"seed": None}, "seed None: expected a whole number"),
        ({"cfg_scale": None}, "expected a guidance; 1 is none"),
        ({"cfg_scale": float("nan")}, "nan"),
    ],
)
def test_what_cannot_be_drawn_is_told(draw, given, message):
    with pytest.raises(ValueError, match=message):
        draw(**given)


@pytest.mark.parametrize("text", ["", "  ", None, "/etc/passwd", "solvers/x.json", "x.JSON"])
def test_a_schedule_is_no_path(text):
    """Whoever sees the page could read files by them."""
    with pytest.raises(ValueError, match=r"is a path|no schedule"):
        named_schedule(text)


def test_a_solver_that_was_made_for_another_guidance_is_warned_of(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "solvers").mkdir()
    write_solver("solvers/mine.json", LearnedSolver("mine", (0.0, 0.5, 1.0), ((0.5,), (0.1, 0.4)), None, Guidance(4.0)))
    warnings = []
    options = PictureOptions(named_schedule(" mine "), classes=("1",), num_images=1)
    assert len(list(studio.draw(options, studio.settings(0, 2.0), warnings.append))) == 3
    assert len(warnings) == 1
    assert warnings[0].startswith("solver mine was made for guidance cfg 4")


def test_without_a_refiner_schedules_with_r_are_refused(pixel_models, tmp_path, silent):
    said = []
    gone = NetworkOptions(pixel_models[1], str(tmp_path / "gone.pt"), "none", device="cpu")
    studio = Studio.open(gone, SamplingOptions(), PageOptions(), said.append)
    assert said == [f"no refiner {tmp_path / 'gone.pt'}: schedules with R are refused"]
    assert "no refiner" in studio.about
    with pytest.raises(ValueError, match="they need a refiner"):
        list(studio.draw(PictureOptions("H1R1", classes=("1",), num_images=1), studio.settings(0, 2), silent))


def test_without_a_predictor_there_is_no_page(tmp_path, pixel_models):
    with pytest.raises(MissingWeights, match=r"gone\.pt"):
        Studio.open(
            NetworkOptions(str(tmp_path / "gone.pt"), pixel_models[3], "none"), SamplingOptions(), PageOptions()
        )


def test_classes_are_chosen_by_name_where_each_has_one(save_network, tmp_path):
    names = ["cat", "dog", "", *"abcdefg"]
    for given, first in ((names, "0"), (["cow", *names[:2], *names[3:]], "cow")):
        file = save_network(tmp_path / f"{first}.pt", classes=given, in_channels=3)
        options = NetworkOptions(str(file), "none.pt", "none", device="cpu")
        studio = Studio.open(options, SamplingOptions(), PageOptions(classes=("dog",)), lambda _: None)
        assert studio.classes[0] == (given[0], first)
        assert studio.first_classes == ["1" if first == "0" else "dog"]
    with pytest.raises(ValueError, match="'bird' is no class name or index"):
        Studio.open(options, SamplingOptions(), PageOptions(classes=("bird",)), lambda _: None)
