from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowturbo.transport import Grid, Schedule

GRIDS = ["@shift2", "@shift3", "@shift0.5", "@power1.4", "@power0.7", ""]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_a_grid_goes_from_noise_to_data_exactly_and_one_way(grid, n):
    times = Schedule.parse(f"H{n}{grid}").times()
    assert len(times) == n + 1
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in zip(times, times[1:]))


@pytest.mark.parametrize(
    ("grid", "finer"), [("@shift2", True), ("@shift0.5", False), ("@power1.4", True), ("@power0.7", False)]
)
def test_a_number_above_1_is_finer_near_noise(grid, finer):
    assert (Schedule.parse(f"H8{grid}").times()[1] < 1 / 8) is finer


@pytest.mark.parametrize("shift", [1.5, 3.0])
def test_shift_is_that_of_diffusers(shift):
    n = 8
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = [1 - k / n for k in range(n)]  # the scheduler shifts them
    scheduler.set_timesteps(sigmas=sigmas)
    ours = 1 - torch.tensor(Schedule.parse(f"H{n}@shift{shift}").times())
    torch.testing.assert_close(ours, scheduler.sigmas, atol=1e-6, rtol=0)


def test_power_is_a_power():
    assert Schedule.parse("H4@power2").times() == [0, 1 / 16, 4 / 16, 9 / 16, 1]


@pytest.mark.parametrize("grid", ["@shift2", "@power1.4", "@shift1.23456789"])
def test_the_text_of_a_grid_reads_back(grid):
    schedule = Schedule.parse(f"h1p5 {grid.upper()}")
    assert str(schedule) == f"H1P5{grid}"
    assert Schedule.parse(str(schedule)) == schedule != Schedule.parse("H1P5")


@pytest.mark.parametrize(
    "text", ["@", "@shift", "@shift0", "@shift-1", "@shift1e9", "@power0.0001", "@cosine2", "@shift2@power2", "@2"]
)
def test_impossible_grids_are_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match="a grid follows as"):
        Schedule.parse("H8" + text)


def test_a_grid_can_be_made_without_its_text():
    assert str(Schedule("HP", Grid("shift", 2.0))) == "H1P1@shift2"
    with pytest.raises(ValueError, match="impossible grid"):
        Grid("shift", float("nan"))
