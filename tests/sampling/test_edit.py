from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edit as script
from flowturbo.sampling.edit_options import EditOptions
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import LearnedSolver, write_solver
from flowturbo.system import cli
from flowturbo.transport import Guidance


def picture(height, width, channels=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=random)


@pytest.fixture
def files(tmp_path):
    """cat.png of 8x8, its mask, and a larger image."""
    Image.fromarray(picture(8, 8).permute(1, 2, 0).numpy()).save(tmp_path / "cat.png")
    Image.fromarray(picture(12, 20).permute(1, 2, 0).numpy()).save(tmp_path / "large.png")
    values = np.zeros((8, 8), np.uint8)
    for name, level in (("black", 0), ("white", 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / f"{name}.png")
    values[2:6, 3:8] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.fixture
def run(files, pixel_models, capsys, monkeypatch):
    """run(*flags) -> what was printed, in the folder of `files`."""
    monkeypatch.chdir(files)

    def call(*flags, schedule="H1P1"):
        flags = [*pixel_models, "--device", "cpu", "--schedule", schedule, *map(str, flags)]
        script.main(flags)
        return capsys.readouterr().out

    return call


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_commands_of_its_help(run, files):
    assert run("--image", "cat.png", "--class", 3, "--strength", 0.6, "--out", "a.png").endswith("saved a.png\n")
    assert read("a.png").shape == (8, 8, 3)
    assert "saved edits/cat-inpaint-" in run("--image", "cat.png", "--mask", "mask.png", "--class", 3)
    kept = read("mask.png") == 0
    (inpainted,) = Path("edits").iterdir()
    assert np.array_equal(read(inpainted)[kept], read("cat.png")[kept])
    assert "saved edits/cat-remove-" in run("--image", "cat.png", "--mask", "mask.png", "--remove")
    said = run("--image", "cat.png", "--from-class", 1, "--to-class", 2)
    assert "H1P1   6 evaluations   cfg 4" in said
    assert "saved edits/cat-flowedit-" in said
    run("--image", "cat.png", "--from-class", 1, "--to-class", 2, "--method", "invert")
    run("--image", "cat.png", "--class", 1, "--cfg-scale", 1, "--invert", "--out", "noise.pt", schedule="H30")
    run("--noise", "noise.pt", "--cfg-scale", 1, "--out", "again.png", schedule="H30")
    assert np.abs(read("again.png") - read("cat.png")).max() <= 2


def test_several_results_comparisons_and_trajectories(run, files):
    run("--image", "cat.png", "--class", 3, "--num-images", 2, "--out", "b.png")
    assert not np.array_equal(read("b-0.png"), read("b-1.png"))
    strip = ["--steps-picture", "steps.png"]
    said = run("--image", "cat.png", "--class", 3, "--compare", "H2", "h1r1", "--out", "c.png", *strip)
    assert re.search(r"^H2   4 evaluations   cfg 4   [\d.]+ ms/image$", said, re.MULTILINE)
    assert "H1R1   2 + 2 evaluations" in said
    assert Image.open("c.png").height > 3 * 32
    assert Image.open("steps.png").width >= 3 * 32
    run("--image", "cat.png", "--class", 3, "--steps-picture", "steps.gif", schedule="E5")
    assert Image.open("steps.gif").n_frames == 6


def named(*flags):
    kinds = dict(zip("abcd", (script.FileOptions, EditOptions, NetworkOptions, SamplingOptions)))
    return script.default_name(*cli.parse(cli.new_parser(""), [*map(str, flags)], kinds, MODEL_PRESETS))


def test_a_name_tells_the_settings():
    painted = ["--model", "digits", "--image", "five.png", "--mask", "half.png", "--class", 8]
    assert named(*painted) == "edits/five-inpaint-digits-H1P5R2-cfg1-seed0-mask-half.png-to-8.png"
    assert named(*painted, "--from-class", 5, "--strength", 0.6, "--schedule", "M3") == (
        "edits/five-inpaint-flowedit-digits-M3-cfg1-seed0-mask-half.png-to-8-from-5-strength0.6.png"
    )
    assert named("--noise", "noise.pt", "--cfg-scale", 1) == "edits/noise.pt-restore-H1P5R3-cfg1-seed0.png"


def test_no_two_settings_share_a_name(files, monkeypatch):
    """Of edit.py; those of networks and sampling are in test_picture.py."""
    monkeypatch.chdir(files)
    for folder in "ab":
        write_solver(f"{folder}/fast.json", LearnedSolver("any", (0.0, 0.3, 1.0), ((0.3,), (-0.2, 0.9))))
    whole = ["--image", "cat.png", "--class", "3"]
    masked = [*whole, "--mask", "m.png"]
    settings = [
        *(whole, masked, [*masked, "--remove"], [*masked[:2], *masked[4:], "--remove"]),
        *([*whole[:3], "tabby"], [*whole[:1], "dog.png", *whole[2:]], [*whole[:1], "cat.jpg", *whole[2:]]),
        *([*whole[:1], f"{folder}/cat.png", *whole[2:]] for folder in "ab"),
        *([*whole, "--mask", mask] for mask in ("n.png", "a/m.png", "b/m.png")),
        *([*whole, "--from-class", "1", *method] for method in ([], ["--method", "invert"])),
        *([*masked, "--from-class", "1", *method] for method in ([], ["--method", "invert"])),
        *([*whole, "--strength", s] for s in ("0.5", "0.50001")),
        *([*masked, *more] for more in (["--num-images", "2"], ["--resample", "2"], ["--feather", "2"])),
        *([*masked, flag] for flag in ("--no-composite", "--keep-size")),
        *([*whole, "--schedule", schedule] for schedule in ("M6", "a/fast.json", "b/fast.json")),
        *([*whole, "--compare", *schedules] for schedules in (["M6"], ["M6", "H3"], ["H3", "M6"])),
        *([*whole, "--seed", "1"], [*whole, "--cfg-scale", "1"], ["--noise", "cat.png"]),
    ]
    names = [named(*each) for each in settings]
    assert len(set(names)) == len(names)
    assert all(len(name) < 200 and name.count("/") == 1 for name in names)
    assert named(*whole, "--steps-picture", "a.gif") == named(*whole)


def test_another_setting_is_another_file(run, files):
    for seed in (0, 1):
        run("--image", "cat.png", "--class", 3, "--strength", 0.6, "--num-images", 2, "--seed", seed)
    assert len(list(Path("edits").iterdir())) == 4


def test_an_image_of_another_size_is_told_of(run, files):
    said = run("--image", "large.png", "--class", 3, "--out", "d.png")
    assert "large.png: 20 x 12 pixels, cropped to 8 x 8 as in training (--keep-size puts the result back)" in said
    run("--image", "large.png", "--class", 3, "--keep-size", "--out", "e.png")
    assert read("e.png").shape == (12, 20, 3)
    assert np.array_equal(read("e.png")[:, :4], read("large.png")[:, :4])


def test_the_mask_is_that_of_the_upright_image(run, files):
    """An image that a camera stored on its side; of the mask, what lies outside the crop is kept and told of."""
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(picture(8, 12).permute(1, 2, 0).numpy()).save("side.png", exif=exif)
    mask = np.zeros((12, 8), np.uint8)
    mask[1:4, 2:6] = 255
    Image.fromarray(mask).save("upright.png")
    said = run("--image", "side.png", "--mask", "upright.png", "--class", 3, "--keep-size", "--out", "g.png")
    assert "upright.png: 33.3 % of what is white lies outside the crop, and is kept" in said
    before = np.rot90(read("side.png"), -1)
    changed = (read("g.png") != before).any(axis=-1)
    assert changed.shape == (12, 8)
    assert changed[2:4, 2:6].any()
    changed[2:4, 2:6] = False
    assert not changed.any()


BAD = [
    (["--class", 3], "expected image, or the noise"),
    (["--image", "cat.png"], "expected a class"),
    (["--image", "gone.png", "--class", 3], "cannot read image 'gone.png': No such file"),
    (["--image", "text.png", "--class", 3], "cannot read image 'text.png'"),
    (["--image", "cat.png", "--class", 10], "class 10 is outside this model's classes 0 to 9"),
    (["--image", "cat.png", "--class", "tabby"], "a model of 10 classes takes indices"),
    (["--image", "cat.png", "--class", 3, "--strength", 0], "strength 0 must lie in (0, 1]"),
    (["--image", "cat.png", "--class", 3, "--strength", 1.2], "strength 1.2 must lie in (0, 1]"),
    (["--image", "cat.png", "--class", 3, "--strength", "nan"], "strength nan must lie in (0, 1]"),
    (["--image", "large.png", "--class", 3, "--mask", "mask.png"], "the mask has 8 x 8 pixels, the image 20 x 12"),
    (["--image", "cat.png", "--class", 3, "--mask", "black.png"], "the mask is all black"),
    (["--image", "cat.png", "--class", 3, "--mask", "white.png"], "the mask is all white"),
    (["--image", "cat.png", "--class", 3, "--mask", "text.png"], "cannot read image 'text.png'"),
    (["--image", "cat.png", "--remove"], "remove needs a mask"),
    (["--image", "cat.png", "--class", 3, "--compare", "R2H1"], "a schedule cannot start with R"),
    (["--image", "cat.png", "--class", 3, "--compare", "dopri5"], "an edit takes a schedule of blocks, not dopri5"),
    (["--image", "cat.png", "--class", 3, "--method", "flowedit"], "needs to_class and from_class"),
    (["--image", "cat.png", "--from-class", 3], "needs to_class and from_class"),
    (["--image", "cat.png", "--class", 3, "--from-class", 1, "--method", "sdedit"], "sdedit knows no old class"),
    (["--image", "cat.png", "--class", 3, "--from-class", 1, "--resample", 2], "are for the method sdedit"),
    (
        ["--image", "cat.png", "--class", 3, "--from-class", 1, "--method", "invert", "--num-images", 2],
        "so there is one result",
    ),
    (["--image", "cat.png", "--class", 3, "--num-images", 0], "must be at least 1"),
    (["--image", "cat.png", "--class", 3, "--out", "a.jpg"], "out 'a.jpg' must end in .png"),
    (["--image", "cat.png", "--class", 3, "--invert"], "invert needs image and out"),
    (["--image", "cat.png", "--class", 3, "--invert", "--out", "a.png"], "out 'a.png' must end in .pt"),
    (["--image", "cat.png", "--noise", "n.pt"], "expected image, or the noise"),
    (["--noise", "n.pt", "--num-images", 2], "num_images is for edits, not for inversion"),
    (
        ["--image", "cat.png", "--invert", "--out", "n.pt", "--strength", 0.5],
        "strength is for edits, not for inversion",
    ),
    (
        ["--image", "cat.png", "--class", 3, "--out", "a.png", "--steps-picture", "./a.png"],
        "out and steps_picture are both 'a.png'",
    ),
    (["--noise", "gone.pt"], "No such file"),
    (["--noise", "cat.png"], "noise 'cat.png' is no file that inversion writes"),
    (["--image", "cat.png", "--class", 3, "--steps-picture", "a.mov"], "must end in .png or .gif or .mp4"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda value: " ".join(map(str, value))[:60])
def test_bad_input_is_one_line_and_writes_nothing(flags, message, run, files):
    before = sorted(files.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        run(*flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in files.rglob("*") if path.is_file()) == [path for path in before if path.is_file()]


def test_a_solver_file_stands_beside_schedules(run, files, capsys):
    grid, rows = (0.0, 0.3, 1.0), ((0.3,), (-0.2, 0.9))
    write_solver("solvers/fast-2.json", LearnedSolver("any", grid, rows, guidance=Guidance(1.5)))
    said = run("--image", "cat.png", "--mask", "mask.png", "--class", 3, "--compare", "H1", "fast-2", "--out", "f.png")
    assert re.search(r"^fast-2   2 evaluations   cfg 4", said, re.MULTILINE)
    run("--image", "cat.png", "--class", 3, "--strict", "--cfg-scale", 1.5, schedule="solvers/fast-2.json")
    with pytest.raises(ValueError, match="solver fast-2 was made for guidance"):
        run("--image", "cat.png", "--class", 3, "--strict", schedule="fast-2")
    Path("broken.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no solver"):
        run("--image", "cat.png", "--class", 3, schedule="broken.json")
