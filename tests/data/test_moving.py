from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowturbo.data.moving import check_moving, find_ffmpeg, save_moving
from flowturbo.data.pictures import grid


def trajectories():
    """Two of two images, of three states and of one."""
    random = torch.Generator().manual_seed(0)
    states = [torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=random) for _ in range(4)]
    return [states[:3], states[3:]]


def test_a_gif_has_a_frame_for_each_state_and_those_that_ended_wait(tmp_path):
    seen = []

    def draw(states):
        seen.append(states)
        return grid(states)

    long, short = trajectories()
    save_moving(tmp_path / "a.gif", [long, short], draw)
    assert [states[0] is state for states, state in zip(seen, long)] == [True] * 3
    assert all(states[1] is short[0] for states in seen)
    with Image.open(tmp_path / "a.gif") as moving:
        assert moving.n_frames == 3
        assert moving.info["duration"] == 200
        moving.seek(2)
        assert moving.info["duration"] == 1200


def test_a_filmstrip_has_a_row_for_each_image(tmp_path):
    long, _ = trajectories()
    save_moving(tmp_path / "a.png", [long], grid, ["what it is"])
    side, gap, line = 64, 2, int(12 * 1.6)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (
        2 * (side + gap) + gap + line,
        3 * (side + gap) + gap,
        3,
    )  # a caption above the first row alone
    second = picture[2 * gap + line + side :][:side:2, gap : gap + side : 2]
    assert np.array_equal(second, long[0][1].permute(1, 2, 0).numpy())


def test_an_mp4_plays_all_frames_and_stays_at_the_last(tmp_path):
    try:
        ffmpeg = find_ffmpeg()
    except ValueError:
        pytest.skip("no ffmpeg")
    long, _ = trajectories()
    save_moving(tmp_path / "a.mp4", [long], lambda states: grid(states, ["odd width, which H.264 does not take" * 2]))
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    told = subprocess.run([ffmpeg, "-i", tmp_path / "a.mp4", "-f", "null", "-"], capture_output=True, text=True).stderr
    assert "Video: h264" in told
    assert "frame=    8" in told  # three, and the last for 1.2 seconds
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_without_ffmpeg_one_line_says_so_beforehand(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"^an \.mp4 is written by ffmpeg, which is not there: pip install imageio-"):
        check_moving("a.mp4")
    check_moving("a.gif")
