"""loss.png: what is read for it, what is drawn, and what its failing does to a run."""

import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image
from runs import assert_same_bits, checkpoint, run

from flowturbo.training import curves, log
from flowturbo.training.curves import PICTURE, draw, read_curves, thinned

HEAD = "note: loss.png could not be drawn: "


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def pixels(folder):
    return np.asarray(Image.open(folder / PICTURE).convert("RGB"), int)


def test_the_last_line_of_a_step_counts_and_what_is_cut_off_or_no_number_is_passed_over(tmp_path):
    write(tmp_path, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0, "holdout": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.\n[1, 2]\n"words"\n{"loss": 5}\n{"step": "x", "loss": 5}\n')
        file.write('{"step": 2, "loss": 1.5, "gradient": NaN}\n{"step": 3, "loss": null}\n{"step": 5, "loss": "x"}\n')
        file.write('{"step": 6, "loss": 1e999}\n{"step": 5, "loss": 0.25}\n{"step": 7, "loss": 0.2')
    assert read_curves(tmp_path / "metrics.jsonl") == {
        "step": {1: 1, 2: 2, 3: 3, 5: 5, 6: 6},
        "loss": {1: 3.0, 2: 1.5, 5: 0.25},
        "holdout": {3: 1},
    }


def test_long_curves_are_thinned_by_means():
    steps, values = thinned(range(10_000), [float(k % 2) for k in range(10_000)])
    assert len(steps) == len(values) == 1000
    assert values == pytest.approx(np.full(1000, 0.5))
    assert steps[:2] == pytest.approx([4.5, 14.5])
    assert thinned([5], [1.0])[0].tolist() == [5]


def test_every_curve_that_there_is_is_drawn(tmp_path):
    """Curves of other values make another picture; of the same, the same bytes."""
    losses = [{"step": k, "loss": 1 / k} for k in range(1, 60)]
    held = {"step": 20, "holdout": 0.3, "holdout_error": 0.02}
    ends = {"step": 20, "rmse": 0.1, "rmse_error": 0.01, "rmse_free": 0.2, "rmse_without": 0.3}
    seen = []
    for records in (losses, losses[:1], [*losses, held], [*losses, held, ends], [ends], [{**ends, "rmse_error": None}]):
        write(tmp_path, *records)
        draw(tmp_path, "000-refiner-$x_1")
        seen.append(pixels(tmp_path))
        draw(tmp_path, "000-refiner-$x_1")
        assert np.array_equal(pixels(tmp_path), seen[-1])
    assert len({picture.tobytes() for picture in seen}) == len(seen)
    assert seen[3].shape[0] > 1.8 * seen[2].shape[0]  # two panels


def test_without_figures_there_is_no_picture(tmp_path):
    write(tmp_path, {"step": 1, "loss": None}, {"step": 2, "images/s": 5})
    draw(tmp_path, "a")
    assert not (tmp_path / PICTURE).exists()


def test_a_run_draws_with_every_checkpoint_even_where_figures_are_no_numbers(flags, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(log, "draw", lambda folder, title: (draw(folder, title), drawn.append(title)))
    common = [*flags("predictor"), "--steps", 5, "--ckpt-every", 2, "--log-every", 1]
    folder = run(tmp_path, *common)
    assert drawn == ["000-predictor-no-note"] * 3
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": NaN, "holdout": null}\n')
    run(tmp_path, *common, "--steps", 6, "--resume", "auto")
    assert pixels(folder).shape[2] == 3


def test_a_picture_that_fails_ends_nothing_and_is_said_once(flags, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("No space left on device")

    plain = run(tmp_path / "plain", *flags("predictor"), "--steps", 4)
    with monkeypatch.context() as patch:
        patch.setattr(curves, "atomic_write", broken)
        folder = run(tmp_path / "a", *flags("predictor"), "--steps", 4, "--ckpt-every", 1)
    text = (folder / "log.txt").read_text()
    assert text.count(HEAD) == 1
    assert f"{HEAD}OSError: No space left on device" in text
    assert not (folder / PICTURE).exists()
    assert_same_bits(checkpoint(plain, 4), checkpoint(folder, 4))
    (folder / PICTURE).mkdir()  # what stands in its place
    again = run(tmp_path / "a", *flags("predictor"), "--steps", 5, "--resume", "auto")
    assert f"{HEAD}OSError: cannot write" in (again / "log.txt").read_text()


def test_without_matplotlib_there_is_a_word_and_no_picture(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    folder = run(tmp_path, *flags("predictor"), "--steps", 3, "--ckpt-every", 1)
    text = (folder / "log.txt").read_text()
    assert [line.split(" ", 2)[2] for line in text.splitlines() if "note: " in line] == [
        "note: matplotlib is not installed: no loss.png"
    ]
    assert not (folder / PICTURE).exists()


def test_a_matplotlib_that_cannot_be_imported_is_said_once(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = run(tmp_path, *flags("predictor"), "--steps", 3, "--ckpt-every", 1)
    assert len(re.findall(f"{HEAD}ModuleNotFoundError: import of matplotlib", (folder / "log.txt").read_text())) == 1


def test_a_run_killed_while_it_draws_goes_on_and_leaves_nothing(flags, tmp_path, monkeypatch):
    """The picture before stays whole; what the kill left is removed; the bits are those of a run without one."""

    class Killed(BaseException):
        """As SIGKILL: nothing is tidied up."""

    def killing(path):
        (path.parent / f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
        raise Killed

    common = [*flags("predictor"), "--ckpt-every", 2]
    whole = run(tmp_path / "whole", *common, "--steps", 6)
    folder = run(tmp_path / "parts", *common, "--steps", 2)
    before = (folder / PICTURE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(curves, "atomic_write", killing)
        with pytest.raises(Killed):
            run(tmp_path / "parts", *common, "--steps", 6, "--resume", "auto")
    assert (folder / PICTURE).read_bytes() == before
    assert list(folder.glob(".*.tmp"))
    run(tmp_path / "parts", *common, "--steps", 6, "--resume", "auto")
    assert not list(folder.glob(".*.tmp"))
    assert_same_bits(checkpoint(whole, 6), checkpoint(folder, 6))
    assert (folder / PICTURE).read_bytes() != before
