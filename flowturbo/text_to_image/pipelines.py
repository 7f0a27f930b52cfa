"""Pipelines of diffusers in this project's hands: loading, and what they make of prompts and images."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowturbo.text_to_image.families import family_of, network_of, pack, unpack

Encoded = dict[str, Tensor]


def load_pipeline(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """A pipeline from a folder, or from the hub where that is reached; components that it was saved without are None.

    Raises ValueError for a folder that holds none, and for what is neither.
    """
    import diffusers

    import flowturbo  # noqa: F401 (diffusers takes a scheduler of ours from a package that is imported already)

    missing: dict[str, None] = {}
    if not Path(name).is_dir():
        if name.count("/") != 1:
            raise ValueError(f"pipeline {name!r} is no folder here, and no OWNER/NAME of a hub")
    else:
        index = Path(name) / "model_index.json"
        if not index.is_file():
            raise ValueError(f"folder {name!r} holds no pipeline: expected model_index.json")
        parts = json.loads(index.read_text(encoding="utf-8"))
        missing = {part: None for part, value in parts.items() if value == [None, None]}
    diffusers.utils.logging.disable_progress_bar()
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtype, **missing)
    return pipe.to(device)


def encode_prompts(pipe: Any, prompts: list[str]) -> Encoded:
    """The embeddings of prompts by the names of their family's conditions, a row each.

    A pipeline without text encoders whose network takes states of 384 channels is taken for one of MiniLM.
    """
    family = family_of(network_of(pipe))
    if getattr(pipe, "text_encoder", None) is None and network_of(pipe).config.get("joint_attention_dim") == 384:
        from flowturbo.text_to_image import minilm

        found: Any = minilm.encode(prompts)
    else:
        found = family.encode(pipe, prompts)
    return dict(zip(family.conditions, found))


def image_channels(pipe: Any) -> int:
    """Of the images that a pipeline makes."""
    vae = getattr(pipe, "vae", None)
    return 3 if vae is not None else int(network_of(pipe).config.in_channels)


def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Latents (N, C, h, w) of images in [-1, 1], as the network works on them; without an autoencoder the images."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return images
    images, config = images.to(vae.device, vae.dtype), vae.config
    frames = "temperal_downsample" in config  # Qwen-Image's autoencoder is one of videos
    encoded = vae.encode(images[:, :, None] if frames else images)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    if frames:
        mean, std = (latents.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return (latents[:, :, 0] - mean) / std
    if hasattr(vae, "bn"):  # FLUX.2's latents are normalised as its network takes them, by the channels of a token
        tokens = pack(latents)
        tokens = (tokens - vae.bn.running_mean) / (vae.bn.running_var + config.batch_norm_eps).sqrt()
        return unpack(tokens, latents.shape)
    return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor


def latent_shape(pipe: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of height and width `size`; without an autoencoder those of the images."""
    network = network_of(pipe)
    factor = 1 if getattr(pipe, "vae", None) is None else pipe.vae_scale_factor
    channels = network.config.in_channels // (4 if family_of(network).packed else 1)
    return channels, size[0] // factor, size[1] // factor


def shift_of(pipe: Any, size: tuple[int, int], evaluations: int = 10) -> float:
    """The shift of noise levels for images of height and width `size`, static or dynamic; FLUX.2's depends on the
    number of evaluations too."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1)
    _, h, w = latent_shape(pipe, size)
    tokens = h * w // 4
    if type(pipe).__name__.startswith("Flux2"):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(tokens, evaluations)
    else:
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        mu = low + (high - low) * (tokens - least) / (most - least)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def guidance_of(pipe: Any) -> float:
    """The guidance that a pipeline samples with where none is given."""
    defaults = {name: each.default for name, each in inspect.signature(type(pipe).__call__).parameters.items()}
    value = defaults["guidance_scale"]
    return float(defaults["true_cfg_scale"] if value is None else value)


def fingerprint(parts: Any, network: bool = False) -> str:
    """A sha256 over the weights of a pipeline's autoencoder and text encoders, and of its `network` if asked for, or
    over those of one module; by the first numbers of each tensor, since pipelines have billions."""
    digest = hashlib.sha256()
    modules = {"": parts} if isinstance(parts, torch.nn.Module) else parts.components
    for name, part in sorted(modules.items()):
        if not isinstance(part, torch.nn.Module) or (part is not parts and part is network_of(parts) and not network):
            continue
        for key, value in part.state_dict().items():
            few = value.flatten()[:8].float().tolist()
            digest.update(f"{name}.{key}{tuple(value.shape)}{few}".encode())
    return digest.hexdigest()
