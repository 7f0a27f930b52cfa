"""From an image and what is wanted of it to uint8 images: inpainting, object removal, change of class, inversion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowturbo.data.classes import class_index
from flowturbo.data.images import centre_crop, read_image
from flowturbo.data.masks import centre_square, check_mask, compose, fit_mask, latent_mask, opacity, read_mask
from flowturbo.data.pictures import from_uint8, to_pil, to_uint8
from flowturbo.data.randomness import Stream, keyed_noise
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.sampling.edit_options import EditOptions
from flowturbo.sampling.generate import Networks, check_settings
from flowturbo.sampling.options import SamplingOptions
from flowturbo.transport.editing import Source, noise_through, start_of
from flowturbo.transport.samplers import FlowTurbo
from flowturbo.transport.spec import SamplerSettings

RAMP = 0.1  # of time, within which a grey part of a mask is let go

Image = str | os.PathLike[str] | Tensor  # a file, or uint8 (C, H, W)
Mask = str | os.PathLike[str] | Tensor  # a file, or uint8 (H, W), 255 where something is generated


class Edited(NamedTuple):
    """The results of an edit."""

    images: Tensor  # uint8 (N, C, H, W): of the model's size, or of the image's with keep_size
    original: Tensor  # uint8 (C, H, W), of the same size as those
    steps: list[Tensor]  # the states at the start and after each step, for `Editor.decode`; empty unless asked for
    evaluations: tuple[int, int]  # of the predictor and the refiner, for each result


def edit(
    networks: Networks,
    image: Image,
    options: EditOptions,
    sampling: SamplingOptions = SamplingOptions(),
    mask: Mask | None = None,
    compile: bool = False,
) -> Edited:
    """Edit one image: networks of `generate.load_networks`, what is wanted as options, a mask to keep what is black.

        edit(networks, "cat.png", EditOptions("H8", to_class="golden retriever", strength=0.6)).images

    Raises ValueError naming a file that is no image, a mask that does not fit, a class that the model has not, and what
    `generate.check_settings` refuses.
    """
    return Editor(networks, options, sampling, compile).edit(image, mask)


class Editor:
    """Edits images: with `keep_steps` also their trajectories. What is drawn for result k depends on (seed, k) alone.

    Raises ValueError as `edit`.
    """

    def __init__(
        self,
        networks: Networks,
        options: EditOptions,
        sampling: SamplingOptions = SamplingOptions(),
        compile: bool = False,
        keep_steps: bool = False,
    ):
        settings = sampling.settings(networks.path_type, networks.refiner_step)
        check_settings(networks, settings)
        self.networks, self.options, self.seed, self.keep_steps = networks, options, sampling.seed, keep_steps
        engine = StaticGraphs if compile else None

        def build(settings: SamplerSettings) -> FlowTurbo:
            sampler = options.sampler.build(networks.predictor, networks.refiner, settings, engine)
            assert isinstance(sampler, FlowTurbo)
            return sampler

        unguided = replace(settings, guidance=replace(settings.guidance, scale=1.0))
        self.to_class, self.from_class = (self._class(name) for name in (options.to_class, options.from_class))
        # The null class is the same in both branches.
        self.sampler = build(unguided if self.to_class is None else settings)
        self.inverter = build(unguided)
        self.steps: list[Tensor] = []

    def edit(self, image: Image, mask: Mask | None = None) -> Edited:
        """The results for one image, and a mask of its size."""
        options, method = self.options, self.options.chosen_method
        if not options.remove:
            self._check_class()
        elif mask is None:
            raise ValueError("remove needs a mask, white where the object is")
        canvas = Canvas(self._image(image), self._mask(mask), self.networks.image_size)
        share = None if canvas.mask is None else latent_mask(canvas.mask, self.networks.autoencoder.factor)
        source = Source(
            image=self._encode(canvas.image).expand(options.num_images, -1, -1, -1),
            noise=self._noise(0),
            mask=None if share is None else share.to(self.networks.device),
            labels=self._labels(self.from_class) if method == "flowedit" else None,
            ramp=RAMP,
        )
        strength = options.strength_with(mask is not None)
        self.steps = []
        if method == "invert":
            samplers = self.inverter, self.sampler
            labels = self._labels(self.from_class), self._labels(self.to_class)
            latents = change_by_inversion(
                *samplers, *labels, source, start_of(strength, self.sampler.path), self._follow
            )
        else:
            latents = self._passes(source, strength)
        images = canvas.finish(self.decode(latents), options.feather, options.composite, options.keep_size)
        original = canvas.whole if options.keep_size else canvas.image
        return Edited(images, original, self.steps, self.evaluations)

    @property
    def evaluations(self) -> tuple[int, int]:
        """Of the predictor and the refiner, for each result: both classes count, and each pass."""
        times = 2 if self.options.changes_class else self.options.resample
        predictor, refiner = self.sampler.evaluations()
        return times * predictor, times * refiner

    def invert(self, image: Image) -> Tensor:
        """The noise (1, C, H, W) that the sampler, with its class and guidance, turns into the image."""
        low, high = self.sampler.path.interval
        self._check_class()
        latents = self._encode(Canvas(self._image(image), None, self.networks.image_size).image)
        return self._follow(self.sampler.over(high, low), self._labels(self.to_class, 1), latents)

    def restore(self, noise: Tensor) -> Tensor:
        """The image, uint8 (1, C, H, W), that the sampler makes of a noise (1, C, H, W).

        Raises ValueError for another shape.
        """
        self._check_class()
        expected = (1, *self.networks.predictor.input_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise of shape {tuple(noise.shape)}: this model's is {expected}")
        noise = noise.to(self.networks.device)
        return self.decode(self._follow(self.sampler, self._labels(self.to_class, 1), noise))

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) of the model's size, on the CPU, from states."""
        return to_uint8(self.networks.autoencoder.decode(latents)).cpu()

    def _passes(self, source: Source, strength: float) -> Tensor:
        """SDEdit, inpainting and FlowEdit; every further pass starts from the result and less noise."""
        passes, y = self.options.resample, self._labels(self.to_class)
        end = self.sampler.path.interval[1]
        first = source.image
        for k in range(passes):
            sampler = self.sampler.over(start_of(strength * (1 - k / passes), self.sampler.path), end)
            x = self._follow(sampler, y, source)
            kept = x if source.mask is None else source.mask * x + (1 - source.mask) * first
            source = replace(source, image=kept, noise=self._noise(k + 1))
        return x

    def _follow(self, sampler: FlowTurbo, y: Tensor, start: Tensor | Source) -> Tensor:
        if not self.keep_steps:
            return follow(sampler, y, start)
        for x in _states(sampler, y, start):
            self.steps.append(x)
        return x

    def _check_class(self) -> None:
        if self.to_class is None:
            raise ValueError("nothing says what to generate: expected a class, or a mask whose content is removed")

    def _class(self, name: str | int | None) -> int | None:
        if name is None:
            return None
        return class_index(str(name), self.networks.predictor.num_classes, self.networks.class_names)

    def _labels(self, label: int | None, rows: int | None = None) -> Tensor:
        label = self.networks.predictor.null_class if label is None else label
        return torch.full((rows or self.options.num_images,), label, device=self.networks.device)

    def _noise(self, k: int) -> Tensor:
        shape, numbers = self.networks.predictor.input_shape, range(self.options.num_images)
        stream = Stream.EDIT + k if k else Stream.NOISE
        return keyed_noise(self.seed, numbers, shape, stream).to(self.networks.device)

    def _image(self, image: Image) -> Tensor:
        """uint8 (C, H, W) with as many channels as the model's images."""
        channels = 3 if self.networks.autoencoder.channels else self.networks.predictor.input_shape[0]
        if not isinstance(image, Tensor):
            return torch.from_numpy(read_image(image, channels=channels).pixels.copy())
        if image.ndim != 3 or image.dtype != torch.uint8 or len(image) not in (1, 3):
            raise ValueError(f"image of {image.dtype} and shape {tuple(image.shape)}: expected uint8 (1 or 3, H, W)")
        picture = to_pil(image).convert("L" if channels == 1 else "RGB")
        return torch.from_numpy(np.array(picture).reshape(*image.shape[1:], channels)).permute(2, 0, 1)

    def _mask(self, mask: Mask | None) -> Tensor | None:
        return mask if mask is None or isinstance(mask, Tensor) else read_mask(mask)

    def _encode(self, image: Tensor) -> Tensor:
        """uint8 (C, H, W) -> the latents that are most likely, (1, C, h, w)."""
        autoencoder, device = self.networks.autoencoder, self.networks.device
        return autoencoder.sample(
            autoencoder.moments(from_uint8(image[None]).to(device)), torch.zeros((), device=device)
        )


Follow = Callable[[FlowTurbo, Tensor, Tensor | Source], Tensor]


def follow(sampler: FlowTurbo, y: Tensor, start: Tensor | Source) -> Tensor:
    """The state at the end of a trajectory from a state, or of an edit."""
    return sampler.edit(y, start) if isinstance(start, Source) else sampler.sample(start, y)


def change_by_inversion(
    inverter: FlowTurbo,
    sampler: FlowTurbo,
    old: Tensor,
    new: Tensor,
    source: Source,
    start: float,
    follow: Follow = follow,
) -> Tensor:
    """Back from the image to time `start` along its old class (N,), then on along the new one.

    Outside a mask the image is kept on the straight way from where it came to. The source's noise is not used.
    """
    path = sampler.path
    end = path.interval[1]
    x = follow(inverter.over(end, start), old, source.image)
    source = replace(source, noise=noise_through(x, source.image, path, start))
    return follow(sampler.over(start, end), new, source)


def _states(sampler: FlowTurbo, y: Tensor, start: Tensor | Source) -> Iterator[Tensor]:
    """The state at the start of a trajectory, and after each step."""
    yield start.at(sampler.path, sampler.steps[0].start).x if isinstance(start, Source) else start
    states = sampler.edit_trajectory(y, start) if isinstance(start, Source) else sampler.trajectory(start, y)
    for state in states:
        yield state.x


class Canvas:
    """An image (C, H, W) and its mask (H, W), whole and as the model sees them: the centre square, size x size.

    Raises ValueError for a mask that does not fit, and one that is black or white throughout, whole or in the square.
    """

    def __init__(self, image: Tensor, mask: Tensor | None, size: int):
        self.whole, self.whole_mask, self.size = image, mask, size
        self.image, self.mask = image, mask
        if mask is not None:
            check_mask(mask, image)
        if tuple(image.shape[1:]) != (size, size):
            array = np.array(centre_crop(to_pil(image), size)).reshape(size, size, -1)
            self.image = torch.from_numpy(array).permute(2, 0, 1)
        if mask is not None:
            self.mask = fit_mask(mask, size)
            if not self.mask.any():
                raise ValueError("the mask is black in the centre square, which is all that the model sees")

    def finish(self, images: Tensor, feather: int, composite: bool, keep_size: bool) -> Tensor:
        """The results (N, C, h, w), put onto the original where they are to be."""
        if not keep_size:
            if self.mask is None or not composite:
                return images
            return compose(self.image, images, opacity(self.mask, feather))
        square = centre_square(self.whole)
        side = self.whole[0][square].shape[0]
        scaled = [np.array(to_pil(image).resize((side, side), resample=3)).reshape(side, side, -1) for image in images]
        generated = self.whole.expand(len(images), -1, -1, -1).clone()
        place = (..., *square)
        generated[place] = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2)
        shown = torch.zeros(self.whole.shape[1:])
        within = torch.full_like(shown[square], 255) if self.whole_mask is None else self.whole_mask[square]
        shown[square] = opacity(within, feather if self.whole_mask is not None else 0)
        return compose(self.whole, generated, shown) if composite else generated
