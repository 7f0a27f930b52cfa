"""From options to a captioned picture of samples: what sample.py and the web page make, equal to the byte.

options, sampling = PictureOptions("M7", classes=("flag",)), SamplingOptions(cfg_scale=3.0)
make_picture(load_bundled("colour"), options, sampling).save("flags.png")
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flowturbo.data.classes import IMAGENET_CLASSES, class_index, class_label
from flowturbo.data.moving import save_moving
from flowturbo.data.pictures import grid, save_png
from flowturbo.data.randomness import between, keyed_noise
from flowturbo.networks.calls import CallCounter
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.sampling.options import SamplingOptions
from flowturbo.sampling.picture_options import PictureOptions
from flowturbo.system.values import plus, rounded

CLASSES = ("207", "980", "387", "974", "88", "972", "928", "279")  # the original sample.py's
COLUMNS = 8
GREY = 128  # of images that are not sampled yet
LEAST_SIDE = 128  # pixels of an image in the picture: smaller ones are enlarged


@dataclass
class Row:
    """What one sampler made, and what it took."""

    name: str
    images: Tensor  # (N, C, H, W) uint8
    evaluations: tuple[int, int]  # predictor, refiner
    rows: int | None  # that the networks evaluate for one image; None where it is not known
    guidance: str
    seconds: float  # from noise to bytes, of all images
    steps: list[Tensor] = field(default_factory=list)  # of ImageSampler.steps; empty unless asked for

    def caption(self) -> str:
        """Such as "H1P5R3   7 + 6 evaluations, 26 rows   cfg 4   12.3 ms/image"."""
        rows = f", {self.rows} rows" if self.rows else ""
        return f"{self.name}   {plus(*self.evaluations)} evaluations{rows}   {self.guidance}   {self.ms} ms/image"

    @property
    def ms(self) -> str:
        """Milliseconds an image, to three figures at most."""
        return rounded(1000 * self.seconds / len(self.images))


@dataclass
class Picture:
    """A picture of samples, and what is known of them."""

    options: PictureOptions
    rows: list[Row]  # one for each sampler
    labels: list[str]  # of the images of a row
    grouped: bool  # whether the images of a class stand together

    def draw(self, images: Sequence[Tensor] | None = None) -> Image.Image:
        """The picture; or as it would be with other images, (N, C, H, W) uint8 for each sampler."""
        given = [row.images for row in self.rows] if images is None else images
        options = self.options
        captions: list[str] = []
        if options.compare:
            rows, labels = list(given), [*[[""] * len(self.labels) for _ in given[1:]], self.labels]
            captions = [row.caption() for row in self.rows]
        elif options.interpolate:
            rows = list(given[0].split(options.frames))
            labels = [[label, *[""] * (options.frames - 1)] for label in self.labels[:: options.frames]]
        else:
            rows, labels = arrange(given[0], self.labels, self.grouped)
        shown = options.captions
        return grid(rows, captions if shown else (), labels if shown else (), least_side=LEAST_SIDE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as a PNG."""
        save_png(path, self.draw())

    def save_moving(self, path: str | os.PathLike[str]) -> None:
        """Write a GIF or MP4 of the steps; of an interpolation, of the way there and back.

        Raises ValueError for an MP4 where there is no ffmpeg.
        """
        frames = self.options.frames
        if not self.options.interpolate:
            save_moving(path, [row.steps for row in self.rows], self.draw)
            return
        there = list(self.rows[0].images.unflatten(0, (-1, frames)).unbind(1))
        still = replace(self, options=replace(self.options, interpolate=None), labels=self.labels[::frames])
        save_moving(path, [[*there, *there[-2:0:-1]]], still.draw)


def make_picture(
    networks: Networks,
    options: PictureOptions,
    sampling: SamplingOptions = SamplingOptions(),
    *,
    compile: bool = False,
    steps: bool = False,
    say: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> Picture:
    """Sample what the options ask for. With `steps` each row keeps them; `say` is told the caption of each row.

    Raises ValueError for classes that the model has not, and as ImageSampler; with `steps` for samplers without any.
    """
    for picture in follow_picture(
        networks, options, sampling, compile=compile, steps=steps, say=say, progress=progress
    ):
        made = picture
    return made


def follow_picture(
    networks: Networks,
    options: PictureOptions,
    sampling: SamplingOptions = SamplingOptions(),
    *,
    compile: bool = False,
    steps: bool = False,
    say: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> Iterator[Picture]:
    """As make_picture, but yields the picture so far after each batch of each row, with `steps` after each step; the
    last is whole."""
    classes = pick_classes(networks, options)
    settings = sampling.settings(networks.path_type, networks.refiner_step)
    # All are built first: a mistake in the last shows before the first is sampled.
    samplers = [ImageSampler(networks, spec, settings, compile) for spec in options.samplers]
    draws = Draws.of(networks, options, classes, sampling.seed)
    if len(samplers) > 1:  # so that no row's time contains the device's start-up or a compilation
        for sampler in samplers if compile else samplers[:1]:
            sample_row(sampler, draws.first(options.batch_size), options.batch_size, progress)
    count, names = networks.predictor.num_classes, networks.class_names
    labels = [class_label(c, count, names) for c in draws.classes]
    rows: list[Row] = []
    for sampler in samplers:
        for row in follow_row(sampler, draws, options.batch_size, steps, progress):
            yield Picture(options, [*rows, row], labels, names is not None)
        rows.append(row)
        including = ["compilation"] if compile and len(samplers) == 1 else []
        including += ["what its steps foretell"] if steps else []
        say(row.caption() + (f", {' and '.join(including)} included" if including else ""))


def pick_classes(networks: Networks, options: PictureOptions) -> list[int]:
    """The class of every image, by index or name. Raises ValueError for classes that the model has not."""
    num_classes, names = networks.predictor.num_classes, networks.class_names
    default = CLASSES if num_classes == IMAGENET_CLASSES else [str(c) for c in range(min(8, num_classes))]
    classes = [class_index(name, num_classes, names) for name in options.classes or default]
    each = COLUMNS if names is not None and not (options.compare or options.interpolate) else 1
    count = options.num_images or each * len(classes)
    return [classes[i % len(classes)] for i in range(count)]


@dataclass(frozen=True)
class Draws:
    """What the samples start from: everything that is drawn, but what an SDE adds."""

    noise: Tensor  # (N, C, H, W)
    classes: list[int]
    seed: int

    @classmethod
    def of(cls, networks: Networks, options: PictureOptions, classes: list[int], seed: int) -> Draws:
        """Those of the images; for an interpolation those of all frames of the first, then of the second, ..."""
        shape, numbers = networks.predictor.input_shape, range(len(classes))
        if options.interpolate is None:
            return cls(keyed_noise(seed, numbers, shape), classes, seed)
        first, second = (keyed_noise(end, numbers, shape) for end in options.interpolate)
        shares = [k / (options.frames - 1) for k in range(options.frames)]
        noise = torch.stack([between(first, second, share) for share in shares], 1).flatten(0, 1)
        return cls(noise, [c for c in classes for _ in shares], seed)

    def first(self, count: int) -> Draws:
        """The first few."""
        return Draws(self.noise[:count], self.classes[:count], self.seed)


def sample_row(sampler: ImageSampler, draws: Draws, batch_size: int, progress: bool = False) -> Row:
    """Sample all images, in batches."""
    for row in follow_row(sampler, draws, batch_size, progress=progress):
        made = row
    return made


def follow_row(
    sampler: ImageSampler, draws: Draws, batch_size: int, steps: bool = False, progress: bool = False
) -> Iterator[Row]:
    """Sample all images, in batches, with a progress bar that counts evaluations.

    Yields the row so far after each batch, with `steps` after each step, grey where nothing is sampled yet; the last is
    whole.
    """
    name = f"{sampler} compiled" if isinstance(getattr(sampler.sampler, "engine", None), StaticGraphs) else str(sampler)
    images: Tensor | None = None
    kept: list[list[Tensor]] = []
    seconds = 0.0
    starts = range(0, len(draws.classes), batch_size)
    planned = sum(sampler.evaluations) if sampler.evaluations else None
    total = planned and planned * len(starts)
    hidden = None if progress else True  # None: where nobody watches, as in a file
    with (
        tqdm(total=total, unit="evaluation", desc=str(sampler), leave=False, dynamic_ncols=True, disable=hidden) as bar,
        CallCounter(sampler.networks.predictor, bar.update) as of_predictor,
        CallCounter(sampler.networks.refiner, bar.update) as of_refiner,
    ):
        for k, start in enumerate(starts):
            numbers = range(start, min(start + batch_size, len(draws.classes)))
            batch = draws.noise[start : numbers.stop], draws.classes[start : numbers.stop]
            kept.append([])
            states = sampler.steps(*batch, numbers) if steps else _end(sampler, *batch, draws.seed, numbers)
            begin = time.perf_counter()
            for state in states:
                made = state.cpu()
                seconds += time.perf_counter() - begin
                if images is None:
                    images = made.new_full((len(draws.classes), *made.shape[1:]), GREY)
                images[start : numbers.stop] = made
                if steps:
                    kept[-1].append(made)
                counted = of_predictor.count // (k + 1), of_refiner.count // (k + 1)
                yield Row(
                    name,
                    images.clone(),
                    sampler.evaluations or counted,
                    sum(sampler.rows) if sampler.rows else None,
                    str(sampler.guidance),
                    seconds,
                    [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*kept)],
                )
                begin = time.perf_counter()  # not what is done with the row
            if planned:
                bar.update(planned * (k + 1) - bar.n)  # a static graph does not call the counters


def _end(sampler: ImageSampler, z: Tensor, classes: list[int], seed: int, numbers: range) -> Iterator[Tensor]:
    yield sampler.from_noise(z, classes, seed, numbers)


def arrange(images: Tensor, labels: Sequence[str], grouped: bool) -> tuple[list[Tensor], list[list[str]]]:
    """The rows of images (N, C, H, W) and of their labels; `grouped`: a class after the other if one has several."""
    if grouped and len(set(labels)) < len(labels):
        groups = [[i for i, each in enumerate(labels) if each == label] for label in dict.fromkeys(labels)]
        order = [group[k : k + COLUMNS] for group in groups for k in range(0, len(group), COLUMNS)]
    else:
        columns = COLUMNS // 2 if len(images) <= COLUMNS else COLUMNS
        order = [list(range(len(images)))[k : k + columns] for k in range(0, len(images), columns)]
    return [images[each] for each in order], [[labels[i] for i in each] for each in order]
