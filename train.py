"""Train a velocity refiner for a trained SiT, or a SiT itself, on a folder of images.

Usage:
  torchrun --nnodes=1 --nproc_per_node=1 train.py --data-path DIR --model-teacher-ckpt predictor.pt
  python train.py --target predictor --data-path DIR --model SiT-B/2      # one process needs no torchrun
  python train.py --recipe endpoint --schedule M4R1 --refiner-step midpoint --model-teacher-ckpt FILE   # no images
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from flowturbo.system import cli
from flowturbo.system.files import exclusive
from flowturbo.training.options import KINDS, TrainingOptions
from flowturbo.training.stopping import EXIT_STOPPED, StopRequest


def parse(argv: Sequence[str] | None = None) -> TrainingOptions:
    """The options on a command line. Raises ValueError for impossible ones."""
    what, *groups = cli.parse(cli.new_parser(__doc__), argv, KINDS)
    return TrainingOptions(what.target, *groups)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)

    import torch

    from flowturbo.system.distributed import world
    from flowturbo.training.build import described, load_frozen, new_model, notes_on, open_data
    from flowturbo.training.log import RunLog
    from flowturbo.training.objective import make_objective
    from flowturbo.training.resume import begin

    with world(options.hardware.device) as ranks, StopRequest(options.optimisation.max_hours) as stop:
        torch.manual_seed(options.optimisation.seed)  # the initial weights; all else is keyed by sample number
        if options.optimisation.exact and ranks.device.type == "cpu":
            torch.set_num_threads(1)  # a split of the work over threads changes the last bits
        frozen = load_frozen(options, ranks.device)
        data = open_data(options, frozen)
        model = new_model(options, frozen, data).to(ranks.device)
        run = begin(options, ranks, frozen, model, data)
        objective = make_objective(options, frozen, model, data)
        loader = run.loader(data, objective)
        first, total = run.state.step, run.optimisation.steps
        with (
            exclusive(run.folder, patience=20) if ranks.is_main else nullcontext(),  # a killed run's workers linger
            RunLog(run.folder if ranks.is_main else None, total, first) as log,
        ):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            log.say(f"{options.target}: {trained:,} parameters, {described(data)}")
            for note in notes_on(data):
                log.say(f"note: {note}")
            log.say(f"{ranks.size} x {ranks.device}, {frozen.dtype}, steps {first} to {total}, writing to {run.folder}")
            run.fit(loader, objective, stop, log)
            ranks.barrier()
            if run.is_done:
                log.say(f"done: {run.folder}")
                return
            why = stop.signal or ("the time limit" if stop.late else "another rank's signal")
            log.say(f"stopped by {why} after step {run.state.step}; go on with the same command and --resume auto")
        if not stop.late:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    cli.run_script(main)
