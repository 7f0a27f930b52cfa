"""The autoencoder between images and latents: any diffusers AutoencoderKL, or none for pixel-space models."""

from __future__ import annotations

import hashlib
import logging
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.system.claims import read_record
from flowturbo.system.files import check_file
from flowturbo.system.values import shown, typed
from flowturbo.weights.cache import MissingWeights, is_offline, locate
from flowturbo.weights.pickles import check_pickles

MOST_LAYERS = 64  # in a block of an autoencoder; Stable Diffusion's have 2
ALIASES = {
    "vae-ema": "stabilityai/sd-vae-ft-ema",
    "vae-mse": "stabilityai/sd-vae-ft-mse",
}


class Autoencoder(nn.Module):
    """Images in [-1, 1] <-> scaled latents, as three separate calls: `moments`, `sample`, `decode`.

    Scale and shift come from the network's config (0.18215 for Stable Diffusion's). `channels` is that of the
    latents, `factor` how many times smaller they are than the images.
    """

    def __init__(self, network: Any):
        super().__init__()
        # Convolutions are faster with the channels last: 1.15 times on a CPU, more on a GPU.
        self.network = network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.scale = float(network.config.scaling_factor)
        self.shift = float(getattr(network.config, "shift_factor", None) or 0.0)
        if not (0 < self.scale < math.inf and math.isfinite(self.shift)):
            raise ValueError(
                f"scaling_factor {self.scale} and shift_factor {self.shift}: expected numbers, the first > 0"
            )
        self.channels = int(network.config.latent_channels)
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """The sha256 of the weights in float32: what cached moments depend on."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance (N, 2C, h, w) of the latents of images (N, 3, H, W), before scaling."""
        return self.network.encode(images.to(self.network.dtype)).latent_dist.parameters

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) drawn from the moments with standard normal noise; float32."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W), about [-1, 1], float32, from scaled latents."""
        return self.network.decode((latents / self.scale + self.shift).to(self.network.dtype)).sample.float()

    def compile(self) -> None:
        """Make the decoder a static graph on CUDA; on a CPU that takes half a minute and gains nothing."""
        if next(self.network.parameters()).is_cuda:
            self.network.decoder.compile(dynamic=False)


class NoAutoencoder(nn.Module):
    """The same calls for models that work on pixels: every one returns its input."""

    channels = None  # as many as the images have
    factor = 1

    def fingerprint(self) -> None:
        """There are no weights."""

    def compile(self) -> None:
        """There is nothing to compile."""

    def moments(self, images: Tensor) -> Tensor:
        return images

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def load_autoencoder(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder | NoAutoencoder:
    """The autoencoder called `name`: an alias ("vae-ema", "vae-mse"), a local folder, a hub id, or "none".

    Raises MissingWeights where it is neither here nor can be fetched, ValueError naming one that cannot be loaded.
    """
    if name == "none":
        return NoAutoencoder()
    from diffusers import AutoencoderKL

    found = locate(name) if name else None
    local = found is not None and found.is_dir()
    source = str(found) if local else ALIASES.get(name, name)
    if not local and (name.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(
            f"autoencoder {name!r} is neither a folder, an alias ({', '.join(ALIASES)}), a hub id nor 'none'"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, line by line, say no more than below
    try:
        if local:
            _check_folder(Path(source))
        network = AutoencoderKL.from_pretrained(
            source, dtype=dtype, low_cpu_mem_usage=False, local_files_only=is_offline()
        )
        autoencoder = Autoencoder(network)
    except Exception as error:  # diffusers takes a config as it is, and fails as that happens to
        if local:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cannot load autoencoder {source}: {reason}") from None
        if not isinstance(error, (OSError, ValueError, RuntimeError, KeyError)):
            raise
        raise MissingWeights(
            {"vae_ckpt": name},
            f"autoencoder {source} is not in the hub's local cache and could not be fetched; a local one is the folder "
            "of an AutoencoderKL with config.json and weights",
        ) from None
    return autoencoder.to(device)


def _check_folder(folder: Path) -> None:
    """Raises ValueError for what would be waited for, built or read without end: pipes, deep networks, pickles."""
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")]
    for path in files:
        check_file(path)
        if path.suffix == ".bin":
            check_pickles(str(path), zipfile.is_zipfile(path))
    config = read_record(folder / "config.json") or {}
    layers = typed(config.get("layers_per_block", 1), int, "its layers_per_block")
    if not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"its layers_per_block is {shown(layers)}, expected 1 to {MOST_LAYERS}")
