"""The picture of samples: its bytes, its name, the way between two noises, and what moves."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from flowturbo.data.randomness import between, keyed_noise
from flowturbo.sampling.bundled import load_bundled
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.picture import Row, make_picture
from flowturbo.sampling.picture_options import PictureOptions, picture_name
from flowturbo.system import cli
from flowturbo.weights.registry import MODELS

# Another value of every setting that takes more than another number.
OTHERS = {
    **{"schedule": "A6", "compare": ("H2", "A6"), "classes": ("3",), "num_images": 3, "interpolate": (1, 2)},
    **{"predictor_ckpt": "mine.pt", "refiner_ckpt": "mine.pt", "vae_ckpt": "vae-mse", "device": "cpu"},
    **{"precision": "fp32", "quantize": "int8", "cfg_channels": "all", "cfg_interval": (0.25, 1.0)},
    **{"refiner_step": "single", "path_type": "gvp", "diffusion": "linear"},
}
KINDS = (PictureOptions, NetworkOptions, SamplingOptions)


def other(name, value):
    if name in OTHERS:
        return OTHERS[name]
    return not value if isinstance(value, bool) else value + 1


def named(**changes):
    own = [{name: value for name, value in changes.items() if name in {f.name for f in fields(kind)}} for kind in KINDS]
    return picture_name(*(kind(**values) for kind, values in zip(KINDS, own)))


@pytest.fixture(scope="module")
def digits_model():
    return load_bundled("digits", device="cpu")


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(*flags) -> what was printed, with the digits' networks, in the working folder tmp_path."""

    def run(*flags):
        capsys.readouterr()
        sample.main(["--model", "digits", "--device", "cpu", *map(str, flags)])
        return capsys.readouterr().out

    return run


def test_every_setting_changes_the_name():
    """But strict, which changes no picture."""
    settings = [field for kind in KINDS for field in fields(kind) if field.name != "strict"]
    names = [named(), *(named(**{field.name: other(field.name, field.default)}) for field in settings)]
    assert len(set(names)) == len(names) > 25
    assert named(strict=True) == named() == "H1P5R3-cfg4-seed0"


def test_any_two_settings_change_the_name():
    settings = [field for kind in KINDS for field in fields(kind) if field.name != "strict"]
    pairs = [pair for pair in combinations(settings, 2) if {f.name for f in pair} != {"compare", "interpolate"}]
    pairs = [
        pair for pair in pairs if "compare" not in {f.name for f in pair} or "schedule" not in {f.name for f in pair}
    ]
    names = [named(**{field.name: other(field.name, field.default) for field in pair}) for pair in pairs]
    assert len(set(names)) == len(names)


def test_names_are_short_and_are_read_at_a_glance():
    assert named(cfg_every=2, cfg_interval=(0.2, 1.0)) == "H1P5R3-cfg4-seed0-interval0.2+1-every2"
    assert (
        named(classes=("flag", "face-smiling"), captions=False) == "H1P5R3-cfg4-seed0-of-flag+face-smiling-no-captions"
    )
    assert named(compare=("h8", "[A2]x3"), num_images=3) == "H8-vs-A6-cfg4-seed0-images3"
    for name, model in MODELS.items():
        options = {**model.options(), "predictor_ckpt": model.predictor_ckpt}
        assert named(**options) == f"{name}-{model.schedule}-cfg{model.cfg_scale:g}-seed0"
    parsed = cli.parse(cli.new_parser(""), ["--model", "colour"], dict(zip("abc", KINDS)), MODEL_PRESETS)
    assert picture_name(*parsed) == "colour-M11-cfg3-seed0"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"schedule": "M6"}, {"compare": ("M6",)}),
        ({"predictor_ckpt": "a/0005000.pt"}, {"predictor_ckpt": "b/0005000.pt"}),
        ({"classes": ("a+b",)}, {"classes": ("a", "b")}),
        ({"classes": ("a/b",)}, {"classes": ("a_b",)}),
        ({"classes": ("a b",)}, {"classes": ("a_b",)}),
        ({"classes": ("x-every2",)}, {"classes": ("x",), "cfg_every": 2}),
        ({"classes": ("x" * 300,)}, {"classes": ("x" * 301,)}),
        ({"cfg_scale": 1.5}, {"cfg_scale": 1.5000001}),
        ({"refiner_ckpt": "a.pt-vae-none"}, {"refiner_ckpt": "a.pt", "vae_ckpt": "none"}),
    ],
    ids=str,
)
def test_no_two_settings_share_a_name(one, two):
    names = named(**one), named(**two)
    assert names[0] != names[1]
    assert all(len(name) < 200 and "/" not in name and " " not in name for name in names)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123456, "12.3"), (1.2345, "1234"), (0.09996, "100"), (12.3456, "12300")]
)
def test_milliseconds_have_three_figures_and_no_exponent(seconds, text):
    row = Row("H1", torch.zeros(1, 1, 8, 8), (2, 0), None, "cfg 1", seconds)
    assert row.ms == text.replace("1234", "1230")


def test_the_bytes_are_those_of_the_script(digits_model, draw, tmp_path):
    out = tmp_path / "a.png"
    said = draw("--schedule", "M5", "--classes", 3, 7, "--seed", 4, "--out", out)
    made = make_picture(digits_model, PictureOptions("M5", classes=("3", "7")), SamplingOptions(cfg_scale=1.0, seed=4))
    made.save(tmp_path / "b.png")
    assert out.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert f"saved {out}" in said
    assert made.labels == ["class 3", "class 7"]


def test_a_way_between_two_noises_has_its_ends_and_its_length(digits_model, draw, tmp_path):
    first, second = (keyed_noise(seed, range(3), (4, 16, 16)) for seed in (1, 2))
    assert torch.equal(between(first, second, 0), first)
    assert torch.equal(between(first, second, 1), second)
    middle = between(first, second, 0.5)
    assert middle.std() == pytest.approx(1, abs=0.03)  # of the straight line's middle it is 0.7
    assert torch.allclose(between(first, first, 0.5), first, atol=1e-4)
    options = PictureOptions("A4", classes=("3", "7"), interpolate=(5, 6), frames=4)
    made = make_picture(digits_model, options, SamplingOptions(cfg_scale=1.0))
    assert made.draw().size == (4 * 132 + 4, 2 * (132 + 19) + 4)
    for seed, place in ((5, 0), (6, 3)):
        still = replace(options, interpolate=None)
        ends = make_picture(digits_model, still, SamplingOptions(cfg_scale=1.0, seed=seed))
        apart = made.rows[0].images[place::4].int() - ends.rows[0].images.int()
        assert apart.abs().max() <= 1
    out = tmp_path / "way.gif"
    draw(
        "--interpolate",
        5,
        6,
        "--frames",
        4,
        "--schedule",
        "A4",
        "--classes",
        3,
        7,
        "--animate",
        out,
        "--out",
        tmp_path / "a.png",
    )
    with Image.open(out) as moving:
        assert moving.n_frames == 6  # there and back
        assert moving.size == (2 * 132 + 4, 132 + 4 + 19)


def test_steps_begin_with_noise_and_end_with_the_picture(digits_model, draw, tmp_path):
    options, sampling = PictureOptions("H1P3", classes=("3", "7")), SamplingOptions(cfg_scale=1.0)
    made = make_picture(digits_model, options, sampling, steps=True)
    plain = make_picture(digits_model, options, sampling)
    states = made.rows[0].steps
    assert len(states) == 5
    assert torch.equal(states[-1], plain.rows[0].images)
    noise = keyed_noise(0, range(2), (1, 8, 8))
    assert (states[0].float() - (noise * 127.5 + 128).clamp(0, 255)).abs().max() <= 1
    # What a step foretells comes nearer and nearer to the picture.
    apart = [float((state.float() - states[-1].float()).square().mean().sqrt()) for state in states]
    assert apart == sorted(apart, reverse=True)
    assert apart[1] < apart[0] / 2
    out = tmp_path / "steps.gif"
    said = draw(
        "--schedule", "H1P3", "--compare", "H1P3", "A2", "--classes", 3, "--animate", out, "--out", tmp_path / "a.png"
    )
    assert "what its steps foretell included" in said
    with Image.open(out) as moving:
        assert moving.n_frames == 5
        moving.seek(4)
        assert (
            np.abs(
                np.asarray(moving.convert("L"), int) - np.asarray(Image.open(tmp_path / "a.png").convert("L"))
            ).mean()
            < 2
        )


def test_the_end_point_of_a_straight_way_is_known_from_any_step(digits_model):
    """E1's only step is the last; of E2 the first foretells x1 = x0 + v, the mean of the data at t = 0."""
    from flowturbo.sampling.generate import ImageSampler

    sampler = ImageSampler(digits_model, "E2", SamplingOptions(cfg_scale=1.0).settings())
    z = sampler.noise(0, range(2))
    seen = list(sampler.steps(z, [3, 7]))
    whole = ImageSampler(digits_model, "E1", SamplingOptions(cfg_scale=1.0).settings()).from_noise(z, [3, 7])
    assert (seen[1].int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--interpolate", "1", "2", "--compare", "H1", "E1"], "interpolate and compare each want the rows"),
        (["--interpolate", "1", "2", "--schedule", "sde5"], "not sde5"),
        (["--frames", "1"], "frames 1 must be at least 2"),
        (["--animate", "a.webp"], "animate 'a.webp' must end in .gif or .mp4"),
        (["--animate", "a.gif", "--schedule", "dopri5"], "dopri5 has no steps"),
    ],
    ids=str,
)
def test_what_makes_no_picture_is_explained(draw, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        draw(*flags)
