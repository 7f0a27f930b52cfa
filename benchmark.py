"""Measure this device: sampling by every schedule of the paper, what each optimisation brings, and training.

Usage:
  python benchmark.py                          # FlowTurbo and the released code's way, eager and compiled
  python benchmark.py --json bench.json --plot bench.png
  python benchmark.py --ablate --batch-sizes 2 # one optimisation at a time, and what compiling takes
  python benchmark.py --train                  # steps of refiner training, and where their time goes
  python benchmark.py --train --ranks 2        # steps of predictor training, beside DistributedDataParallel
  python benchmark.py --startup                # how long --help and imports take
  python benchmark.py --quality --cfg-scale 1  # samplers of a trained model at equal evaluations, with their errors
  python benchmark.py --reproduce              # the paper's table anew; its flags: --reproduce --help
  python benchmark.py --reproduce --num-samples 1000 --schedules H8 H1P5R3

Weights are random, but for the last two: speed does not depend on them. All variants run in turn in one process, on the
same inputs. On a CPU the defaults are small (3 blocks, one image, three schedules) and one thread is timed by its
process time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.options import BenchmarkOptions, QualityOptions, ReproduceOptions, plan_of
from flowturbo.system import cli
from flowturbo.system.claims import write_record
from flowturbo.system.files import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    if "--reproduce" in cli.hyphenate(argv):
        return reproduce(argv)
    kinds = {"what to measure": BenchmarkOptions, "--quality": QualityOptions}
    options, quality = cli.parse(cli.new_parser(__doc__), argv, kinds)
    for file in filter(None, (options.json, options.plot)):
        check_writable(file)
    record = Record(options.json)
    if options.startup:
        startup_figures(record)
    elif options.quality:
        quality_figures(options, quality, record)
    else:
        device_figures(options, record)
    record.finish()


def reproduce(argv: Sequence[str] | None) -> None:
    """Measure the paper's figures anew, with the public weights."""
    (options,) = cli.parse(cli.new_parser(__doc__), argv, {"--reproduce": ReproduceOptions})

    from benchmarks.reproduce import run

    run(options)


@dataclass
class Record:
    """The figures so far, in a JSON file that is whole whenever it is read: "complete" says whether they are all."""

    path: str | None
    head: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, rows: list[dict[str, Any]], complete: bool = False) -> None:
        """Write these rows in place of those before."""
        self.rows = rows
        if self.path:
            write_record(self.path, {**self.head, "complete": complete, "rows": rows})

    def finish(self) -> None:
        """Write that the rows are all there."""
        self.keep(self.rows, complete=True)


def startup_figures(record: Record) -> None:
    """Measure how long things take to start."""
    from benchmarks import startup

    startup.measure(record.keep)


def quality_figures(options: BenchmarkOptions, what: QualityOptions, record: Record) -> None:
    """Measure samplers of a trained model."""
    import torch

    from benchmarks import quality
    from benchmarks.measure import describe, roofline
    from flowturbo.networks.precision import pick_precision
    from flowturbo.system.distributed import pick_device

    device = pick_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    best = roofline(device, pick_precision(options.precision, device))
    for line in (*describe(device), str(best)):
        print(line)
    settings = {**asdict(options), **asdict(what), "device": describe(device)}
    record.head = {"settings": settings, "roofline": asdict(best)}
    quality.measure(what, options, record.keep)


def device_figures(options: BenchmarkOptions, record: Record) -> None:
    """Measure what the options ask for, printing tables."""
    import torch

    from benchmarks.measure import describe, roofline

    plan = plan_of(options)
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    else:
        torch.set_num_threads(options.threads)
    best = roofline(plan.device, plan.dtype)
    for line in (*describe(plan.device), str(plan), str(best)):
        print(line, flush=True)
    settings = {**asdict(options), "device": describe(plan.device), "plan": str(plan)}
    record.head = {"settings": settings, "roofline": asdict(best)}
    if options.train and options.ranks > 1:
        from benchmarks import reduction

        record.keep([asdict(row) for row in reduction.measure(plan, options.ranks, options.threads)])
    elif options.train:
        from benchmarks import training

        training.measure(plan, best, record.keep)
    elif options.ablate:
        from benchmarks import ablation

        ablation.measure(plan, best, record.keep)
    else:
        from benchmarks import sampling
        from benchmarks.report import plot
        from flowturbo.data.pictures import save_png

        rows = sampling.measure(plan, best, record.keep)
        if options.plot:
            save_png(options.plot, plot(rows))
            print(f"saved {options.plot}")


if __name__ == "__main__":
    cli.run_script(main, prints_result=True)
