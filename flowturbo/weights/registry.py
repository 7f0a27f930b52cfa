"""What weights there are, as data: the models that come with the package, and what can be downloaded (names, files,
mirrors, sizes, hashes, licences).

None where a size or hash is not published: it is recorded at the first download, and held to from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PACKAGED = Path(__file__).parents[1] / "assets"  # the files that come with the package


@dataclass(frozen=True)
class Model:
    """A model that comes with the package, and how it is sampled where nothing else is said.

    The fields after `about` are options of the same names.
    """

    about: str
    predictor_ckpt: str  # files in PACKAGED
    refiner_ckpt: str
    schedule: str
    cfg_scale: float
    classes: tuple[str, ...]  # those that sample.py draws
    vae_ckpt: str = "none"

    def options(self) -> dict[str, Any]:
        """The values of options, by their names."""
        return {name: value for name, value in asdict(self).items() if name != "about"}


MODELS: Mapping[str, Model] = {
    "colour": Model(
        about="pictures of 32x32 pixels in 35 classes such as flag, animal-mammal and food-fruit",
        predictor_ckpt="colour-predictor.safetensors",
        refiner_ckpt="colour-refiner.safetensors",
        schedule="M11",
        cfg_scale=3.0,
        classes=("flag", "face-smiling", "animal-bird", "food-fruit"),
    ),
    "digits": Model(
        about="handwritten digits, grey, 8x8 pixels",
        predictor_ckpt="digits-predictor.pt",
        refiner_ckpt="digits-refiner.safetensors",
        schedule="H1P5R2",
        cfg_scale=1.0,
        classes=tuple("0123456789"),
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """One file: its path below the cache folder, its https mirrors in the order tried, and what is known of it."""

    path: str
    urls: tuple[str, ...]
    size: int | None = None  # bytes, enforced
    sha256: str | None = None
    about: int | None = None  # bytes, roughly, where the size is not published: parameters times four
    format: str = ""  # how it begins: one of transfer.FORMATS


@dataclass(frozen=True)
class Asset:
    """What a name stands for: one file, or the files of one folder."""

    about: str
    licence: str
    files: tuple[RemoteFile, ...]

    @property
    def path(self) -> str:
        """The file, or the folder of several, below the cache folder."""
        first = self.files[0].path
        return first if len(self.files) == 1 else str(PurePosixPath(first).parent)


def _autoencoder(repository: str, about: str) -> Asset:
    source = f"https://huggingface.co/stabilityai/{repository}/resolve/main"
    return Asset(
        about=f"autoencoder stabilityai/{repository}: {about}",
        licence="MIT",
        files=tuple(
            RemoteFile(f"{repository}/{name}", (f"{source}/{name}",), about=about, format=form)
            for name, about, form in (
                ("config.json", 1_000, "json"),
                ("diffusion_pytorch_model.safetensors", 334_600_000, "safetensors"),
            )
        ),
    )


ASSETS = {
    "sit-xl-2-256": Asset(
        about="velocity predictor SiT-XL/2 for ImageNet 256x256, 675 M parameters",
        licence="unknown (the code that made it: MIT)",
        files=(
            RemoteFile(
                "SiT-XL-2-256x256.pt",
                (
                    "https://huggingface.co/nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-256.pt",
                    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
                    "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
                ),
                about=2_700_000_000,
                format="torch",
            ),
        ),
    ),
    "sit-xl-2-refiner": Asset(
        about="FlowTurbo's velocity refiner for SiT-XL/2, 29 M parameters",
        licence="MIT (that of the release)",
        files=(
            RemoteFile(
                "SiT-XL-2-Refiner.pt",
                ("https://cloud.tsinghua.edu.cn/f/3d07d92dd2314857ae50/?dl=1",),
                about=119_000_000,
                format="torch",
            ),
        ),
    ),
    "vae-ema": _autoencoder("sd-vae-ft-ema", "the one of SiT and FlowTurbo"),
    "vae-mse": _autoencoder("sd-vae-ft-mse", "smoother images"),
    "inception": Asset(
        about="Inception-v3 weights for FID, as torch-fidelity ported them",
        licence="Apache-2.0 (that of torch-fidelity)",
        files=(
            RemoteFile(
                "weights-inception-2015-12-05-6726825d.pth",
                (
                    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                    "weights-inception-2015-12-05-6726825d.pth",
                ),
                95_628_359,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
    ),
    "adm-imagenet-256": Asset(
        about="the ADM suite's ImageNet 256x256 reference: statistics and 10 000 images",
        licence="unknown (holds ImageNet images)",
        files=(
            RemoteFile(
                "VIRTUAL_imagenet256_labeled.npz",
                (
                    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                    "VIRTUAL_imagenet256_labeled.npz",
                ),
                2_037_122_530,
                "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
            ),
        ),
    ),
}
