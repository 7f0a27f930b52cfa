"""SiT: the scalable interpolant transformer, here the velocity predictor, and its named configurations.

The state dict is that of the public SiT checkpoints, key for key.

Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", 2024; blocks after Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor

_WIDTHS = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
SIT_CONFIGS: dict[str, dict[str, int]] = {
    f"SiT-{name}/{patch_size}": {"patch_size": patch_size, **width}
    for name, width in _WIDTHS.items()
    for patch_size in (2, 4, 8)
}


class SiT(nn.Module):
    """A transformer that predicts the velocity of a flow, conditioned on time and class.

    Arguments: `input_size` the height and width of its input in latent pixels, or the pair of them;
    `num_classes` without the null class, which gets the index num_classes where `class_dropout_prob` > 0;
    `learn_sigma` doubles the output channels as the public checkpoints have them; the second half is unused.
    Raises ValueError for sizes that do not divide.
    """

    images_in = 1  # images concatenated along the channels at the input: x
    regional = True  # torch.compile makes one graph for all blocks; False: one of the whole network

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"input_size {height}x{width} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        self.config: dict[str, Any] = {
            "input_size": height if height == width else [height, width],
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
        }
        self.input_shape = (in_channels, height, width)
        self.patch_size = patch_size
        self.width = hidden_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbedder(in_channels * self.images_in, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        grid = (height // patch_size, width // patch_size)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, *grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj  # a convolution that is a linear map of each patch
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: every block starts as the identity and the network as zero.
        for module in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Velocity at x and t.

        x (N, C, H, W); t (N,) in [0, 1], 0 noise and 1 data; y (N,) int64 class indices; drop (N,) bool,
        True puts the null class in place of the label. Returns (N, C, H, W).
        Raises ValueError for an x of another shape, and for `drop` on a model without a null class.
        """
        patches = self.to_patches(x, "x")
        return self.to_images(self.evaluate(self.modulations(t, self._labels(y, drop)), patches))

    def modulations(self, t: Tensor, labels: Tensor) -> Tensor:
        """All that depends on time and class, and not on the image: adaLN's shifts, scales and gates, layer by layer.

        t (N,) in [0, 1]; labels (N,) int64, num_classes for the null class. Returns (N, 6 * depth + 2, hidden_size).
        """
        condition = self.t_embedder(t) + self.y_embedder(labels)
        of_blocks = [block.adaLN_modulation(condition.to(block.dtype)) for block in self.blocks]
        modulations = torch.cat([*of_blocks, self.final_layer.adaLN_modulation(condition)], dim=1)
        return modulations.to(condition.dtype).unflatten(1, (-1, self.width))

    def evaluate(self, modulations: Tensor, *patches: Tensor) -> Tensor:
        """The network in the space of patches, with its conditioning computed beforehand.

        patches, of each image it sees, (N, T, p*p, C) as of `to_patches`; modulations as of `modulations`, N rows, or
        2N for both branches of guidance, whose states are the same. Returns a row for each of the modulations'.
        """
        rows = max(map(len, patches))
        inputs = torch.cat([p if len(p) == rows else torch.cat([p, p]) for p in patches], dim=-1)
        inputs = inputs.to(self.x_embedder.proj.weight.dtype)  # states stay in float32 in a network all in half
        tokens = self.x_embedder(inputs) + self.pos_embed
        if len(tokens) < len(modulations):
            tokens = torch.cat([tokens, tokens])
        *of_blocks, of_final = modulations.split(6, dim=1)
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            tokens = run_block(block, tokens, modulation) if self.regional else block(tokens, modulation)
        outputs = self.final_layer(tokens, of_final).unflatten(-1, (self.patch_size**2, self.out_channels))
        return outputs[..., : self.input_shape[0]]  # of the learned-sigma channels only the mean's half

    def to_patches(self, images: Tensor, name: str = "noise") -> Tensor:
        """(N, C, H, W) -> (N, T, p*p, C): T patches of p*p pixels, both in rows.

        Raises ValueError, naming them so, for images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"{name} has shape {tuple(images.shape)}, expected (N, {expected})")
        patches = images.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def to_images(self, patches: Tensor) -> Tensor:
        """The inverse of `to_patches`."""
        _, height, width = self.input_shape
        p = self.patch_size
        images = patches.unflatten(2, (p, p)).unflatten(1, (height // p, width // p))
        return images.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def cast(self, dtype: torch.dtype) -> SiT:
        """The same network with the weights of its blocks, 99 % of all in SiT-XL/2, held in dtype and nothing else.

        What surrounds the blocks costs next to nothing and stays in float32: in half precision it would make most
        of the rounding error. On a CPU, attention in half precision is faster as two plain matrix products.
        """
        self.blocks.to(dtype)
        for block in self.blocks:
            block.attn.fused_attn = self.pos_embed.is_cuda or dtype == torch.float32
        return self

    @property
    def null_class(self) -> int:
        """The index of the null class. Raises ValueError on a model without one."""
        if self.class_dropout_prob <= 0:
            raise ValueError("this model has no null class (class_dropout_prob is 0): it cannot drop labels")
        return self.num_classes

    def _labels(self, y: Tensor, drop: Tensor | None) -> Tensor:
        return y if drop is None else torch.where(drop, self.null_class, y)


class PatchEmbedder(nn.Module):
    """Patches -> tokens. The weight has a convolution's shape, as in the public checkpoints."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, T, p*p, C) -> (N, T, D)."""
        return F.linear(patches.flatten(2), self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class Block(nn.Module):
    """A transformer block with adaptive layer norm (adaLN-Zero) conditioning.

    Its weights may be in half precision while all else is in float32 (`SiT.cast`): the matrix products are then in
    half, the sum that runs through the blocks is not.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=_gelu_tanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return self.adaLN_modulation[1].weight.dtype

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """tokens (N, T, D); modulation (N, 6, D): shift, scale and gate of the attention, then of the MLP."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation[:, :, None].unbind(1)
        inputs = modulate(self.norm1(tokens), shift_attn, scale_attn).to(self.dtype)
        tokens = tokens + gate_attn * self.attn(inputs)
        inputs = modulate(self.norm2(tokens), shift_mlp, scale_mlp).to(self.dtype)
        return tokens + gate_mlp * self.mlp(inputs)


@torch.compiler.nested_compile_region
def run_block(block: Block, tokens: Tensor, modulation: Tensor) -> Tensor:
    """A block's output. Within torch.compile all blocks share the compilation of one."""
    return block(tokens, modulation)


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """tokens (N, T, D) and modulation (N, 2, D) -> patches (N, T, p*p*C_out)."""
        shift, scale = modulation[:, :, None].unbind(1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class TimestepEmbedder(nn.Module):
    """Times in [0, 1] -> vectors: sines and cosines, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
        angles = t[:, None].float() * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class vectors; the last row is the null class where the model has one."""

    def __init__(self, rows: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine map."""
    return x * (1 + scale) + shift


def _gelu_tanh() -> nn.Module:
    return nn.GELU(approximate="tanh")


def sincos_positions(hidden_size: int, height: int, width: int) -> Tensor:
    """Fixed 2-D positions (height*width, hidden_size): the first half of the channels encodes the column,
    the second the row, each as sines then cosines (He et al., MAE, 2022)."""
    quarter = hidden_size // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()


def config_from_state(state: Mapping[str, Tensor], images_in: int = 1) -> dict[str, Any]:
    """The keyword arguments of a SiT from the shapes in its state dict, for checkpoints that carry none.

    `images_in` is 2 for a velocity refiner. The number of heads leaves no trace in the weights: it is taken
    from the SiT of the same width. Raises ValueError where that is unknown or keys are missing.
    """
    try:
        hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        out_channels = state["final_layer.linear.weight"].shape[0] // patch_size**2
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size
    except KeyError as error:
        raise ValueError(f"not the weights of a SiT: no {error.args[0]}") from None
    except (IndexError, ValueError, ArithmeticError):
        raise ValueError("not the weights of a SiT: their shapes are others") from None
    heads = {w["hidden_size"]: w["num_heads"] for w in _WIDTHS.values()}
    side = math.isqrt(tokens)
    if hidden_size not in heads or side * side != tokens:
        raise ValueError(
            f"the checkpoint holds no config, and width {hidden_size} with {tokens} tokens is no SiT of the "
            f"family (widths {', '.join(map(str, heads))}, square inputs)"
        )
    in_channels = channels // images_in
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_heads": heads[hidden_size],
        "mlp_ratio": mlp_ratio,
        "class_dropout_prob": 0.1,  # every public SiT has a null class, the last row
        "num_classes": rows - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }
