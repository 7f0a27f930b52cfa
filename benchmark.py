"""Measure this device: sampling by every schedule of the paper, what each optimisation brings, and training.

Usage:
  python benchmark.py                          # FlowTurbo and the released code's way, eager and compiled
  python benchmark.py --json bench.json --plot bench.png
  python benchmark.py --ablate --batch-sizes 2 # one optimisation at a time, and what compiling takes
  python benchmark.py --train                  # steps of refiner training, and where their time goes
  python benchmark.py --train --ranks 2        # steps of predictor training, beside DistributedDataParallel
  python benchmark.py --startup                # how long --help and imports take
  python benchmark.py --quality --cfg-scale 1  # samplers of a trained model at equal evaluations, with their errors

Weights are random, but for --quality: speed does not depend on them. All variants run in turn in one process, on the
same inputs. On a CPU the defaults are small (3 blocks, one image, three schedules) and one thread is timed by its
process time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.options import BenchmarkOptions, QualityOptions, plan_of
from flowturbo.system import cli
from flowturbo.system.files import check_writable


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"what to measure": BenchmarkOptions, "--quality": QualityOptions}
    options, quality = cli.parse(cli.new_parser(__doc__), argv, kinds)
    for file in filter(None, (options.json, options.plot)):
        check_writable(file)
    if options.startup:
        figures = startup_figures()
    elif options.quality:
        figures = quality_figures(options, quality)
    else:
        figures = device_figures(options)
    if options.json:
        from flowturbo.system.claims import write_record

        write_record(options.json, figures)


def startup_figures() -> dict[str, Any]:
    """Measure how long things take to start."""
    from benchmarks import startup

    return {"rows": [asdict(row) for row in startup.measure()]}


def quality_figures(options: BenchmarkOptions, what: QualityOptions) -> dict[str, Any]:
    """Measure samplers of a trained model."""
    import torch

    from benchmarks import quality
    from benchmarks.measure import describe
    from flowturbo.system.distributed import pick_device

    device = pick_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    for line in describe(device):
        print(line)
    rows = quality.measure(what, options)
    settings = {**asdict(options), **asdict(what), "device": describe(device)}
    return {"settings": settings, "rows": [asdict(row) for row in rows]}


def device_figures(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure what the options ask for, printing tables; all figures as JSON types."""
    import torch

    from benchmarks.measure import describe, roofline

    plan = plan_of(options)
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    else:
        torch.set_num_threads(options.threads)
    best = roofline(plan.device, plan.dtype)
    for line in (*describe(plan.device), str(plan)):
        print(line)
    print(f"roofline: {best.matmul / 1e12:.3g} TFLOP/s in matrix products, {best.copy / 1e9:.3g} GB/s in copies\n")
    if options.train and options.ranks > 1:
        from benchmarks import reduction

        rows = [asdict(row) for row in reduction.measure(plan, options.ranks, options.threads)]
    elif options.train:
        from benchmarks import training

        rows = [asdict(row) for row in training.measure(plan)]
    elif options.ablate:
        from benchmarks import ablation

        rows = [asdict(row) for row in ablation.measure(plan)]
    else:
        from benchmarks import sampling
        from benchmarks.report import plot, ratios
        from flowturbo.data.pictures import save_png

        measured = sampling.measure(plan, best)
        rows = [{**asdict(row), "ratios": ratios(row, measured)} for row in measured]
        if options.plot:
            save_png(options.plot, plot(measured))
            print(f"saved {options.plot}")
    settings = {**asdict(options), "device": describe(plan.device), "plan": str(plan)}
    return {"settings": settings, "roofline": asdict(best), "rows": rows}


if __name__ == "__main__":
    cli.run_script(main, prints_result=True)
