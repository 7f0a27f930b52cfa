"""Train a velocity refiner for a trained SiT, or a SiT itself, on a folder of images.

Usage:
  torchrun --nnodes=1 --nproc_per_node=1 train.py --data-path DIR --model-teacher-ckpt predictor.pt
  python train.py --target predictor --data-path DIR --model SiT-B/2      # one process needs no torchrun
  python train.py --recipe endpoint --schedule M4R1 --refiner-step midpoint --model-teacher-ckpt FILE   # no images
  python train.py --data-path DIR --check-data                            # every image, before anything is trained

Exit codes: 0 done, 75 stopped by a signal or --max-hours and saved (run it again with --resume auto), 1 what went well
cannot go on (the loss is not finite, an image has turned bad; saved where that is right), 2 wrong input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flowturbo.system import cli
from flowturbo.training.options import KINDS, TrainingOptions
from flowturbo.training.stopping import EXIT_STOPPED, StopRequest


def parse(argv: Sequence[str] | None = None) -> TrainingOptions:
    """The options on a command line. Raises ValueError for impossible ones."""
    what, *groups = cli.parse(cli.new_parser(__doc__), argv, KINDS)
    return TrainingOptions(what.target, *groups)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)

    import torch

    from flowturbo.networks.compiled import check_compiler
    from flowturbo.system.distributed import world
    from flowturbo.training.build import load_frozen, look_at, new_model, open_data, report_on
    from flowturbo.training.objective import make_objective
    from flowturbo.training.resume import begin

    if options.data.check_data:
        return report_on(options)
    with world(options.hardware.device) as ranks, StopRequest(options.optimisation.max_hours) as stop:
        torch.manual_seed(options.optimisation.seed)  # the initial weights; all else is keyed by sample number
        if options.optimisation.exact and ranks.device.type == "cpu":
            torch.set_num_threads(1)  # a split of the work over threads changes the last bits
        frozen = load_frozen(options, ranks.device)
        data = open_data(options, frozen)
        notes = ranks.agree(lambda: look_at(data))
        model = new_model(options, frozen, data).to(ranks.device)
        if options.hardware.compile:
            ranks.agree(lambda: check_compiler(ranks.device))
        with begin(options, ranks, frozen, model, data) as run:
            done = run.execute(data, make_objective(options, frozen, model, data), stop, notes)
    if not done:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    cli.run_script(main)
