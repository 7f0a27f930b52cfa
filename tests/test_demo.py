import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import demo
import train
from flowturbo.data.folders import ClassFolder
from flowturbo.data.pictures import to_uint8
from flowturbo.data.randomness import keyed_noise
from flowturbo.models import SiT
from flowturbo.networks.load import load_network
from flowturbo.transport import FlowTurbo


@pytest.fixture(scope="module")
def predictor():
    return load_network(SiT, str(demo.PREDICTOR))


def test_the_committed_predictor_is_the_small_one_its_flags_make(predictor, tmp_path):
    assert demo.PREDICTOR.stat().st_size < 5e6
    assert 1.0e6 < sum(p.numel() for p in predictor.parameters()) < 1.1e6
    made = train.parse([*demo.PREDICTOR_FLAGS, "--data-path", "digits"]).predictor
    for name in ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma"):
        assert predictor.config[name] == getattr(made, name)
    assert predictor.input_shape == (1, 8, 8)
    assert predictor.num_classes == 10


def test_the_committed_predictor_draws_the_digit_asked_for(predictor):
    y = torch.arange(10).repeat(10)
    latents = FlowTurbo(predictor, None, "H8", 1.0).sample(keyed_noise(0, range(100), (1, 8, 8)), y)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    assert demo.class_accuracy(to_uint8(latents)[:, 0].numpy(), images, digits.target) >= 0.95


def test_the_flags_of_both_trainings_are_train_pys():
    assert train.parse([*demo.REFINER_FLAGS, "--data-path", "d", "--model-teacher-ckpt", "p"]).target == "refiner"


def test_the_digits_become_a_folder_of_classes(tmp_path):
    images, labels = demo.write_digits(tmp_path / "digits")
    assert (images.shape, images.dtype, labels.shape) == ((1797, 8, 8), np.uint8, (1797,))
    assert (images.min(), images.max()) == (0, 255)
    assert np.abs(images / 255 * 16 - load_digits().images).max() < 0.04
    data = ClassFolder(tmp_path / "digits", 8, 1)
    assert data.classes == list("0123456789")
    assert np.bincount(data.labels).tolist() == np.bincount(labels).tolist()
    for number in (0, 7, 1796):
        path = tmp_path / "digits" / str(labels[number]) / f"{number:04d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[number])


def test_class_accuracy_asks_the_nearest_real_image():
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    picked = np.stack([images[digits.target == k][0] for k in range(10)] * 2)
    assert demo.class_accuracy(picked, images, digits.target) == 1
    assert demo.class_accuracy(picked[::-1].copy(), images, digits.target) == 0
    half = np.where(np.arange(20)[:, None, None] < 10, picked, picked[::-1])
    assert demo.class_accuracy(half, images, digits.target) == 0.5


def result(name, predictor, refiner, distance):
    return demo.Result(name, (predictor, refiner), 1.234, distance, 0.015, 0.987)


RESULTS = [
    result("H3", 6, 0, 2.0),
    result("H4", 8, 0, 1.0),
    result("H8", 16, 0, 0.3),
    result("H1P5R2 released", 7, 4, 0.9),
    result("H1P5R2 single", 7, 2, 1.5),
    result("H1P7R2 single", 9, 2, 0.2),
    result("H1P1 single", 3, 1, 9.0),
]


def test_the_table_has_a_line_for_every_schedule():
    head, *lines = demo.table(RESULTS).splitlines()
    assert head.split() == ["schedule", "predictor", "refiner", "ms/image", "FD", "class", "accuracy"]
    assert len(lines) == len(RESULTS)
    assert lines[3].split() == ["H1P5R2", "released", "7", "4", "1.23", "0.900", "±", "0.015", "98.7%"]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_the_verdict_names_what_nothing_as_cheap_beats_and_what_beats_the_refiners():
    lines = demo.verdict([*RESULTS, result("A9", 9, 0, 0.4)]).splitlines()
    assert lines == [
        "No row with as few evaluations is better than: H3 (6 evaluations), H4 (8 evaluations), "
        "H1P7R2 single (11 evaluations), H1P1 single (4 evaluations), A9 (9 evaluations).",
        "H1P5R2 released, 7 + 4 evaluations: H1P7R2 single with 11 is better.",
        "H1P5R2 single, 7 + 2 evaluations: A9 with 9 is better.",
        "H1P7R2 single, 9 + 2 evaluations: no row with as few is better.",
        "H1P1 single, 3 + 1 evaluations: no row with as few is better.",
        "Distances closer than about two standard errors cannot be told apart.",
    ]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds something else than a demo: expected another folder"):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "samples").is_dir()


@pytest.mark.slow
def test_the_demo_from_its_first_picture_to_its_verdict(tmp_path, capsys):
    out = tmp_path / "demo"
    small = ["--num-images", "20", "--refiner-steps", "5"]
    demo.main(["--out", str(out), *small])
    said = capsys.readouterr().out
    assert [line[:2] for line in said.splitlines() if line[:2] in ("1.", "2.", "3.", "4.")] == ["1.", "2.", "3.", "4."]
    assert "M11   12 evaluations, 24 rows   cfg 3 " in said
    assert all(f"\n{schedule}" in said for schedule, _ in demo.ROWS)
    assert Image.open(out / "colour.png").size == (4 * 132 + 4, 4 * (132 + 19) + 4)
    assert Image.open(out / "comparison.png").width > 600


def test_the_demo_begins_with_colours(tmp_path, capsys):
    demo.draw_colours(tmp_path / "colour.png")
    assert "1. the colour model, pictures of 32x32 pixels" in capsys.readouterr().out
    pixels = np.asarray(Image.open(tmp_path / "colour.png"), float)
    assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 10
