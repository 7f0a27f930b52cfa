"""Feature extractors: uint8 images in, features out, and an identity that says what the features mean.

Features of unlike extractors must never meet in a metric; identities carry a digest of the weights, so that
they differ when the numbers would.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowturbo.evaluation.precision import full_precision
from flowturbo.system.files import sha256
from flowturbo.weights.cache import find_asset, is_offline, locate
from flowturbo.weights.checkpoint import load_checkpoint
from flowturbo.weights.fetch import fetch
from flowturbo.weights.registry import ASSETS

INCEPTION_FILE = ASSETS["inception"].files[0]
INCEPTION_SHA256 = str(INCEPTION_FILE.sha256)
INCEPTION_IDENTITY = f"inception {INCEPTION_SHA256[:8]}"
INCEPTION_VARIABLE = "FLOWTURBO_INCEPTION_WEIGHTS"
DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"


class MissingExtractorWeights(ValueError):
    """The weights of a feature extractor are not here, or not what they should be.

    `asset` is their registered name, where they have one.
    """

    def __init__(self, message: str, asset: str | None = None):
        super().__init__(message)
        self.asset = asset


class Features(NamedTuple):
    """Features of N images, float32: pool (N, D); spatial (N, S) for sFID; logits (N, classes) for IS."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """Maps uint8 images (N, 3, H, W) to Features, on the extractor's device, in full precision, without gradients."""

    identity: str

    def __call__(self, images: Tensor) -> Features: ...


class PixelExtractor:
    """The pixels themselves, in [−1, 1] and divided by √3: squared distances are means over the channels.

    The division makes a grey image as far from another whether it is stored with one channel or three.
    For small images: ValueError beyond 64×64 pixels, where the covariance outgrows memory.
    """

    identity = "pixels"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        if images.shape[2] * images.shape[3] > 64 * 64:
            raise ValueError(f"pixels of {images.shape[3]}×{images.shape[2]} images: expected at most 64×64")
        return Features((images.to(self.device).float() / 127.5 - 1).flatten(1) / 3**0.5)


class InceptionExtractor:
    """The Inception-v3 of the original FID: pool (N, 2048), spatial (N, 2023), logits (N, 1008) without bias.

    torch-fidelity's port of the TensorFlow graph, with its TF1 resize. Raises MissingExtractorWeights where the file
    has another sha256. Spatial features are the first 7 channels of `mixed_6/conv`, flattened as (17, 17, 7), like the
    ADM suite's. On a CPU the network runs channels last, which is a quarter faster and sums in another order: features
    differ from torch-fidelity's by 1e-6 of the largest.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        expected_sha256: str = INCEPTION_SHA256,
    ) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path, digest = os.fspath(weights), sha256(weights)
        if digest != expected_sha256:  # before loading: torch-fidelity unpickles the file
            raise MissingExtractorWeights(f"{path}: sha256 {digest}, expected {expected_sha256}", "inception")
        self.identity = f"inception {digest[:8]}"
        self.device = device
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
        ).to(device)
        if torch.device(device).type == "cpu":
            self._network = self._network.to(memory_format=torch.channels_last)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._mixed_6 = output

    @torch.no_grad()
    @full_precision()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        pool, logits = self._network(images.to(self.device))
        spatial = self._mixed_6[:, :7].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, logits)


class DINOv2Extractor:
    """DINOv2 ViT-L/14 class tokens (N, 1024) through timm: 224 px bicubic antialiased, ImageNet mean and std.

    The features of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675). Weights: a file that timm reads, else
    timm's download. Raises MissingExtractorWeights when they cannot be had, ValueError for a file that is damaged.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu") -> None:
        if is_offline():
            os.environ["HF_HUB_OFFLINE"] = "1"  # timm's network; read where huggingface_hub is imported
        import timm

        if weights is not None:
            load_checkpoint(weights)  # timm unpickles the file: it is looked through before
        source: dict[str, Any] = {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
        try:
            self._network: Any = timm.create_model(DINOV2_MODEL, pretrained=True, num_classes=0, img_size=224, **source)
        except Exception as error:  # the hub's client raises its own and its transport's types
            raise MissingExtractorWeights(f"no weights for {DINOV2_MODEL} ({error})") from error
        self._network.to(device).eval()
        self.device = device
        self.identity = f"dinov2 {_state_sha256(self._network)[:8]}"

    @torch.no_grad()
    @full_precision()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        x = images.to(self.device).float() / 255
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(self._network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        return Features(self._network((x - mean) / std))


class TorchScriptExtractor:
    """A TorchScript module that maps uint8 images (N, 3, H, W) to features (N, D).

    Loading it runs what is in it. ValueError, naming the file, when it is no such module.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        self.device = device
        self.identity = f"torchscript {sha256(self.path)[:8]}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is frozen, not gone
                self._network = torch.jit.load(str(self.path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{self.path}: not a TorchScript module") from error

    @torch.no_grad()
    @full_precision()
    def __call__(self, images: Tensor) -> Features:
        _check_images(images)
        try:
            features = self._network(images.to(self.device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self.path}: fails on uint8 {tuple(images.shape)}: {reason}") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.path}: returns {got} for {len(images)} images, expected (N, D) features")
        return Features(features.float())


def load_extractor(
    name: str, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None
) -> Extractor:
    """The extractor called inception, pixels or dinov2, or a TorchScript file, which is a program: run your own only.

    Inception's weights are the file given, else the one that $FLOWTURBO_INCEPTION_WEIGHTS names, else that among the
    downloads or in torch.hub's cache, else they are downloaded. Raises MissingExtractorWeights where none can be had,
    ValueError for another name.
    """
    if weights is not None and not Path(weights).is_file():
        raise MissingExtractorWeights(f"{os.fspath(weights)}: no such file", find_asset(name))
    if name == "inception":
        return InceptionExtractor(weights or find_inception(), device)
    if name == "dinov2":
        return DINOv2Extractor(weights, device)
    if weights is not None:
        raise ValueError(f"weights are for inception and dinov2, not for {name}")
    if name == "pixels":
        return PixelExtractor(device)
    if not Path(name).is_file():
        raise ValueError(f"extractor {name}: expected inception, pixels, dinov2 or a TorchScript file")
    return TorchScriptExtractor(name, device)


def find_inception() -> Path:
    """Inception's weights where none are named: see `load_extractor`."""
    if named := os.environ.get(INCEPTION_VARIABLE):
        if not Path(named).is_file():
            raise MissingExtractorWeights(f"{named}, which {INCEPTION_VARIABLE} names: no such file", "inception")
        return Path(named)
    hub = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE.path)  # earlier versions downloaded to there
    return locate(INCEPTION_FILE.path) or (hub if hub.is_file() else fetch("inception"))


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, 3, H, W)")


def _state_sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()
