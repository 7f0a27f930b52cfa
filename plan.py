"""Choose how to sample a model: the best schedule for a budget, a solver learned for it, solvers from published tables.

Usage:
  python plan.py --predictor-ckpt FILE --evaluations 8 --cfg-scale 1.5      # or --rows 16, or --budget-ms 40
  python plan.py search --predictor-ckpt FILE --evaluations 6 --cfg-scale 1.5
  python plan.py import TABLES.py
  python sample.py --predictor-ckpt FILE --cfg-scale 1.5 --schedule learned-6-cfg1.5

Each command has its own --help. What is measured is fidelity: the distance of the end points from those of a fine
solution from the same noise. No images are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.planning.options import ImportOptions, PlannerOptions, SearchOptions
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import LearnedSolver, check_solver_path, write_solver
from flowturbo.system import cli
from flowturbo.system.files import check_writable, exclusive, sha256
from flowturbo.transport.guidance import Guidance

if TYPE_CHECKING:
    from flowturbo.planning.search import Found

NETWORKS = {"networks": NetworkOptions, "sampling": SamplingOptions}


def plan(argv: Sequence[str]) -> None:
    """Measure schedules on this device and name the best one within a budget."""
    kinds = {"what to choose from": PlannerOptions, **NETWORKS}
    options, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS, cfg_scale=1.5)
    if options.plot:
        check_writable(options.plot)

    from flowturbo.planning.planner import Planner
    from flowturbo.planning.report import command, front_table, plot

    planner = Planner(options, network_options, sampling)
    print(planner.costs.table())
    front = planner.run()
    print(front_table(front))
    if options.plot:
        plot(options.plot, front, planner.seen)
        print(f"saved {options.plot}")
    print(f"best within {options.budget}: {command(front[-1], network_options, sampling)}")


def search(argv: Sequence[str]) -> None:
    """Learn times and coefficients for a model, a guidance and a number of evaluations; writes a solver file."""
    parser = cli.new_parser(search.__doc__)
    parser.prog += " search"
    kinds = {"search": SearchOptions, **NETWORKS}
    options, network_options, sampling = cli.parse(parser, argv, kinds, MODEL_PRESETS, cfg_scale=1.5)
    name = f"learned-{options.evaluations}-cfg{sampling.cfg_scale:g}"
    out = Path(options.out or f"solvers/{name}.json")
    check_solver_path(out)
    check_writable(out)
    if out.exists():
        raise ValueError(f"solver file {str(out)!r} is there already")

    from flowturbo.planning.search import Search
    from flowturbo.sampling.generate import find_files, load_networks

    files = find_files(network_options, refiner=False)
    networks = load_networks(network_options, files)
    settings = sampling.settings(networks.path_type or "linear")
    digest = sha256(files.predictor)
    state = out.with_suffix(".search.pt")
    with exclusive(out.parent):
        found = Search(networks, settings, options, sampling.seed, state, digest).run()
        made = {"command": "plan.py search", **asdict(options), "seed": sampling.seed, "start": str(found.start)}
        solver = LearnedSolver(
            out.stem, found.solver.grid, found.solver.coefficients, digest, settings.guidance, made, error_of(found)
        )
        write_solver(out, solver)
        state.unlink(missing_ok=True)
    for tested, fidelity in sorted(found.tested.items(), key=lambda item: -item[1].rmse.value):
        print(f"{tested:10}{fidelity}")
    print(f"saved {out}: {found.against_start.value:.2f} times the error of {found.start}")


def error_of(found: Found) -> dict[str, float | int | str]:
    """What a solver file says of the error on the test set."""
    measured = found.tested["learned"]
    rmse, ratio = measured.rmse, found.against_start
    told = {"rmse": rmse.value, "standard_error": rmse.standard_error, "samples": len(measured)}
    return {**told, f"over_{found.start}": ratio.value, "its_standard_error": ratio.standard_error}


def read(argv: Sequence[str]) -> None:
    """Write a solver file for each solver in a published table, in the layout of NeuralSolver; nothing is run."""
    parser = cli.new_parser(read.__doc__)
    parser.prog += " import"
    (options,) = cli.parse(parser, argv, {"import": ImportOptions})

    from flowturbo.planning.tables import read_tables
    from flowturbo.weights.checkpoint import resolve

    digest = None if options.predictor_ckpt is None else sha256(resolve(options.predictor_ckpt))
    guidance = None if options.cfg_scale is None else Guidance(options.cfg_scale)
    made = {"command": "plan.py import", "table": Path(options.table).name}
    solvers: dict[Path, LearnedSolver] = {}
    for name, solver in read_tables(options.table).items():
        name = f"{options.name}-{len(solver)}" if options.name else name
        out = Path(options.out) / f"{name}.json"
        if out in solvers or out.exists():
            raise ValueError(f"solver file {str(out)!r} is there already")
        solvers[out] = LearnedSolver(name, solver.grid, solver.coefficients, digest, guidance, made)
        check_solver_path(out)
    for out, about in solvers.items():
        write_solver(out, about)
        print(f"saved {out}: {len(about)} evaluations")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"search": search, "import": read}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands; without its name, plan."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
    else:
        plan(arguments)


if __name__ == "__main__":
    cli.run_script(main)
