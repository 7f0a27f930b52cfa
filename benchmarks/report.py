"""Tables, the paper's figures beside ours, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from benchmarks.variants import FLOAT32, Error

# The Heun schedule of about the same FID (FlowTurbo, tables 1 and 2); for H1P5R3, 3.93 against 3.68, the nearest.
HEUN_OF = {"H1P5R3": "H8", "H2P4R2": "H8", "H2P8R2": "H11", "H5P7R3": "H15", "H8P9R5": "H24"}
# ms per image on an A800 at batch 8 with decode: Heun not compiled, FlowTurbo compiled.
PAPER = {
    **{"H8": 89.4, "H11": 117.8, "H15": 154.8, "H24": 240.6},
    **{"H1P5R3": 38.3, "H2P4R2": 41.6, "H2P8R2": 55.2, "H5P7R3": 72.5, "H8P9R5": 100.3},
}


@dataclass
class Row:
    """One variant on one schedule. Times are milliseconds per image, errors against eager float32 of the same run."""

    variant: str
    schedule: str
    batch_size: int
    decode: bool
    ms: float
    p10: float
    p90: float
    rounds: int
    tflops: float  # TFLOP/s
    of_peak: float  # of the measured matrix rate
    of_kernels: float | None  # of the speed that the bare kernels would have; they are measured in the plan's type
    predictor_ms: float | None  # None where it is lost in the noise
    refiner_ms: float | None
    decode_ms: float
    memory: int  # bytes at the peak
    first_call: float  # seconds
    error: Error

    @property
    def compiled(self) -> bool:
        return self.variant.endswith("compiled")


def partner(row: Row, rows: Sequence[Row], variant: str, schedule: str | None) -> Row | None:
    """The row of another variant or schedule under the same conditions."""
    return next(
        (
            r
            for r in rows
            if (r.variant, r.schedule, r.batch_size, r.decode) == (variant, schedule, row.batch_size, row.decode)
        ),
        None,
    )


def ratios(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """How many times faster than: Heun at about equal quality in the same variant ("heun"), eager Heun where the
    row is compiled ("mixed", as the paper divides), the released code in its own setting, eager beside eager and
    compiled beside compiled ("released"), and in float32 ("float32")."""
    heun, ours = HEUN_OF.get(row.schedule), row.variant.startswith("FlowTurbo")
    others = {
        "heun": partner(row, rows, row.variant, heun),
        "mixed": partner(row, rows, row.variant.removesuffix(" compiled"), heun) if row.compiled else None,
        "released": partner(row, rows, row.variant.replace("FlowTurbo", "released"), row.schedule) if ours else None,
        "float32": partner(row, rows, FLOAT32, row.schedule) if row.variant != FLOAT32 else None,
    }
    return {name: other.ms / row.ms for name, other in others.items() if other is not None}


def tables(rows: Sequence[Row]) -> str:
    """The rows of one batch size, with or without decode, as text: their speed, what it is made of, the headline."""
    head = (
        f"{'variant':<19}{'schedule':<9}{'ms/img':>9}{'p10':>9}{'p90':>9}{'x rel.':>7}{'x f32':>7}{'x Heun':>7}"
        f"{'accel':>7}{'mixed':>7}{'first s':>8}{'rms err':>9}{'max err':>9}"
    )
    speed = [head, "-" * len(head)]
    head = f"{'variant':<19}{'schedule':<9}{'TFLOP/s':>9}{'% peak':>7}{'% kern':>7}"
    head += f"{'pred ms':>9}{'ref ms':>8}{'dec ms':>8}{'GB':>6}"
    made = [head, "-" * len(head)]
    for row in rows:
        than = ratios(row, rows)
        acceleration = f"{100 * (1 - 1 / than['heun']):.0f} %" if "heun" in than else ""
        speed.append(
            f"{row.variant:<19}{row.schedule:<9}{row.ms:>9.2f}{row.p10:>9.2f}{row.p90:>9.2f}"
            f"{_times(than, 'released')}{_times(than, 'float32')}{_times(than, 'heun')}{acceleration:>7}"
            f"{_times(than, 'mixed')}{row.first_call:>8.1f}{row.error.rms:>9.1e}{row.error.largest:>9.1e}"
        )
        kernels = None if row.of_kernels is None else 100 * row.of_kernels
        made.append(
            f"{row.variant:<19}{row.schedule:<9}{row.tflops:>9.3g}{100 * row.of_peak:>7.0f}{_known(kernels, 7, 0)}"
            f"{_known(row.predictor_ms, 9)}{_known(row.refiner_ms, 8)}{row.decode_ms:>8.2f}{row.memory / 1e9:>6.1f}"
        )
    return "\n".join([*speed, "", *made, "", headline(rows)]).rstrip()


def headline(rows: Sequence[Row]) -> str:
    """FlowTurbo beside the released code in its own setting of the device, eager and compiled, a line a schedule."""
    lines = []
    for schedule in dict.fromkeys(row.schedule for row in rows):
        ours = {row.variant: ratios(row, rows) for row in rows if row.schedule == schedule}
        times = [
            f"{ours[variant]['released']:.2f} times its {state}"
            for variant, state in (("FlowTurbo", "eager"), ("FlowTurbo compiled", "compiled"))
            if "released" in ours.get(variant, {})
        ]
        if times:
            lines.append(f"{schedule}: against the released code in the same precision {', '.join(times)} speed")
    return "\n".join(lines)


LEGEND = """x rel.: against the released code in its own setting (autocast where the precision is half), eager beside
eager, compiled beside compiled. x f32: against it in float32. x Heun, accel: against the Heun schedule of about equal
FID in the same variant (for H1P5R3 the nearest: 3.93 against 3.68). mixed: compiled against eager Heun, as the paper
divides; not a fair ratio. first s: the first call, whose graphs later schedules share. Errors against eager float32.
% peak: of the measured rate of matrix products. % kern: of the speed of the blocks' bare kernels, and of the decoder
as it is. pred, ref, dec: ms of predictor, refiner and decoder, measured apart by how much more blocks add; -: lost in
the noise. GB: the weights, and what the call holds at its peak."""


def against_paper(rows: Sequence[Row]) -> str:
    """Acceleration of FlowTurbo's schedules over Heun: the paper's, and ours mixed as theirs, and like with like."""
    head = f"{'schedule':<9}{'against':<8}{'paper ms':>9}{'mixed':>7} |{'ours ms':>9}{'mixed':>7}"
    head += f"{'compiled':>9}{'eager':>7}"
    title = "acceleration in %; paper: A800, batch 8 with decoding, mixed: Heun eager (H8 compiled: 68.0 ms)"
    lines = [title, head]
    for row in rows:
        than = ratios(row, rows)
        if row.variant != "FlowTurbo compiled" or "mixed" not in than:
            continue
        heun = HEUN_OF[row.schedule]
        eager = partner(row, rows, "FlowTurbo", row.schedule)
        parts = {
            "paper": PAPER[heun] / PAPER[row.schedule],
            **than,
            "eager": ratios(eager, rows)["heun"] if eager is not None else float("nan"),
        }
        percent = {name: f"{100 * (1 - 1 / value):.0f}" for name, value in parts.items()}
        lines.append(
            f"{row.schedule:<9}{heun:<8}{PAPER[row.schedule]:>9.1f}{percent['paper']:>7} |"
            f"{row.ms:>9.2f}{percent['mixed']:>7}{percent['heun']:>9}{percent['eager']:>7}"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def _known(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _times(than: dict[str, float], name: str) -> str:
    return f"{than[name]:>7.2f}" if name in than else " " * 7


COLORS = {
    FLOAT32: "#dfe4ec",
    "released": "#b8c4d6",
    "released compiled": "#6d84a8",
    "FlowTurbo": "#f3c19a",
    "FlowTurbo compiled": "#d9661f",
    "predictor": "#d9661f",
    "refiner": "#2f7d5b",
    "decoder": "#6d84a8",
    "other": "#cccccc",
}


def plot(rows: Sequence[Row]) -> Image.Image:
    """For each batch size, with and without decoding: latencies by schedule, and of what FlowTurbo's are made."""
    groups = list(dict.fromkeys((row.batch_size, row.decode) for row in rows))
    panels = []
    for batch_size, decode in groups:
        title = f"batch {batch_size}, {'with' if decode else 'without'} decoding"
        panels += _panels([row for row in rows if (row.batch_size, row.decode) == (batch_size, decode)], title)
    canvas = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), "white")
    top = 0
    for panel in panels:
        canvas.paste(panel, (0, top))
        top += panel.height
    return canvas


def _panels(rows: Sequence[Row], title: str) -> list[Image.Image]:
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    latency = [
        (schedule, [(row.variant, row.ms) for row in rows if row.schedule == schedule]) for schedule in schedules
    ]
    parts = [(row.schedule, _shares(row)) for row in rows if row.variant == "FlowTurbo compiled"]
    return [
        _bars(latency, f"{title}: ms per image"),
        _bars(parts, f"{title}: what FlowTurbo compiled spends, ms per image", stacked=True),
    ]


def _shares(row: Row) -> list[tuple[str, float]]:
    """What a row's milliseconds consist of, as far as it is known."""
    known = {"predictor": row.predictor_ms or 0.0, "refiner": row.refiner_ms or 0.0, "decoder": row.decode_ms}
    return [*known.items(), ("other", max(0.0, row.ms - sum(known.values())))]


def _bars(
    groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], title: str, *, stacked: bool = False
) -> Image.Image:
    """Horizontal bars: a group for each label, its values side by side or end to end, with their sum."""
    thick, gap, left, right = 16, 14, 90, 80
    length = 620
    font = ImageFont.load_default(size=14)
    names = list(dict.fromkeys(name for _, values in groups for name, _ in values))
    largest = max((sum(v for _, v in vs) if stacked else max(v for _, v in vs)) for _, vs in groups) or 1.0
    height = 70 + sum((1 if stacked else len(vs)) * thick + gap for _, vs in groups)
    canvas = Image.new("RGB", (left + length + right, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((10, 8), title, fill="black", font=ImageFont.load_default(size=17))
    x = 10
    for name in names:
        draw.rectangle((x, 39, x + 12, 51), fill=COLORS[name])
        draw.text((x + 17, 36), name, fill="black", font=font)
        x += 34 + int(font.getlength(name))
    top = 66
    for label, values in groups:
        draw.text((10, top), label, fill="black", font=font)
        start = float(left)
        for name, value in values:
            end = start + length * value / largest
            draw.rectangle((start, top, max(start, end - 1), top + thick - 2), fill=COLORS[name])
            if stacked:
                start = end
            else:
                draw.text((end + 5, top - 1), f"{value:.3g}", fill="black", font=font)
                top += thick
        if stacked:
            draw.text((start + 5, top - 1), f"{sum(v for _, v in values):.3g}", fill="black", font=font)
            top += thick
        top += gap
    return canvas
