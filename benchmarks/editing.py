"""Editing measured on real images: round trips to noise and back, changes of class, and inpainting.

Usage:
  python -m benchmarks.editing                                     # digits of scikit-learn, and their model
  python -m benchmarks.editing --model colour --data-path FOLDER --num-images 256 --json editing.json

The class of a picture is told by a classifier that has not seen the image it was made of. Changes and errors are root
mean squares over pixels in [-1, 1]; ± is a standard error over the images, and for the Fréchet distance (FD) a
bootstrap's: both for itself, and for how much more it is than that of a fine solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions
from flowturbo.sampling.solvers import parse_schedule
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option
from flowturbo.transport.blocks import BLOCKS
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.solver import Solver

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.judges import Data, Mean
    from flowturbo.sampling.generate import Networks
    from flowturbo.transport import FlowTurbo

# Every block that needs no refiner, alone; what stands in for the first blocks follows from the table.
SOLVERS = tuple(letter for letter, block in BLOCKS.items() if block.leads and not block.evaluations("refiner"))
TABLES = ("round-trips", "class-changes", "inpainting")


@dataclass(frozen=True)
class EditingOptions:
    """What to measure. Raises ValueError for impossible values."""

    data_path: str | None = option(None, "one folder of images per class (default: digits)", metavar="DIR")
    tables: tuple[str, ...] = option(TABLES, f"which of {', '.join(TABLES)}", metavar="TABLE")
    num_images: int = option(500, "images edited, from the whole data")
    solvers: tuple[str, ...] = option(
        SOLVERS, "blocks, each alone in a schedule of so many evaluations, and solver files", metavar="BLOCK"
    )
    evaluations: tuple[int, ...] = option((6, 8, 12), "one way, for round trips and inpainting", metavar="N")
    change_with: str = option("P", "block that changes classes", metavar="BLOCK")
    change_evaluations: int = option(14, "for changes of class, both ways and both classes counted")
    strengths: tuple[float, ...] = option((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "of changes of class", metavar="S")
    cfg_scale: float = option(1.0, "guidance, but for inversion")
    fine: str = option("H64", "schedule of the solution that inpainting is compared with", metavar="SCHEDULE")
    bootstrap: int = option(20, "resamples for the error of FD")
    batch_size: int = option(256, "images at once")
    json: str | None = option(None, "also write the figures here", metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("num_images", "change_evaluations", "bootstrap", "batch_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2")
        if self.change_with not in SOLVERS:
            raise ValueError(f"block {self.change_with!r} is not one of {', '.join(SOLVERS)}")
        for text in self.solvers:
            if text not in SOLVERS and parse_schedule(text).has_refiner:
                raise ValueError(f"{text!r} needs a refiner: expected {', '.join(SOLVERS)}, or a solver file")
        for name in self.tables:
            if name not in TABLES:
                raise ValueError(f"table {name!r} is not one of {', '.join(TABLES)}")
        if not all(0 < strength <= 1 for strength in self.strengths):
            raise ValueError("strengths must lie in (0, 1]")
        if Schedule.parse(self.fine).has_refiner:
            raise ValueError(f"the fine solution {self.fine} needs a refiner: expected a schedule without R")


@dataclass
class Row:
    """One line of one table: its columns by name."""

    table: str
    name: str
    evaluations: int
    figures: dict[str, Mean]


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"what to measure": EditingOptions, "networks": NetworkOptions}
    defaults: dict[str, Any] = {"predictor_ckpt": "digits-predictor.pt", "vae_ckpt": "none"}
    options, network_options = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS, **defaults)
    if options.json:
        check_writable(options.json)

    import torch

    from benchmarks.judges import read_data
    from flowturbo.sampling.generate import find_files, load_networks
    from flowturbo.system.claims import write_record

    networks = load_networks(network_options, find_files(network_options, False))
    data = read_data(options.data_path, options.num_images, networks)
    print(f"{len(data.edited)} of {len(data.images)} images, {len(data.labels.unique())} classes")
    rows: list[Row] = []
    with torch.no_grad():
        for name, measure in zip(TABLES, (round_trips, class_changes, inpainting)):
            if name in options.tables:
                made = list(measure(options, networks, data))
                print("\n" + table(made), flush=True)
                rows += made
    if options.json:
        write_record(options.json, {"settings": asdict(options), "rows": [asdict(row) for row in rows]})


def schedule_of(letter: str, evaluations: int) -> Schedule | None:
    """The schedule of one kind of block with so many evaluations; None where no number of blocks has them."""
    fits = (Schedule(letter * n) for n in range(1, evaluations + 1))
    return next((each for each in fits if each.evaluations()[0] == evaluations), None)


def compared(options: EditingOptions) -> Iterator[Schedule | Solver]:
    """The schedules and solvers that are compared."""
    for text in options.solvers:
        if text not in SOLVERS:
            yield parse_schedule(text)
            continue
        for evaluations in options.evaluations:
            if (schedule := schedule_of(text, evaluations)) is not None:
                yield schedule


def sampler_of(networks: Networks, schedule: Schedule | Solver, cfg_scale: float) -> FlowTurbo:
    """A sampler of states in pixels, guided on all channels."""
    from flowturbo.transport import PATHS, FlowTurbo, Guidance

    guidance = Guidance(cfg_scale, "all")
    return FlowTurbo(networks.predictor, None, schedule, guidance, path=PATHS[networks.path_type or "linear"])


def in_batches(options: EditingOptions, networks: Networks, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The function of all rows, computed in batches on the device; the result on the CPU."""
    import torch

    parts = zip(*(each.split(options.batch_size) for each in rows))
    return torch.cat([function(*(part.to(networks.device) for part in each)).cpu() for each in parts])


def round_trips(options: EditingOptions, networks: Networks, data: Data) -> Iterator[Row]:
    """To noise and back along the image's own class, without guidance: the error relative to the image."""
    from benchmarks.judges import mean_of
    from flowturbo.data.pictures import from_uint8

    images, labels = from_uint8(data.images[data.edited])[:200], data.labels[data.edited][:200]
    for schedule in compared(options):
        sampler = sampler_of(networks, schedule, 1.0)
        back = sampler.over(*reversed(sampler.path.interval))
        noise = in_batches(options, networks, back.sample, images, labels)
        made = in_batches(options, networks, sampler.sample, noise, labels)
        errors = (made - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
        yield Row("round trip", str(schedule), schedule.evaluations()[0], {"relative error": mean_of(errors)})


def class_changes(options: EditingOptions, networks: Networks, data: Data) -> Iterator[Row]:
    """Every method at several strengths, at equal evaluations: is the picture of the new class, and how far is it.

    Above them what the classifier says of the images as they are: how many are of their own class, and of the new one.
    """
    from benchmarks.judges import Classifier, background, change, mean_of
    from flowturbo.data.pictures import from_uint8, to_uint8
    from flowturbo.data.randomness import keyed_noise
    from flowturbo.sampling.editing import change_by_inversion
    from flowturbo.transport.editing import Source, start_of

    counts = options.change_evaluations // 2, options.change_evaluations
    half, whole = (schedule_of(options.change_with, n) for n in counts)
    if half is None or whole is None:
        raise ValueError(f"{options.change_with} blocks do not make {options.change_evaluations} evaluations and half")
    images, own = from_uint8(data.images[data.edited]), data.labels[data.edited]
    behind = background(data.images)[data.edited]
    noise = keyed_noise(0, range(len(images)), images.shape[1:])
    inverter = sampler_of(networks, half, 1.0)
    end = inverter.path.interval[1]
    classify = Classifier(data)

    def sdedit(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return sampler.over(start, end).edit(new, Source(x, noise))

    def invert(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return change_by_inversion(inverter, sampler, old, new, Source(x, noise), start)

    def flowedit(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return sampler.over(start, end).edit(new, Source(x, noise, labels=old))

    def judged(shown: Tensor) -> dict[str, Mean]:
        found = classify(shown)
        return {
            "new class": mean_of((found == data.targets).float()),
            "old class": mean_of((found == own).float()),
            "change": change(shown, images),
            "of the background": change(shown, images, behind),
        }

    yield Row("change of class", "the images as they are", 0, judged(images))
    for method, schedule in ((sdedit, whole), (invert, half), (flowedit, half)):
        sampler = sampler_of(networks, schedule, options.cfg_scale)
        for strength in options.strengths:
            start = start_of(strength, sampler.path)
            made = in_batches(options, networks, method, images, noise, own, data.targets)
            name = f"{method.__name__} {schedule}, strength {strength:g}"
            yield Row("change of class", name, options.change_evaluations, judged(from_uint8(to_uint8(made))))


def inpainting(options: EditingOptions, networks: Networks, data: Data) -> Iterator[Row]:
    """Half of every image anew: the error there against a fine solution from the same noise, and FD to the data."""
    import torch

    from benchmarks.judges import Distances, change, with_error
    from flowturbo.data.pictures import from_uint8, to_uint8
    from flowturbo.data.randomness import keyed_noise
    from flowturbo.transport.editing import Source

    images, labels = from_uint8(data.images[data.edited]), data.labels[data.edited]
    noise = keyed_noise(0, range(len(images)), images.shape[1:])
    side = images.shape[-1]
    half = torch.arange(side) < side // 2
    halves = torch.stack([half.expand(side, side), ~half.expand(side, side), half[:, None].expand(side, side)])
    masks = halves[torch.arange(len(images)) % len(halves), None].float()  # left, right or upper half
    distances = Distances(data, options.bootstrap)

    def completed(schedule: Schedule | Solver) -> Tensor:
        sampler = sampler_of(networks, schedule, options.cfg_scale)
        edit = lambda x, noise, mask, y: sampler.edit(y, Source(x, noise, mask))  # noqa: E731
        return in_batches(options, networks, edit, images, noise, masks, labels)

    fine = Schedule.parse(options.fine)
    exact = completed(fine)
    least = distances(from_uint8(to_uint8(exact)))
    for schedule in [*compared(options), fine]:
        made = exact if schedule is fine else completed(schedule)
        found = distances(from_uint8(to_uint8(made)))
        distance = {"FD": with_error(found), f"more than {fine}": with_error(found - least)}
        figures = {"error in the mask": change(made, exact, masks), **distance}
        yield Row("inpainting", str(schedule), schedule.evaluations()[0], figures)


def table(rows: Sequence[Row]) -> str:
    """Rows of one table, with their columns' names above."""
    width = max(len(text) for text in (rows[0].table, *(row.name for row in rows))) + 2
    names = list(rows[0].figures)
    lines = [f"{rows[0].table:<{width}}{'evaluations':>12}" + "".join(f"{name:>20}" for name in names)]
    for row in rows:
        lines.append(f"{row.name:<{width}}{row.evaluations:>12}" + "".join(f"{row.figures[n]!s:>20}" for n in names))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run_script(main)
