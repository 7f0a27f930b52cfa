"""Sample images with FlowTurbo: by default the eight classes of the original, SiT-XL/2 with its refiner, H1P5R3.

Usage:
  python sample.py --model colour                  # comes with the package: no download
  python sample.py
  python sample.py --classes "golden retriever" 980 volcano --cfg-scale 4 --seed 1
  python sample.py --compare H8 H1P5R3 dopri5      # one row per sampler, from the same noise
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import check_made_for, parse_sampler
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option
from flowturbo.system.values import rounded
from flowturbo.transport.blocks import BLOCKS

if TYPE_CHECKING:
    from torch import Tensor

    from flowturbo.data.classes import ClassNames
    from flowturbo.sampling.generate import ImageSampler
    from flowturbo.transport.spec import SamplerSpec

CLASSES = ("207", "980", "387", "974", "88", "972", "928", "279")  # the original sample.py's
COLUMNS = 8


@dataclass(frozen=True)
class Options:
    """What to sample. Raises ValueError for impossible values."""

    schedule: str = option(
        "H1P5R3",
        "blocks with counts, groups as [H1P1R1]x2, on a grid as H8@shift2; the file or the name of a solver; dopri5; "
        "sdeN for an SDE of N steps. "
        f"Blocks: {', '.join(f'{letter} ({block.name})' for letter, block in BLOCKS.items())}",
    )
    compare: tuple[str, ...] | None = option(
        None, "one row for each of these, all from the same noise", metavar="SCHEDULE"
    )
    classes: tuple[str, ...] | None = option(
        None,
        "indices, or names: the model's own, or ImageNet's and WordNet ids (default: the original's eight, or the "
        "model's first eight)",
        metavar="CLASS",
    )
    num_images: int | None = option(
        None, "how many, going round the classes (default: eight of each where classes have names, else one)"
    )
    batch_size: int = option(16, "images sampled at once")
    out: str | None = option(None, "(default: samples/SCHEDULE-cfgSCALE-seedSEED.png)", metavar="PNG")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 1):
            raise ValueError("batch_size and num_images must be at least 1")
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"out {self.out!r} must end in .png")


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"what to sample": Options, "networks": NetworkOptions, "sampling": SamplingOptions}
    options, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS)
    specs = [parse_sampler(text) for text in options.compare or [options.schedule]]
    out = Path(options.out or default_name(specs, sampling))
    check_writable(out)

    from flowturbo.data.pictures import grid, save_png
    from flowturbo.sampling.generate import ImageSampler, find_files, load_networks

    files = find_files(network_options, any(spec.needs_refiner for spec in specs))
    for spec in specs:
        check_made_for(spec, files.predictor, sampling.guidance, sampling.strict, cli.warn)
    networks = load_networks(network_options, files)
    classes = pick_classes(options, networks.predictor.num_classes, networks.class_names)
    settings = sampling.settings(networks.path_type, networks.refiner_step)
    # All are built first: a mistake in the last shows before the first is sampled.
    samplers = [ImageSampler(networks, spec, settings, network_options.compile) for spec in specs]
    if len(samplers) > 1:  # so that no row's time contains the device's start-up or a compilation
        start_up = samplers if network_options.compile else samplers[:1]
        for sampler in start_up:
            sample_row(sampler, sampling.seed, classes[: options.batch_size], options.batch_size)
    rows, captions = [], []
    for sampler in samplers:
        row = sample_row(sampler, sampling.seed, classes, options.batch_size)
        rows.append(row.images)
        name = f"{sampler} compiled" if network_options.compile else str(sampler)
        captions.append(row.caption(name, sampler))
        print(captions[-1] + (", compilation included" if network_options.compile and len(samplers) == 1 else ""))
    if not options.compare:
        rows, captions = arrange(rows[0], classes, networks.class_names)
    save_png(out, grid(rows, captions, least_side=96 if networks.class_names else 32))
    print(f"saved {out}")


def default_name(specs: Sequence[SamplerSpec], sampling: SamplingOptions) -> str:
    """samples/SCHEDULE-cfgSCALE-seedSEED.png."""
    name = re.sub(r"[^\w.+@-]", "_", "-vs-".join(map(str, specs)))[:100]
    return f"samples/{name}-cfg{sampling.cfg_scale:g}-seed{sampling.seed}.png"


def pick_classes(options: Options, num_classes: int, names: ClassNames | None) -> list[int]:
    """The class of every image, by index or name. Raises ValueError for classes that the model has not."""
    from flowturbo.data.classes import IMAGENET_CLASSES, class_index

    default = CLASSES if num_classes == IMAGENET_CLASSES else [str(c) for c in range(min(8, num_classes))]
    classes = [class_index(name, num_classes, names) for name in options.classes or default]
    each = COLUMNS if names is not None and not options.compare else 1
    count = options.num_images or each * len(classes)
    return [classes[i % len(classes)] for i in range(count)]


def arrange(images: Tensor, classes: Sequence[int], names: ClassNames | None) -> tuple[list[Tensor], list[str]]:
    """The rows of the picture grid and their captions: a class after the other where they have names."""
    if names is None:
        return list(images.split(4 if len(classes) <= COLUMNS else COLUMNS)), []
    rows, captions = [], []
    for k in dict.fromkeys(classes):
        parts = images[[i for i, c in enumerate(classes) if c == k]].split(COLUMNS)
        rows += parts
        captions += [names.names[k] or str(k), *[""] * (len(parts) - 1)]
    return rows, captions


@dataclass
class Row:
    """What one sampler made, and what it took."""

    images: Tensor  # (N, C, H, W) uint8
    evaluations: tuple[int, int]  # predictor, refiner
    seconds: float  # from noise to bytes

    def caption(self, name: str, sampler: ImageSampler) -> str:
        predictor, refiner = self.evaluations
        count = f"{predictor} + {refiner}" if refiner else f"{predictor}"
        rows = f", {sum(sampler.rows)} rows" if sampler.rows else ""
        ms = 1000 * self.seconds / len(self.images)
        return f"{name}   {count} evaluations{rows}   {sampler.guidance}   {rounded(ms)} ms/image"


def sample_row(sampler: ImageSampler, seed: int, classes: Sequence[int], batch_size: int) -> Row:
    """Sample all images, in batches, with a progress bar that counts evaluations."""
    import torch
    from tqdm import tqdm

    from flowturbo.networks.calls import CallCounter

    images, seconds = [], 0.0
    starts = range(0, len(classes), batch_size)
    planned = sum(sampler.evaluations) if sampler.evaluations else None
    total = planned and planned * len(starts)
    with (
        tqdm(total=total, unit="evaluation", desc=str(sampler), leave=False, dynamic_ncols=True) as bar,
        CallCounter(sampler.networks.predictor, bar.update) as of_predictor,
        CallCounter(sampler.networks.refiner, bar.update) as of_refiner,
    ):
        for k, start in enumerate(starts):
            numbers = range(start, min(start + batch_size, len(classes)))
            begin = time.perf_counter()
            images.append(sampler(seed, numbers, classes[start : numbers.stop]).cpu())
            seconds += time.perf_counter() - begin
            if planned:
                bar.update(planned * (k + 1) - bar.n)  # a static graph does not call the counters
    counted = of_predictor.count // len(starts), of_refiner.count // len(starts)
    return Row(torch.cat(images), sampler.evaluations or counted, seconds)


if __name__ == "__main__":
    cli.run_script(main)
