"""Editing measured on real images: round trips to noise and back, changes of class, and inpainting.

Usage:
  python -m benchmarks.editing                                     # digits of scikit-learn, and their model
  python -m benchmarks.editing --model colour --data-path FOLDER --num-images 256 --json editing.json

A picture's class is that of the nearest real image, by pixels. Changes and errors are root mean squares over pixels in
[-1, 1]; ± is a standard error over the images, and for FD, the Fréchet distance between pixels, a bootstrap's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option
from flowturbo.transport.blocks import BLOCKS
from flowturbo.transport.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from flowturbo.evaluation import FeatureSet
    from flowturbo.sampling.generate import Networks
    from flowturbo.transport import FlowTurbo

# Every block that needs no refiner, alone; what stands in for the first blocks follows from the table.
SOLVERS = tuple(letter for letter, block in BLOCKS.items() if block.leads and not block.evaluations("refiner"))


@dataclass(frozen=True)
class EditingOptions:
    """What to measure. Raises ValueError for impossible values."""

    data_path: str | None = option(None, "one folder of images per class (default: digits)", metavar="DIR")
    num_images: int = option(500, "images edited, from the whole data")
    solvers: tuple[str, ...] = option(SOLVERS, "blocks that are compared", metavar="BLOCK")
    evaluations: tuple[int, ...] = option((6, 8, 12), "one way, for round trips and inpainting", metavar="N")
    change_with: str = option("P", "block that changes classes", metavar="BLOCK")
    change_evaluations: int = option(14, "for changes of class, both ways and both classes counted")
    cfg_scale: float = option(1.0, "guidance, but for inversion")
    fine_steps: int = option(64, "Heun steps of the solution that inpainting is compared with")
    bootstrap: int = option(20, "resamples for the error of FD")
    batch_size: int = option(256, "images at once")
    json: str | None = option(None, "also write the figures here", metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("num_images", "change_evaluations", "fine_steps", "bootstrap", "batch_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2")
        for letter in (*self.solvers, self.change_with):
            if letter not in SOLVERS:
                raise ValueError(f"block {letter!r} is not one of {', '.join(SOLVERS)}")


class Mean(NamedTuple):
    """A mean over images, or a distance, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        digits = 3 if self.error >= 0.001 else 4
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


@dataclass
class Row:
    """One line of one table: its columns by name."""

    table: str
    name: str
    evaluations: int
    figures: dict[str, Mean]


class Data(NamedTuple):
    """All real images, uint8 (M, C, H, W), with their labels (M,), and which of them are edited, into what."""

    images: Tensor
    labels: Tensor
    edited: Tensor  # (N,) indices
    targets: Tensor  # (N,) other classes
    statistics: FeatureSet


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"what to measure": EditingOptions, "networks": NetworkOptions}
    defaults: dict[str, Any] = {"predictor_ckpt": "digits-predictor.pt", "vae_ckpt": "none"}
    options, network_options = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS, **defaults)
    if options.json:
        check_writable(options.json)

    import torch

    from flowturbo.sampling.generate import find_files, load_networks
    from flowturbo.system.claims import write_record

    networks = load_networks(network_options, find_files(network_options, False))
    data = read_data(options, networks)
    print(f"{len(data.edited)} of {len(data.images)} images, {len(data.labels.unique())} classes")
    rows: list[Row] = []
    with torch.no_grad():
        for measure in (round_trips, class_changes, inpainting):
            made = list(measure(options, networks, data))
            print("\n" + table(made), flush=True)
            rows += made
    if options.json:
        write_record(options.json, {"settings": asdict(options), "rows": [asdict(row) for row in rows]})


def read_data(options: EditingOptions, networks: Networks) -> Data:
    """The real images, and a choice of them and of other classes that is the same in every run."""
    import numpy as np
    import torch

    channels, classes = networks.predictor.input_shape[0], networks.predictor.num_classes
    if options.data_path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target)
    else:
        from flowturbo.data.folders import ClassFolder

        folder = ClassFolder(options.data_path, networks.image_size, channels, classes)
        images = torch.from_numpy(np.stack([folder.read(k, False)[0] for k in range(len(folder))]))
        labels = torch.tensor(folder.labels)
    random = torch.Generator().manual_seed(0)
    edited = torch.randperm(len(images), generator=random)[: options.num_images]
    others = torch.randint(1, classes, (len(edited),), generator=random)
    return Data(images, labels, edited, (labels[edited] + others) % classes, features("data", images))


def features(source: str, images: Tensor) -> FeatureSet:
    """The pixels of uint8 images and their statistics."""
    from flowturbo.evaluation import FeatureSet
    from flowturbo.evaluation.extractors import PixelExtractor
    from flowturbo.evaluation.statistics import GaussianStatistics

    pool = PixelExtractor()(images.expand(-1, 3, -1, -1)).pool
    statistics = GaussianStatistics(pool.shape[1])
    statistics.update(pool)
    return FeatureSet(source, PixelExtractor.identity, len(pool), pool_statistics=statistics.gaussian(), pool=pool)


def schedule_of(letter: str, evaluations: int) -> Schedule | None:
    """The schedule of one kind of block with so many evaluations; None where no number of blocks has them."""
    fits = (Schedule(letter * n) for n in range(1, evaluations + 1))
    return next((each for each in fits if each.evaluations()[0] == evaluations), None)


def sampler_of(networks: Networks, schedule: Schedule, cfg_scale: float) -> FlowTurbo:
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
    from flowturbo.data.pictures import from_uint8

    images, labels = from_uint8(data.images[data.edited])[:200], data.labels[data.edited][:200]
    for letter in options.solvers:
        for evaluations in options.evaluations:
            if (schedule := schedule_of(letter, evaluations)) is None:
                continue
            sampler = sampler_of(networks, schedule, 1.0)
            back = sampler.over(*reversed(sampler.path.interval))
            noise = in_batches(options, networks, back.sample, images, labels)
            made = in_batches(options, networks, sampler.sample, noise, labels)
            errors = (made - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
            yield Row("round trip", str(schedule), evaluations, {"relative error": mean_of(errors)})


def class_changes(options: EditingOptions, networks: Networks, data: Data) -> Iterator[Row]:
    """Every method at several strengths, at equal evaluations: is the picture of the new class, and how far is it."""
    from flowturbo.data.pictures import from_uint8
    from flowturbo.data.randomness import keyed_noise
    from flowturbo.sampling.editing import change_by_inversion
    from flowturbo.transport.editing import Source, start_of

    counts = options.change_evaluations // 2, options.change_evaluations
    half, whole = (schedule_of(options.change_with, n) for n in counts)
    if half is None or whole is None:
        raise ValueError(f"{options.change_with} blocks do not make {options.change_evaluations} evaluations and half")
    images = from_uint8(data.images[data.edited])
    noise = keyed_noise(0, range(len(images)), images.shape[1:])
    rows = (images, noise, data.labels[data.edited], data.targets)
    inverter = sampler_of(networks, half, 1.0)
    end = inverter.path.interval[1]

    def sdedit(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return sampler.over(start, end).edit(new, Source(x, noise))

    def invert(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return change_by_inversion(inverter, sampler, old, new, Source(x, noise), start)

    def flowedit(x: Tensor, noise: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return sampler.over(start, end).edit(new, Source(x, noise, labels=old))

    for method, schedule in ((sdedit, whole), (invert, half), (flowedit, half)):
        sampler = sampler_of(networks, schedule, options.cfg_scale)
        for strength in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            start = start_of(strength, sampler.path)
            made = in_batches(options, networks, method, *rows)
            name = f"{method.__name__} {schedule}, strength {strength:g}"
            yield Row("change of class", name, options.change_evaluations, judged(made, images, data))


def judged(made: Tensor, images: Tensor, data: Data) -> dict[str, Mean]:
    """The share of the new class, and the change that it took."""
    from flowturbo.data.pictures import from_uint8, to_uint8

    shown = from_uint8(to_uint8(made))
    return {
        "new class": mean_of((nearest_class(shown, data) == data.targets).float()),
        "change": mean_of((shown - images).flatten(1).square().mean(dim=1).sqrt()),
    }


def nearest_class(images: Tensor, data: Data) -> Tensor:
    """The class of the nearest real image."""
    import torch

    from flowturbo.data.pictures import from_uint8

    real = from_uint8(data.images).flatten(1)
    return torch.cat([data.labels[torch.cdist(part, real).argmin(dim=1)] for part in images.flatten(1).split(256)])


def inpainting(options: EditingOptions, networks: Networks, data: Data) -> Iterator[Row]:
    """Half of every image anew: the error there against a fine solution from the same noise, and FD to the data."""
    import torch

    from flowturbo.data.pictures import from_uint8, to_uint8
    from flowturbo.data.randomness import keyed_noise
    from flowturbo.evaluation import evaluate
    from flowturbo.transport.editing import Source

    images, labels = from_uint8(data.images[data.edited]), data.labels[data.edited]
    noise = keyed_noise(0, range(len(images)), images.shape[1:])
    side = images.shape[-1]
    half = torch.arange(side) < side // 2
    halves = torch.stack([half.expand(side, side), ~half.expand(side, side), half[:, None].expand(side, side)])
    masks = halves[torch.arange(len(images)) % len(halves), None].float()  # left, right or upper half

    def completed(schedule: Schedule) -> Tensor:
        sampler = sampler_of(networks, schedule, options.cfg_scale)
        edit = lambda x, noise, mask, y: sampler.edit(y, Source(x, noise, mask))  # noqa: E731
        return in_batches(options, networks, edit, images, noise, masks, labels)

    fine = Schedule("H" * options.fine_steps)
    exact = completed(fine)
    for letter in options.solvers:
        for evaluations in options.evaluations:
            if (schedule := schedule_of(letter, evaluations)) is not None:
                made = completed(schedule)
                square = ((made - exact).square() * masks).flatten(1).sum(dim=1)
                errors = (square / (masks.flatten(1).sum(dim=1) * len(images[0]))).sqrt()
                completions = features("completed", to_uint8(made))
                distance = dict(evaluate(data.statistics, completions, bootstrap=options.bootstrap))["FID"]
                assert distance.value is not None
                assert distance.standard_error is not None
                figures = {"error in the mask": mean_of(errors), "FD": Mean(distance.value, distance.standard_error)}
                yield Row("inpainting", str(schedule), evaluations, figures)


def mean_of(values: Tensor) -> Mean:
    """The mean of values (N,), with its standard error."""
    return Mean(values.mean().item(), values.std().item() / len(values) ** 0.5)


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
