"""What the page computes: from what a visitor asks for to pictures, words and files. It knows nothing of gradio.

Errors are the library's: ValueError, OSError and FloatingPointError, which the page shows in one line.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from flowturbo.data.classes import class_index, class_label
from flowturbo.data.pictures import to_pil
from flowturbo.planning.menu import measure_menu
from flowturbo.planning.planner import Measured
from flowturbo.sampling.edit_options import EditOptions
from flowturbo.sampling.generate import Files, ImageSampler, Networks, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.sampling.picture import Picture, follow_picture
from flowturbo.sampling.picture_options import PictureOptions, picture_name
from flowturbo.sampling.solvers import check_made_for
from flowturbo.system.options import words_of
from flowturbo.transport.spec import SamplerSpec
from flowturbo.web.edits import EditedPicture, edit_picture, enlarged
from flowturbo.web.options import PageOptions
from flowturbo.weights.fetch import MissingWeights
from flowturbo.weights.registry import MODELS

MOST_IMAGES = 64
MOST_EVALUATIONS = 1000
MENU_BATCH = 8  # images in the batch that is timed

Tell = Callable[[str], object]


class Studio:
    """The networks of one page, loaded once, and the settings that its visitors do not change.

    `classes` are (what is shown, what options take) for each class, `first_classes` what options take of those that the
    page starts with. Raises ValueError for classes to start with that the model has not.
    """

    def __init__(
        self,
        networks: Networks,
        files: Files,
        network_options: NetworkOptions,
        sampling: SamplingOptions = SamplingOptions(),
        start: PageOptions = PageOptions(),
    ):
        self.networks, self.files, self.network_options = networks, files, network_options
        self.sampling, self.start = sampling, start
        self.model = next((n for n, m in MODELS.items() if m.predictor_ckpt == network_options.predictor_ckpt), None)
        self.classes = self._classes()
        self.first_classes = self._first_classes()

    @classmethod
    def open(
        cls, network_options: NetworkOptions, sampling: SamplingOptions, start: PageOptions, say: Tell = print
    ) -> Studio:
        """Load the networks; without the refiner where there is none, which `say` is told.

        Raises as `find_files` and `load_networks`, and ValueError as the class.
        """
        try:
            files = find_files(network_options, refiner=True)
        except MissingWeights as error:
            if "predictor_ckpt" in error.fields:
                raise
            files = find_files(network_options, refiner=False)
            say(f"no refiner {network_options.refiner_ckpt}: schedules with R are refused")
        return cls(load_networks(network_options, files, say=say), files, network_options, sampling, start)

    @property
    def about(self) -> str:
        """The model, its size and where it runs, in a line."""
        predictor, device = self.networks.predictor, self.networks.device
        millions = sum(p.numel() for p in predictor.parameters()) / 1e6
        name = self.model or os.path.basename(self.files.predictor)
        refiner = "with a refiner" if self.networks.refiner is not None else "no refiner"
        side, compiled = self.networks.image_size, ", compiled" if self.network_options.compile else ""
        return (
            f"{name}: {side}x{side} pixels, {predictor.num_classes} classes, {millions:.3g} M parameters, {refiner}, "
            f"on {device}{compiled}"
        )

    def _classes(self) -> list[tuple[str, str]]:
        count, names = self.networks.predictor.num_classes, self.networks.class_names
        labels = [class_label(k, count, names) for k in range(count)]
        if names is not None and len({*names.names, ""}) > count:  # each has a name of its own
            return [(label, label) for label in labels]
        return [(label, str(k)) for k, label in enumerate(labels)]

    def _first_classes(self) -> list[str]:
        """What the page starts with, as options take it."""
        count, names = self.networks.predictor.num_classes, self.networks.class_names
        asked = [class_index(name, count, names) for name in self.start.classes or ()]
        return [self.classes[k][1] for k in (asked or range(count))[:4]]

    def check(self, specs: Sequence[SamplerSpec], sampling: SamplingOptions, count: int, warn: Tell) -> None:
        """Raises ValueError for more than the page does in one run; `warn` is told of solvers made for others."""
        if not 1 <= count <= MOST_IMAGES:
            raise ValueError(f"{count} images: expected 1 to {MOST_IMAGES} on this page")
        for spec in specs:
            planned = spec.evaluations() or (0, 0)
            if sum(planned) > MOST_EVALUATIONS:
                raise ValueError(f"{spec} takes {sum(planned)} evaluations: expected {MOST_EVALUATIONS} at most here")
            check_made_for(spec, self.files.predictor, sampling.guidance, sampling.strict, warn)

    def draw(self, options: PictureOptions, sampling: SamplingOptions, warn: Tell) -> Iterator[Picture]:
        """The picture after each step, or of several samplers after each row; the last is what sample.py makes."""
        self.check(options.samplers, sampling, options.num_images or 1, warn)
        steps = not options.compare and all(spec.schedule is not None for spec in options.samplers)
        yield from follow_picture(self.networks, options, sampling, compile=self.network_options.compile, steps=steps)

    def save(self, picture: Picture, sampling: SamplingOptions, folder: Path) -> Path:
        """Write a picture under the name that sample.py gives it."""
        path = folder / f"{picture_name(picture.options, self.network_options, sampling)}.png"
        picture.save(path)
        return path

    def menu(self, sampling: SamplingOptions) -> Iterator[Measured]:
        """Schedules with their times and errors on this device, at this guidance."""
        settings = sampling.settings(self.networks.path_type, self.networks.refiner_step)
        return measure_menu(self.networks, settings, MENU_BATCH, self.network_options.compile, sampling.seed)

    def example(self) -> Image.Image | None:
        """A picture to begin to edit, of a model that is fast enough to draw it at the start."""
        if self.model is None:
            return None
        settings = self.sampling.settings(self.networks.path_type, self.networks.refiner_step)
        sampler = ImageSampler(self.networks, self.start.schedule, settings)
        label = [value for _, value in self.classes].index(self.first_classes[:2][-1])
        return enlarged(to_pil(sampler(self.sampling.seed, range(1), [label])[0]))

    def edit(
        self,
        picture: Image.Image,
        mask: Tensor | None,
        options: EditOptions,
        sampling: SamplingOptions,
        folder: Path,
        warn: Tell,
    ) -> EditedPicture:
        """The picture edited, within a mask if there is one, and its files in a folder. Raises ValueError."""
        self.check([options.sampler], sampling, options.num_images, warn)
        compile = self.network_options.compile
        return edit_picture(self.networks, picture, mask, options, sampling, folder, compile)

    def command(self, script: str, *words: str, options: Sequence[Any]) -> str:
        """The call of a script that does the same: words, then the flags of options that are not its defaults."""
        model = [] if self.model is None else ["--model", self.model]
        usual = {} if self.model is None else MODELS[self.model].options()
        usual |= {"schedule": None, "cfg_scale": None, "seed": None}  # always said
        flags = []
        for each in (self.network_options, *options):
            own = {"schedule": each.schedule} if getattr(each, "compare", None) else {}  # which stands in its place
            flags += words_of(each, **{**usual, **own})
        return shlex.join(["python", script, *model, *words, *flags])

    def settings(self, seed: float | None, cfg_scale: float | None) -> SamplingOptions:
        """The page's sampling options with a seed and a guidance of the visitor. Raises ValueError."""
        if seed is None or not 0 <= seed < 2**53 or seed != int(seed):  # what a browser's numbers hold
            raise ValueError(f"seed {seed}: expected a whole number from 0 to 2^53 - 1")
        if cfg_scale is None:
            raise ValueError("expected a guidance; 1 is none")
        return replace(self.sampling, seed=int(seed), cfg_scale=float(cfg_scale))


def named_schedule(text: str) -> str:
    """A schedule that a visitor typed. Raises ValueError for the path of a file: a page reads none by its path."""
    text = (text or "").strip()
    if not text:
        raise ValueError("no schedule: expected blocks with counts, such as M7 or H1P5R3")
    if os.sep in text or text.lower().endswith(".json"):
        raise ValueError(f"{text!r} is a path: expected blocks with counts, or the name of a solver")
    return text
