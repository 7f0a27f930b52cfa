"""Figures of the package's colour model: what it draws, how near that is to its training pictures, and how well each
schedule follows the flow.

Every sample has the class of a training picture, so that both sets have the same classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowturbo.data.pictures import grid, save_png
from flowturbo.evaluation import GaussianStatistics, ImageFolder, frechet_distance
from flowturbo.sampling.bundled import load_bundled
from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points
from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.schedule import Schedule
from flowturbo.transport.spec import SamplerSettings
from flowturbo.weights.registry import MODELS

SPLITS = 10  # of the data into halves
COPY = 1 / 3  # nearer to the nearest picture than this part of the distance to the second: Yoon et al. 2023
SCALES = (1.0, 2.0, MODELS["colour"].cfg_scale, 4.0)
REFINED = "M4R1"  # what the refiner was trained for
FINE, CHECK = "D48", "D24"  # the solution that others are measured against, and one that shows how good it is
TRAJECTORIES = 64
BUDGETS = (6, 8, 12)  # evaluations, the refiner's included


def of_budget(n: int) -> list[tuple[str, str]]:
    """The schedules of n evaluations that are compared, with the form of their R blocks."""
    plain = [f"H{n // 2}", f"P{n - 1}", f"A{n}", f"F{n - 1}", f"M{n - 1}", f"M{n - 1}L1"]
    refined = [(f"H1P{n - 4}R1", "released"), (f"P{n - 2}R1", "single"), (f"M{n - 2}R1", "midpoint")]
    return [*((schedule, "") for schedule in plain), *refined]


class Data(NamedTuple):
    """The training pictures, uint8 (N, 3, 32, 32), and their classes (N,)."""

    images: Tensor
    classes: list[int]


class Nearest(NamedTuple):
    """For each of N images: the training picture that is nearest, and the root mean square distances (0 to 255) to
    it and to the second nearest."""

    which: Tensor
    first: Tensor
    second: Tensor

    def copies(self) -> Tensor:
        """Whether each image is as good as a copy (N,)."""
        return self.first < COPY * self.second


def report(pictures: Path, out: Path) -> str:
    """All figures, as Markdown; the pictures of samples beside their nearest training pictures go to `out`."""
    networks = load_bundled("colour")
    data = read(pictures, networks)
    model = MODELS["colour"]
    lines = [f"N = {len(data.classes)} samples for every row, one for each picture.", ""]
    lines += ["| samples | class accuracy | Fréchet distance | distance to the nearest | copies |", "|---" * 5 + "|"]
    lines.append(row("the pictures themselves", data.images, data, itself=True))
    for schedule, scale in [*((model.schedule, scale) for scale in SCALES), (REFINED, model.cfg_scale)]:
        images = draw(networks, data, schedule, scale)
        lines.append(row(f"{schedule}, cfg {scale:g}", images, data))
        if (schedule, scale) == (model.schedule, model.cfg_scale):
            show_nearest(images, data, out / "nearest.png")
    return "\n".join([*lines, "", *schedules(networks, data)])


def read(pictures: Path, networks: Networks) -> Data:
    """The pictures that recipes.emoji renders. Raises ValueError where the model's classes are others."""
    if networks.class_names is None:
        raise ValueError("the model does not know what its classes are called")
    folder = ImageFolder(pictures)
    images = torch.from_numpy(np.concatenate(list(folder.batches(256)))).permute(0, 3, 1, 2)
    names = networks.class_names.names
    return Data(images, [names.index(Path(file).parent.name) for file in folder.files])


def draw(networks: Networks, data: Data, schedule: str, scale: float, batch: int = 64) -> Tensor:
    """A sample for each picture, of its class: uint8 (N, 3, 32, 32)."""
    sampler = ImageSampler(networks, schedule, SamplerSettings(Guidance(scale), networks.refiner_step or "released"))
    starts = range(0, len(data.classes), batch)
    parts = [data.classes[start : start + batch] for start in starts]
    return torch.cat([sampler(0, range(s, s + len(part)), part) for s, part in zip(starts, parts, strict=True)]).cpu()


def nearest(images: Tensor, pictures: Tensor, itself: bool = False) -> Nearest:
    """The nearest pictures of each image; with `itself` image k is picture k, which does not count."""
    flat, others = (each.flatten(1).float() for each in (images, pictures))
    distances = torch.cdist(flat, others) / flat.shape[1] ** 0.5
    if itself:
        distances.fill_diagonal_(float("inf"))
    two = distances.topk(2, largest=False)
    return Nearest(two.indices[:, 0], two.values[:, 0], two.values[:, 1])


def class_accuracy(found: Nearest, data: Data) -> tuple[float, float]:
    """How often the nearest picture has the class that was asked for, with its standard error."""
    classes = torch.tensor(data.classes)
    share = (classes[found.which] == classes).double().mean().item()
    return share, (share * (1 - share) / len(classes)) ** 0.5


def halves_distance(images: Tensor, data: Data) -> tuple[float, float]:
    """Fréchet distance of half of the images to the other half of the pictures: mean and deviation over SPLITS.

    Image k belongs to picture k; the halves are drawn at random. On means of 2x2 pixels, 768 numbers in [-1, 1].
    """
    small = [torch.nn.functional.avg_pool2d(each.float() / 127.5 - 1, 2).flatten(1) for each in (images, data.images)]
    distances = []
    for split in range(SPLITS):
        order = torch.randperm(len(data.classes), generator=torch.Generator().manual_seed(split))
        first, second = order.chunk(2)
        sides = []
        for features in (small[0][first], small[1][second]):
            statistics = GaussianStatistics(features.shape[1])
            statistics.update(features)
            sides.append(statistics.gaussian())
        distances.append(frechet_distance(*sides[0], *sides[1]))
    return float(np.mean(distances)), float(np.std(distances, ddof=1))


def row(name: str, images: Tensor, data: Data, itself: bool = False) -> str:
    """A line of the table."""
    found = nearest(images, data.images, itself)
    accuracy, error = class_accuracy(found, data)
    distance, deviation = halves_distance(images, data)
    quartiles = found.first.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    copies = found.copies().double().mean().item()
    of_copies = (copies * (1 - copies) / len(images)) ** 0.5
    return (
        f"| {name} | {accuracy:.1%} ± {error:.1%} | {distance:.2f} ± {deviation:.2f} "
        f"| {quartiles[1]:.1f} ({quartiles[0]:.1f} to {quartiles[2]:.1f}) | {copies:.1%} ± {of_copies:.1%} |"
    )


def show_nearest(images: Tensor, data: Data, path: Path, columns: int = 12) -> None:
    """Samples above their nearest training pictures: the closest, those in the middle, the farthest."""
    found = nearest(images, data.images)
    order = found.first.argsort()
    middle = (len(order) - columns) // 2
    rows, captions = [], []
    for name, picked in (
        ("closest", order[:columns]),
        ("in the middle", order[middle : middle + columns]),
        ("farthest", order[-columns:]),
    ):
        rows += [images[picked], data.images[found.which[picked]]]
        captions += [f"samples, {name}", "their nearest training pictures"]
    save_png(path, grid(rows, captions, least_side=64))


def schedules(networks: Networks, data: Data) -> list[str]:
    """The table of schedules: errors of their end points against those of FINE."""
    picked = np.linspace(0, len(data.classes) - 1, TRAJECTORIES).round().astype(int)
    samples = Draws(0, range(TRAJECTORIES), tuple(data.classes[k] for k in picked))
    fine = {scale: fine_end_points(networks, SamplerSettings(Guidance(scale)), *samples, fine=FINE) for scale in SCALES}
    head = " | ".join(f"cfg {scale:g}" for scale in SCALES)
    lines = [f"{TRAJECTORIES} trajectories, against {FINE}.", ""]
    lines += [f"| evaluations | schedule | {head} |", "|---" * (2 + len(SCALES)) + "|"]
    for schedule, form in [*(each for n in BUDGETS for each in of_budget(n)), (CHECK, "")]:
        count = " + ".join(str(n) for n in Schedule.parse(schedule).evaluations(form or "released") if n)
        cells = []
        for scale in SCALES:
            settings = SamplerSettings(Guidance(scale), form or "released")
            ends = end_points(networks, schedule, settings, *samples)
            cells.append(str(Fidelity.of(ends, fine[scale]).rmse))
        lines.append(f"| {count} | {schedule} {form}".rstrip() + f" | {' | '.join(cells)} |")
    return lines
