"""FlowTurbo for text-to-image pipelines of diffusers: SD3, FLUX, Lumina2, Sana, InstaFlow and others.

Usage:
  python text_to_image.py sample --pipeline DIR "a red fox" --schedule A8
  python text_to_image.py compare --pipeline DIR "a red fox" --schedule Euler8 A8 M8 H1P5R2 --refiner DIR
  python text_to_image.py benchmark --pipeline DIR --refiner DIR "a red fox"
  python text_to_image.py train --pipeline DIR --data-path CAPTIONED_IMAGES
  python text_to_image.py train --pipeline DIR --recipe endpoint --prompts FILE --schedule H1P4R2
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.text_to_image.options import (
    KINDS,
    CompilationOptions,
    MeasureOptions,
    PromptOptions,
    TextSamplingOptions,
    TextTrainingOptions,
)
from flowturbo.training.stopping import EXIT_STOPPED, StopRequest

if TYPE_CHECKING:
    from flowturbo.text_to_image.comparison import Measured

# What the paper compares on text-to-image pipelines (its table 2), and rows that need no refiner beside them: L in the
# place of R, and Adams-Bashforth and midpoints of as many evaluations of the network.
PAIRS = (("H5", "H1P4R2"), ("H8", "H1P6R3"))
BESIDE = ("H1P4L2", "H1P6L3", "A6", "A8", "M5", "M7")


def sample(argv: Sequence[str]) -> None:
    """Sample images of prompts, a row for each schedule."""
    what, options = _parse(sample, argv)
    rows = _measure(what, options, MeasureOptions(reference=None))
    _save(what, rows)


def compare(argv: Sequence[str]) -> None:
    """Schedules and solvers side by side, from the same noise: time, and the distance from a fine solution."""
    what, options, how = _parse(compare, argv, {"measurement": MeasureOptions})
    _save(what, _measure(what, options, how))


def benchmark(argv: Sequence[str]) -> None:
    """The paper's comparison on a pipeline like for like, eager and compiled, with rows that need no refiner beside;
    --schedule adds rows, such as learned solvers. Each row has its numerical error beside its time."""
    more = {"measurement": MeasureOptions, "networks": CompilationOptions}
    what, options, how, networks = _parse(benchmark, argv, more, repetitions=5, schedule=())

    from flowturbo.text_to_image.comparison import ratios

    names = [name for pair in PAIRS for name in pair if options.refiner or "R" not in name]
    what = replace(what, schedule=(*names, *BESIDE, *what.schedule))
    for compiled in (False, True) if networks.compiled else (False,):
        print("compiled" if compiled else "eager")
        rows = _measure(what, replace(options, compile=compiled), how)
        print("\n".join(ratios(rows, PAIRS)))
    _save(what, rows)


def train(argv: Sequence[str]) -> None:
    """Train a refiner for a pipeline on captioned images or on prompts alone, or the pipeline's network itself."""
    (*groups,) = cli.parse(_parser(train), argv, KINDS, sample_every=0, note="t2i")
    options = TextTrainingOptions(*groups)

    from flowturbo.text_to_image import training

    with StopRequest(options.optimisation.max_hours) as stop:
        _, done = training.train(options, stop)
    if not done and not stop.late:
        sys.exit(EXIT_STOPPED)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command for command in (sample, compare, benchmark, train)
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = cli.new_parser(__doc__, "text_to_image.py COMMAND --help tells of each.")
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.parse_args(arguments)


def _parser(command: Callable[..., None]) -> cli.Parser:
    parser = cli.new_parser(command.__doc__)
    parser.prog += f" {command.__name__}"
    return parser


def _parse(command: Callable[..., None], argv: Sequence[str], more: dict[str, type] | None = None, **defaults: Any):
    kinds = {"what to sample": PromptOptions, "sampling": TextSamplingOptions, **(more or {})}
    return cli.parse(_parser(command), argv, kinds, **defaults)


def _measure(what: PromptOptions, options: TextSamplingOptions, how: MeasureOptions) -> list[Measured]:
    """Sample every row and tell of it."""
    prompts = what.all_prompts()
    check_writable(what.out)

    from flowturbo.networks.precision import pick_precision
    from flowturbo.system.distributed import pick_device
    from flowturbo.text_to_image.comparison import measure
    from flowturbo.text_to_image.refined import FlowRefiner
    from flowturbo.text_to_image.sampling import Row, TextSampler, open_pipeline

    rows = [Row.parse(text) for text in what.schedule]
    device = pick_device(options.device)
    pipe = open_pipeline(options, device, pick_precision(options.precision, device))
    refiner = FlowRefiner.from_pretrained(options.refiner) if options.refiner else None
    samplers = [TextSampler(pipe, row, options, refiner) for row in rows]
    reference = TextSampler(pipe, Row.parse(how.reference), options) if how.reference else None
    found = measure(
        samplers, options.seed, prompts, options.batch_size, repetitions=how.repetitions, reference=reference
    )
    for row in found:
        print(row.line())
    return found


def _save(what: PromptOptions, rows: Sequence[Measured]) -> None:
    from flowturbo.data.pictures import grid, save_png

    save_png(Path(what.out), grid([row.images for row in rows], [row.line() for row in rows]))
    print(f"saved {what.out}")


if __name__ == "__main__":
    cli.run_script(main)
