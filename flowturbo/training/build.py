"""What a run works with, made from its options: networks and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flowturbo.data.classes import ClassNames, read_class_map
from flowturbo.data.folders import TrainingData
from flowturbo.data.labelled import LabelledImages
from flowturbo.data.latents import LatentFolder, is_latent_folder
from flowturbo.data.packed import open_images
from flowturbo.data.parts import Split, Subset, held_out_of, whole_of
from flowturbo.data.pictures import save_png
from flowturbo.data.report import SHOWN, check_data, contact_sheet
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import Autoencoder, NoAutoencoder
from flowturbo.networks.load import load_with_info
from flowturbo.networks.precision import cast, pick_precision
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import check_guidance, load_autoencoder_of
from flowturbo.training.options import TrainingOptions
from flowturbo.training.trajectories import Trajectories
from flowturbo.weights.checkpoint import resolve


@dataclass(frozen=True)
class FrozenNetworks:
    """The networks that a run computes with but does not train, on its device."""

    teacher: SiT | None  # the predictor that a refiner is trained for, its blocks in dtype; None for a predictor
    autoencoder: Autoencoder | NoAutoencoder
    device: torch.device
    dtype: torch.dtype  # that is computed in
    teacher_file: Path | None = None
    class_names: ClassNames | None = None  # what the teacher's classes are called, where its checkpoint says so


def load_frozen(options: TrainingOptions, device: torch.device) -> FrozenNetworks:
    """Teacher, if there is one, and autoencoder.

    Raises MissingWeights where a file is not here, ValueError naming one that holds something else.
    """
    dtype = pick_precision(options.hardware.precision, device)
    teacher: SiT | None = None
    file: Path | None = None
    names: ClassNames | None = None
    if options.target == "refiner":
        file = resolve(options.refiner.model_teacher_ckpt or "", "model_teacher_ckpt")
        teacher, info = load_with_info(SiT, str(file))
        names = ClassNames.from_config(info.config, teacher.num_classes)
    autoencoder = load_autoencoder_of(teacher, options.data.vae_ckpt, device)
    teacher = None if teacher is None else cast(teacher.to(device), dtype)
    return FrozenNetworks(teacher, autoencoder, device, dtype, file, names)


def open_data(options: TrainingOptions, frozen: FrozenNetworks) -> TrainingData:
    """The images, or cached latents, at the size and in the channels that the model works with, without those that are
    held out.

    Raises ValueError where they do not fit the model.
    """
    given, autoencoder, teacher = options.data, frozen.autoencoder, frozen.teacher
    if options.by_end_points:
        return _trajectories(options, frozen)
    assert given.data_path is not None
    size, num_classes, channels = given.image_size, options.predictor.num_classes, options.predictor.channels
    if teacher is not None:
        channels, height, width = teacher.input_shape
        size, num_classes = height * autoencoder.factor, teacher.num_classes
        if height != width or given.image_size not in (None, size):
            raise ValueError(f"the predictor works on {height}x{width} latents: expected image_size {size}")
    class_map = read_class_map(given.class_map) if given.class_map else None
    data: TrainingData
    if is_latent_folder(given.data_path):
        if isinstance(autoencoder, NoAutoencoder):
            raise ValueError(f"{given.data_path} holds latents: expected their autoencoder, not vae_ckpt 'none'")
        data = LatentFolder(given.data_path, autoencoder.fingerprint(), size, num_classes, class_map)
    else:
        if isinstance(autoencoder, Autoencoder):
            channels = 3
        data = open_images(given.data_path, size or 256, channels, num_classes, class_map, given.background)
    if given.holdout:
        data = Split(data, given.holdout)
    return data if given.subset == 1 else Subset(data, given.subset, options.optimisation.seed)


def _trajectories(options: TrainingOptions, frozen: FrozenNetworks) -> Trajectories:
    """What recipe endpoint trains on. Raises ValueError for guidance of a predictor without a null class."""
    assert frozen.teacher is not None
    check_guidance(frozen.teacher, options.guidance.guidance)
    settings = {**options.trajectory_settings(), "dtype": str(frozen.dtype)}
    count, seed = settings.pop("trajectories"), options.optimisation.seed
    shape, classes = frozen.teacher.input_shape, frozen.teacher.num_classes
    data = Trajectories(shape, classes, settings, seed, count, frozen.teacher_file)
    data.image_size *= frozen.autoencoder.factor
    if options.data.data_path is not None:
        data.note = "recipe endpoint trains on trajectories of the predictor: the images are not used"
    elif options.data.holdout:
        data.note = "recipe endpoint trains on no images: it holds out trajectories of its own, and holdout is not used"
    return data


def described(data: TrainingData) -> str:
    """How much data there is, in words."""
    if isinstance(data, Trajectories):
        return f"{len(data):,} trajectories of the predictor"
    held = held_out_of(data)
    more = "" if held is None else f", {len(held):,} held out"
    return f"{len(data):,} images in {len(data.classes)} classes{more}"


def images_of(data: TrainingData) -> LabelledImages | None:
    """The images behind data; None for cached latents."""
    whole = whole_of(data)
    return whole if isinstance(whole, LabelledImages) else None


def look_at(data: TrainingData) -> list[str]:
    """What there is to say of data. Raises ValueError naming images that cannot be read: before there is a run."""
    images = images_of(data)
    if images is not None:
        report = check_data(images)
        report.refuse()
        return report.lines(images)
    whole = whole_of(data)
    return [f"note: {whole.note}"] if isinstance(whole, (LatentFolder, Trajectories)) and whole.note else []


def report_on(options: TrainingOptions) -> None:
    """Print all that there is to say of the images, and write a sheet of crops. Raises ValueError as `look_at`."""
    given, predictor = options.data, options.predictor
    if given.data_path is None:
        raise ValueError("there is no data_path to check")
    class_map = read_class_map(given.class_map) if given.class_map else None
    size, channels = given.image_size or 256, predictor.channels
    data = open_images(given.data_path, size, channels, predictor.num_classes, class_map, given.background)
    report = check_data(data, thorough=True)
    print("\n".join([*report.lines(data), *report.unreadable[:SHOWN]]))
    report.refuse()
    path = Path(options.output.results_dir) / "data.png"
    save_png(path, contact_sheet(data))
    print(f"crops: {path}")


def new_model(options: TrainingOptions, frozen: FrozenNetworks, data: TrainingData) -> SiT:
    """The network to train, freshly initialised by torch's generator: a refiner shaped after its teacher where nothing
    else is said, or a SiT.

    Raises ValueError for sizes that do not divide.
    """
    if frozen.teacher is not None:
        return VelocityRefiner(**{**frozen.teacher.config, "depth": 1, **options.predictor.given_size()})
    if data.image_size % frozen.autoencoder.factor:
        raise ValueError(f"image_size {data.image_size} is not a multiple of {frozen.autoencoder.factor}")
    return SiT(
        input_size=data.image_size // frozen.autoencoder.factor,
        in_channels=frozen.autoencoder.channels or options.predictor.channels,
        num_classes=options.predictor.num_classes or len(data.classes),
        class_dropout_prob=options.optimisation.class_dropout,
        learn_sigma=options.predictor.learn_sigma,
        **options.predictor.size(),
    )
