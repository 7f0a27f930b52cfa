"""Pictures that move: the states of several trajectories as a GIF, an MP4 or a filmstrip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowturbo.data.pictures import grid, save_gif, save_png
from flowturbo.system.files import atomic_write

FRAME = 200  # milliseconds of each frame; the last is shown for a second and more
LAST = 1200

Draw = Callable[[list[Tensor]], Image.Image]


def check_moving(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a file that this machine cannot write: an MP4 without ffmpeg."""
    if Path(path).suffix.lower() == ".mp4":
        find_ffmpeg()


def save_moving(
    path: str | os.PathLike[str],
    trajectories: Sequence[Sequence[Tensor]],
    draw: Draw,
    captions: Sequence[str] = (),
) -> None:
    """Write trajectories, each a sequence of states (N, C, H, W) uint8, by the ending of the name.

    .gif and .mp4: a frame of the k-th states of all, as `draw` arranges them; a trajectory that has ended waits for the
    others. .png: a filmstrip with a row for each image of each trajectory, `captions` above its first.
    Raises ValueError for an MP4 without ffmpeg.
    """
    ending = Path(path).suffix.lower()
    if ending == ".png":
        strips = [torch.stack(images) for states in trajectories for images in zip(*states, strict=True)]
        heads = [head for text, states in zip(captions, trajectories) for head in (text, *[""] * (len(states[0]) - 1))]
        save_png(path, grid(strips, heads, least_side=64))
        return
    longest = max(map(len, trajectories))
    frames = [draw([states[min(k, len(states) - 1)] for states in trajectories]) for k in range(longest)]
    if ending == ".mp4":
        save_mp4(path, frames)
    else:
        save_gif(path, frames, FRAME, LAST)


def save_mp4(path: str | os.PathLike[str], frames: Sequence[Image.Image]) -> None:
    """Write pictures of one size as H.264, whole or not at all. Raises ValueError where there is no ffmpeg."""
    width, height = frames[0].size
    shown = [*frames, *[frames[-1]] * round(LAST / FRAME - 1)]
    command = [
        *(find_ffmpeg(), "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
        *("-r", f"{1000 / FRAME:g}", "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "mp4", "-y"),
    ]
    data = b"".join(np.asarray(frame.convert("RGB")).tobytes() for frame in shown)
    with atomic_write(path) as file:  # an MP4 is written to and fro, so not through a pipe
        done = subprocess.run([*command, file.name], input=data, capture_output=True)
        if done.returncode:
            raise OSError(f"cannot write {os.fspath(path)!r}: ffmpeg says {done.stderr.decode(errors='replace')[:300]}")


def find_ffmpeg() -> str:
    """The program: that of the machine, or of the package imageio-ffmpeg. Raises ValueError where there is none."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ValueError("an .mp4 is written by ffmpeg, which is not there: pip install imageio-ffmpeg") from None
