"""What the planner found, as a table, a picture, and a command to paste."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from flowturbo.data.pictures import save_png
from flowturbo.planning.planner import Candidate, Measured
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.sampling.picture_options import PictureOptions
from flowturbo.system.options import words_of
from flowturbo.system.values import plus


def front_table(front: Sequence[Measured]) -> str:
    """A line for each schedule of the Pareto front, cheapest first."""
    lines = [f"{'schedule':28}{'evaluations':>13}{'rows':>8}{'ms/image':>10}{'RMSE':>20}{'PSNR':>9}"]
    for row in front:
        evaluations, rows = plus(*row.evaluations), plus(*row.rows)
        ms = row.ms if row.timed is None else row.timed
        lines.append(
            f"{row.candidate!s:28}{evaluations:>13}{rows:>8}{ms:10.3g}{row.fidelity.rmse!s:>20}"
            f"{row.fidelity.psnr.value:9.2f}"
        )
    samples = len(front[0].fidelity)
    lines.append(f"RMSE ± standard error of the end points of {samples} samples; PSNR in dB, of values from -1 to 1")
    return "\n".join(lines)


def command(row: Measured, networks: NetworkOptions, sampling: SamplingOptions) -> str:
    """The call of sample.py that samples with a schedule."""
    plan = row.candidate
    networks = replace(networks, refiner_ckpt=plan.refiner or NetworkOptions.refiner_ckpt)
    sampling = replace(sampling, refiner_step=plan.form if plan.refiner else None)
    always = {"schedule": None, "cfg_scale": None}
    words = [word for each in (PictureOptions(str(plan.spec)), networks, sampling) for word in words_of(each, **always)]
    return shlex.join(["python", "sample.py", *words])


def plot(path: str | os.PathLike[str], front: Sequence[Measured], seen: Mapping[Candidate, Measured]) -> None:
    """RMSE over milliseconds, both on logarithmic axes: every candidate as a point, the front as a line with names."""
    save_png(path, draw(front, seen.values()))


def draw(front: Sequence[Measured], seen: Iterable[Measured]) -> Image.Image:
    """The picture that `plot` saves."""
    width, height, left, right, top, bottom = 900, 560, 80, 150, 40, 60
    points = [(row.ms, row.fidelity.rmse.value) for row in seen if row.fidelity.rmse.value > 0]
    axes = [_Axis([p[k] for p in points]) for k in (0, 1)]

    def place(ms: float, rmse: float) -> tuple[float, float]:
        across, up = axes[0].place(ms), axes[1].place(rmse)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    pen.text(
        (left, 10), "end-point RMSE over milliseconds an image", fill="black", font=ImageFont.load_default(size=17)
    )
    for tick in axes[0].ticks():
        x, y = place(tick, axes[1].low)
        pen.line((x, top, x, y), fill="#dddddd")
        pen.text((x, y + 8), f"{tick:g}", fill="black", font=font, anchor="mt")
    for tick in axes[1].ticks():
        x, y = place(axes[0].low, tick)
        pen.line((x, y, width - right, y), fill="#dddddd")
        pen.text((x - 8, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    for point in points:
        x, y = place(*point)
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#9db4c8")
    best = [place(row.ms, row.fidelity.rmse.value) for row in front if row.fidelity.rmse.value > 0]
    if len(best) > 1:
        pen.line(best, fill="#c0392b", width=2)
    for (x, y), row in zip(best, front):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#c0392b")
        pen.text((x + 8, y - 8), str(row.candidate), fill="black", font=font)
    return canvas


class _Axis:
    """A logarithmic axis with room at both ends."""

    def __init__(self, values: Sequence[float]):
        self.low, self.high = min(values) / 1.15, max(values) * 1.15

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """The numbers 1, 2 and 5 times a power of ten that lie on it."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
