"""How the networks of diffusers' flow pipelines are called, and what their pipelines make of prompts, by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Arguments = dict[str, Any]  # of a network's forward
Conditions = dict[str, Tensor]  # a prompt's embeddings by their names, a row for each prompt


@dataclass(frozen=True)
class Family:
    """One class of networks.

    `conditions` maps what `encode` gives to the forward's arguments. The network is asked at `time(sigma, config)`, and
    answers `sign` times noise - data. `packed`: its latents are tokens (N, h·w / 4, 4C), and `places` makes, of latents
    x and the arguments so far, those that say where the tokens stand, or which of them count.
    `depth` are the config's entries for a refiner of one transformer block; `input` and `output` are its first and its
    last layer, and `channels_last` says that the input layer's features end with the channels of a patch.
    """

    conditions: Mapping[str, str]
    encode: Callable[[Any, list[str]], Sequence[Any]]
    depth: Mapping[str, Any]
    input: str
    output: str
    time: Callable[[Tensor, Any], Tensor] = lambda sigma, config: 1000 * sigma
    sign: int = 1
    packed: bool = False
    places: Callable[[Tensor, Arguments], Arguments] = lambda x, arguments: {}
    channels_last: bool = False

    @property
    def channel_dim(self) -> int:
        """Which dimension of a state holds the channels."""
        return 2 if self.packed else 1


def _unguided(pipe: Any, prompts: list[str]) -> Sequence[Any]:
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)


def _ids(axes: int) -> Callable[[Tensor, Arguments], Arguments]:
    """FLUX's positions: a row of coordinates for each token, (0, row, column) of an image's. FLUX.2 has a fourth, the
    number of a token of text."""

    def places(x: Tensor, arguments: Arguments) -> Arguments:
        rows, columns = (torch.arange(size // 2, device=x.device, dtype=x.dtype) for size in x.shape[2:])
        image = x.new_zeros(len(rows) * len(columns), axes)
        image[:, 1:3] = torch.cartesian_prod(rows, columns)
        tokens = arguments["encoder_hidden_states"].shape[1]
        text = x.new_zeros(tokens, axes)
        text[:, 3:] = torch.arange(tokens, device=x.device, dtype=x.dtype)[:, None]
        return {"img_ids": image, "txt_ids": text}

    return places


def _masked_ids(x: Tensor, arguments: Arguments) -> Arguments:
    """Chroma's: FLUX's positions, and a mask over the tokens of text and of the image, which all count."""
    found = _ids(3)(x, arguments)
    mask = arguments["attention_mask"]
    return {**found, "attention_mask": torch.cat([mask, mask.new_ones(len(x), len(found["img_ids"]))], 1)}


def _shapes(x: Tensor, arguments: Arguments) -> Arguments:
    """Qwen-Image's: frames, rows and columns of each image's tokens."""
    return {"img_shapes": [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)}


def _padded(embeddings: Tensor, mask: Tensor | None, tokens: int = 256) -> Sequence[Tensor]:
    """Qwen-Image's embeddings (N, tokens, C) and their mask: its pipeline pads them to a batch's longest prompt only,
    and has no mask where all are of one length."""
    kept = embeddings[:, :tokens]
    mask = kept.new_ones(kept.shape[:2]) if mask is None else mask[:, :tokens]
    more = tokens - kept.shape[1]
    return nn.functional.pad(kept, (0, 0, 0, more)), nn.functional.pad(mask, (0, more))


_EMBEDS = {"prompt_embeds": "encoder_hidden_states"}
_POOLED = {**_EMBEDS, "pooled_prompt_embeds": "pooled_projections"}
_MASKED = {**_EMBEDS, "prompt_attention_mask": "encoder_attention_mask"}

FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": Family(
        _POOLED,
        lambda pipe, prompts: pipe.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)[::2],
        {"num_layers": 1, "dual_attention_layers": ()},
        "pos_embed.proj",
        "proj_out",
    ),
    "FluxTransformer2DModel": Family(
        _POOLED,
        lambda pipe, prompts: pipe.encode_prompt(prompts, prompts)[:2],
        {"num_layers": 1, "num_single_layers": 0},
        "x_embedder",
        "proj_out",
        time=lambda sigma, config: sigma,
        packed=True,
        places=_ids(3),
    ),
    "Lumina2Transformer2DModel": Family(
        _MASKED,
        lambda pipe, prompts: _unguided(pipe, prompts)[:2],
        {"num_layers": 1, "num_refiner_layers": 0},
        "x_embedder",
        "norm_out.linear_2",
        time=lambda sigma, config: 1 - sigma,
        sign=-1,
        channels_last=True,
    ),
    "SanaTransformer2DModel": Family(
        _MASKED,
        lambda pipe, prompts: _unguided(pipe, prompts)[:2],
        {"num_layers": 1},
        "patch_embed.proj",
        "proj_out",
        time=lambda sigma, config: 1000 * sigma * config.timestep_scale,
    ),
    "AuraFlowTransformer2DModel": Family(
        _EMBEDS,
        lambda pipe, prompts: _unguided(pipe, prompts)[:1],
        {"num_mmdit_layers": 1, "num_single_dit_layers": 0},
        "pos_embed.proj",
        "proj_out",
        time=lambda sigma, config: sigma,
    ),
    "ChromaTransformer2DModel": Family(
        {**_EMBEDS, "prompt_attention_mask": "attention_mask"},
        lambda pipe, prompts: pipe.encode_prompt(prompts)[::2],
        {"num_layers": 1, "num_single_layers": 0},
        "x_embedder",
        "proj_out",
        time=lambda sigma, config: sigma,
        packed=True,
        places=_masked_ids,
    ),
    "Flux2Transformer2DModel": Family(
        _EMBEDS,
        lambda pipe, prompts: pipe.encode_prompt(prompts)[:1],
        {"num_layers": 1, "num_single_layers": 0},
        "x_embedder",
        "proj_out",
        time=lambda sigma, config: sigma,
        packed=True,
        places=_ids(4),
    ),
    "QwenImageTransformer2DModel": Family(
        {**_EMBEDS, "prompt_embeds_mask": "encoder_hidden_states_mask"},
        lambda pipe, prompts: _padded(*pipe.encode_prompt(prompts)),
        {"num_layers": 1},
        "img_in",
        "proj_out",
        time=lambda sigma, config: sigma,
        packed=True,
        places=_shapes,
    ),
    "UNet2DConditionModel": Family(  # InstaFlow's
        _EMBEDS,
        lambda pipe, prompts: pipe.encode_prompt(prompts, pipe._execution_device, 1, False)[:1],
        {"layers_per_block": 1},
        "conv_in",
        "conv_out",
        sign=-1,
    ),
}


def family_of(network: nn.Module) -> Family:
    """The family of a network. Raises ValueError for one that is not known."""
    name = type(network).__name__
    if name not in FAMILIES:
        raise ValueError(f"a {name} is not one of the networks that are known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def network_of(pipe: Any) -> Any:
    """The network that a pipeline samples with. Raises ValueError where it has none."""
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return getattr(pipe, name)
    raise ValueError(f"a {type(pipe).__name__} has neither a transformer nor a U-Net")


def velocity(
    network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: Tensor | None = None
) -> Tensor:
    """dx/dsigma at latents x (N, C, h, w) and noise levels sigma (N,), for conditions of N rows.

    guidance (N,): what networks with a guidance embedding are asked for. A refiner's x has the velocity's channels
    behind its own; its answer is an offset, of the same sign.
    """
    family = family_of(network)
    config: Any = network.config
    arguments: Arguments = {argument: conditions[name] for name, argument in family.conditions.items()}
    for name in arguments:
        if "mask" in name:  # cached in half precision, as all is
            arguments[name] = arguments[name].bool()
    arguments |= family.places(x, arguments)
    if config.get("guidance_embeds"):
        arguments["guidance"] = torch.ones_like(sigma) if guidance is None else guidance
    states = pack(x) if family.packed else x
    output = network(states, timestep=family.time(sigma, config), return_dict=False, **arguments)[0]
    output = unpack(output, x.shape) if family.packed else output
    return family.sign * output


def pack(x: Tensor) -> Tensor:
    """Latents (N, C, h, w) as FLUX's tokens (N, h·w / 4, 4C): a token for each 2x2, a channel's four together."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack` has packed, of any number of channels, at the shape's height and width."""
    n, _, h, w = shape
    return tokens.reshape(n, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, -1, h, w)
