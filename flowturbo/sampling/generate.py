"""One arrow from seed, numbers and classes to uint8 images: what every script, grid and benchmark samples with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowturbo.data.classes import ClassNames
from flowturbo.data.pictures import to_uint8
from flowturbo.data.randomness import Stream, keyed_noise
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import Autoencoder, NoAutoencoder, load_autoencoder
from flowturbo.networks.compiled import StaticGraphs
from flowturbo.networks.load import load_with_info
from flowturbo.networks.precision import cast, pick_precision, quantize
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.options import NetworkOptions
from flowturbo.system.distributed import pick_device
from flowturbo.transport.guidance import Guidance
from flowturbo.transport.samplers import FlowTurbo, SDESampler
from flowturbo.transport.spec import SamplerSettings, SamplerSpec
from flowturbo.weights.checkpoint import resolve
from flowturbo.weights.fetch import MissingWeights


@dataclass(frozen=True)
class Files:
    """The checkpoint files that a run samples from."""

    predictor: str
    refiner: str | None


def find_files(options: NetworkOptions, refiner: bool) -> Files:
    """The checkpoint files, here or among the downloads; of a run's folder the newest.

    Raises MissingWeights that names all that are not there.
    """
    fields = ["predictor_ckpt", *(["refiner_ckpt"] if refiner else [])]
    found, missing = {}, {}
    for field in fields:
        try:
            found[field] = str(resolve(getattr(options, field)))
        except MissingWeights:
            missing[field] = getattr(options, field)
    if missing:
        raise MissingWeights(missing)
    return Files(found["predictor_ckpt"], found.get("refiner_ckpt"))


@dataclass(frozen=True)
class Networks:
    """What sampling computes with, on one device.

    `path_type`: the path that the predictor was trained on, `class_names`: what its classes are called,
    `refiner_step`: the form of the R block that the refiner was trained for; None where that is not known.
    """

    predictor: SiT
    refiner: VelocityRefiner | None
    autoencoder: Autoencoder | NoAutoencoder
    device: torch.device
    path_type: str | None = None
    class_names: ClassNames | None = None
    refiner_step: str | None = None

    def __post_init__(self) -> None:
        check_match(self.predictor, self.refiner, self.autoencoder)

    @property
    def image_size(self) -> int:
        """The side of the images that are made, in pixels."""
        return self.predictor.input_shape[-1] * self.autoencoder.factor


def load_networks(
    options: NetworkOptions, files: Files, device: torch.device | None = None, say: Callable[[str], object] = print
) -> Networks:
    """Predictor, refiner if there is one, and autoencoder, as the options hold them.

    `say` is told the error that quantisation makes. Raises ValueError where a file is damaged or they do not fit each
    other.
    """
    device = device or pick_device(options.device)
    dtype = pick_precision(options.precision, device)
    predictor, info = load_with_info(SiT, files.predictor)
    refiner, of_refiner = (None, None) if files.refiner is None else load_with_info(VelocityRefiner, files.refiner)
    networks = Networks(
        predictor,
        refiner,
        load_autoencoder_of(predictor, options.vae_ckpt, device, dtype),
        device,
        info.path_type,
        ClassNames.from_config(info.config, predictor.num_classes),
        None if of_refiner is None else of_refiner.refiner_step,
    )
    for network in (networks.predictor, networks.refiner):
        if network is not None:
            cast(network.to(device), dtype)
            if options.quantize:
                error = quantize(network, options.quantize)
                say(f"{type(network).__name__} in {options.quantize}: relative rms error of its output {error:.1e}")
    if options.compile:
        networks.autoencoder.compile()
    return networks


def load_autoencoder_of(
    predictor: SiT | None, name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Autoencoder | NoAutoencoder:
    """The autoencoder called `name`, for a predictor that goes with it if one is given.

    Raises ValueError for another; for a model of pixels before an autoencoder is looked for.
    """
    if predictor is not None and name != "none" and predictor.input_shape[0] in (1, 3):
        raise ValueError(
            f"the predictor works on images of {predictor.input_shape[0]} channels, not latents: expected vae_ckpt "
            f"'none', got {name!r}"
        )
    autoencoder = load_autoencoder(name, device, dtype)
    if predictor is not None:
        check_match(predictor, None, autoencoder)
    return autoencoder


def check_match(predictor: SiT, refiner: VelocityRefiner | None, autoencoder: Autoencoder | NoAutoencoder) -> None:
    """Raises ValueError unless predictor, refiner and autoencoder speak of the same latents and classes."""
    if refiner is not None and (refiner.input_shape, refiner.num_classes) != (
        predictor.input_shape,
        predictor.num_classes,
    ):
        raise ValueError(
            f"the refiner is made for inputs {refiner.input_shape} and {refiner.num_classes} classes, "
            f"the predictor for {predictor.input_shape} and {predictor.num_classes}"
        )
    channels = predictor.input_shape[0]
    if autoencoder.channels not in (None, channels):
        raise ValueError(f"the autoencoder has {autoencoder.channels} latent channels, the predictor {channels}")
    if autoencoder.channels is None and channels not in (1, 3):
        raise ValueError(f"vae_ckpt 'none' is for models of 1 or 3 channels, this predictor has {channels}")


class NotFinite(FloatingPointError):
    """Networks have made something that is not finite."""


def check_settings(networks: Networks, settings: SamplerSettings) -> None:
    """Raises ValueError for what the predictor cannot do: guidance without a null class, another path than its own."""
    check_guidance(networks.predictor, settings.guidance)
    if networks.path_type not in (None, settings.path_type):
        raise ValueError(
            f"the predictor was trained on the {networks.path_type} path, not on path_type {settings.path_type}"
        )


def check_guidance(predictor: SiT, guidance: Guidance) -> None:
    """Raises ValueError for guidance without a null class."""
    if predictor.class_dropout_prob <= 0 and guidance.scale != 1:
        raise ValueError("this predictor has no null class to guide with: expected cfg_scale 1")


class ImageSampler:
    """Makes uint8 images of sample numbers and classes: what is drawn for a sample depends on (seed, number) alone.

    With `compile` everything from noise to bytes is one graph where the device records graphs, decoding included.
    Without `decode` it makes latents.
    Raises ValueError as `check_settings`.
    """

    def __init__(
        self,
        networks: Networks,
        spec: str | SamplerSpec,
        settings: SamplerSettings = SamplerSettings(),
        compile: bool = False,
        decode: bool = True,
    ):
        check_settings(networks, settings)
        self.networks, self.spec = networks, SamplerSpec.parse(spec)
        self.sampler = self.spec.build(
            networks.predictor,
            networks.refiner,
            settings,
            engine=StaticGraphs if compile else None,
            decode=self._decode if decode else None,
        )
        self.guidance = settings.guidance
        self.evaluations, self.rows = self.spec.evaluations(settings.refiner_step), self.spec.rows(settings)

    def __str__(self) -> str:
        return str(self.spec)

    def __call__(self, seed: int, numbers: range, classes: Sequence[int]) -> Tensor:
        """uint8 images (N, C, H, W), or without `decode` latents, on the device.

        Raises ValueError for classes that the predictor has not, NotFinite where an image is not finite.
        """
        return self.from_noise(self.noise(seed, numbers), classes, seed, numbers)

    def noise(self, seed: int, numbers: Sequence[int]) -> Tensor:
        """What the samples start from, (N, C, H, W) on the CPU."""
        return keyed_noise(seed, numbers, self.networks.predictor.input_shape)

    def from_noise(self, z: Tensor, classes: Sequence[int], seed: int = 0, numbers: range | None = None) -> Tensor:
        """As a call, from any noise z (N, C, H, W); seed and numbers (default: 0, 1, ...) draw what an SDE adds."""
        numbers, device = numbers or range(len(z)), self.networks.device
        z, y = z.to(device), self._labels(classes).to(device)
        if isinstance(self.sampler, SDESampler):
            shape = self.networks.predictor.input_shape
            noise = lambda k: keyed_noise(seed, numbers, shape, Stream.SDE + k)  # noqa: E731
            made = self.sampler.sample(z, y, noise)
        else:
            made = self.sampler.sample(z, y)
        return self._checked(made, numbers)

    @torch.no_grad()
    def steps(self, z: Tensor, classes: Sequence[int], numbers: range | None = None) -> Iterator[Tensor]:
        """The noise z (N, C, H, W), and after each step where it leads by now: uint8 images, the last as a call's.

        What a step foretells is the end point of its mean velocity. Raises ValueError for samplers without known steps.
        """
        if not isinstance(self.sampler, FlowTurbo):
            raise ValueError(f"{self} has no steps that are known beforehand: expected a schedule of blocks")
        numbers, device = numbers or range(len(z)), self.networks.device
        x, y = z.to(device), self._labels(classes).to(device)
        yield self._checked(self._decode(x), numbers)
        for step, state in zip(self.sampler.steps, self.sampler.trajectory(x, y), strict=True):
            last = step is self.sampler.steps[-1]
            middle = torch.tensor((step.start + step.end) / 2, device=device)
            velocity = (state.x - x) / (step.end - step.start)
            seen = state.x if last else self.sampler.path.end_point(velocity, (state.x + x) / 2, middle)
            yield self._checked(self._decode(seen), numbers)
            x = state.x

    def _checked(self, made: Tensor, numbers: range) -> Tensor:
        """Latents, or what `_decode` has made as uint8. Raises NotFinite naming samples that are not finite."""
        decoded = made.dtype == torch.int16
        finite = made[:, 0, 0, 0] >= 0 if decoded else made.isfinite().flatten(1).all(1)
        bad = [number for number, good in zip(numbers, finite.tolist(), strict=True) if not good]
        if bad:
            held = str(next(self.networks.predictor.blocks.parameters()).dtype).removeprefix("torch.")
            shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise NotFinite(f"sample {shown}: not finite with schedule {self.spec} in {held}")
        return made.to(torch.uint8) if decoded else made

    def _labels(self, classes: Sequence[int]) -> Tensor:
        count = self.networks.predictor.num_classes
        if any(not 0 <= c < count for c in classes):
            raise ValueError(f"classes {min(classes)} to {max(classes)} must lie in 0 to {count - 1}")
        return torch.tensor(classes)

    def _decode(self, latents: Tensor) -> Tensor:
        """The bytes of images, int16: an image that is not finite is -1, since a graph can raise nothing."""
        images = self.networks.autoencoder.decode(latents)
        finite = images.isfinite().flatten(1).all(1)[:, None, None, None]
        return torch.where(finite, to_uint8(images).short(), -1)
