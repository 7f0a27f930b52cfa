"""SiT: the scalable interpolant transformer, here the velocity predictor, and its named configurations.

The state dict is that of the public SiT checkpoints, key for key.

Source: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", 2024; blocks after Peebles & Xie, "Scalable Diffusion Models with Transformers" (DiT), 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowturbo.configurations import SIT_CONFIGS

__all__ = ["SIT_CONFIGS", "SiT"]

RunBlock = Callable[["Block", Tensor, Tensor], Tensor]


def run_block(block: Block, tokens: Tensor, modulation: Tensor) -> Tensor:
    """A block's output."""
    return block(tokens, modulation)


class SiT(nn.Module):
    """A transformer that predicts the velocity of a flow, conditioned on time and class.

    Arguments: `input_size` the height and width of its input in latent pixels, or the pair of them;
    `num_classes` without the null class, which gets the index num_classes where `class_dropout_prob` > 0;
    `learn_sigma` doubles the output channels as the public checkpoints have them; the second half is unused.
    Raises ValueError for sizes that do not divide.
    """

    images_in = 1  # images concatenated along the channels at the input: x

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
        self.blocks = Blocks(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj  # a convolution that is a linear map of each patch
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, projection.bias))
        of_time = (linear(self.t_embedder.mlp, k).weight for k in (0, 2))
        for weight in (self.y_embedder.embedding_table.weight, *of_time):
            nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: every block starts as the identity and the network as zero.
        for layers in (*(block.adaLN_modulation for block in self.blocks), self.final_layer.adaLN_modulation):
            nn.init.zeros_(linear(layers, 1).weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Velocity at x and t.

        x (N, C, H, W); t (N,) in [0, 1], 0 noise and 1 data; y (N,) int64 class indices; drop (N,) bool,
        True puts the null class in place of the label. Returns (N, C, H, W).
        Raises ValueError for an x of another shape, and for `drop` on a model without a null class.
        """
        return self.evaluate((x,), t, y, drop)

    def evaluate(
        self,
        images: tuple[Tensor, ...],
        t: Tensor,
        y: Tensor,
        drop: Tensor | None = None,
        run: RunBlock = run_block,
    ) -> Tensor:
        """`forward` for all that it sees, with a choice of how each of its blocks is run."""
        patches = [self.to_patches(image, name) for image, name in zip(images, "xv")]
        labels = y if drop is None else torch.where(drop, self.null_class, y)
        return self.to_images(self.transform(self.embed(*patches), self.modulations(t, labels), run))

    def modulations(self, t: Tensor, labels: Tensor) -> Tensor:
        """All that depends on time and class, and not on the image: adaLN's shifts, scales and gates, layer by layer.

        t (N,) in [0, 1]; labels (N,) int64, num_classes for the null class. Returns (N, 6 * depth + 2, hidden_size).
        """
        condition = self.t_embedder(t) + self.y_embedder(labels)
        of_blocks = [block.adaLN_modulation(condition.to(block.dtype)) for block in self.blocks]
        modulations = torch.cat([*of_blocks, self.final_layer.adaLN_modulation(condition)], dim=1)
        return modulations.to(condition.dtype).unflatten(1, (-1, self.width))

    def embed(self, *patches: Tensor) -> Tensor:
        """Patches, of each image it sees, (N, T, p*p, C) as of `to_patches` -> tokens (N, T, hidden_size)."""
        inputs = torch.cat(patches, dim=-1)
        # States stay in float32 also in a network that is all in half precision.
        return self.x_embedder(inputs.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed

    def transform(self, tokens: Tensor, modulations: Tensor, run: RunBlock = run_block) -> Tensor:
        """Tokens as of `embed`, and modulations as of `modulations` -> the velocity in patches."""
        *of_blocks, of_final = modulations.split(6, dim=1)
        for block, modulation in zip(self.blocks, of_blocks, strict=True):
            tokens = run(block, tokens, modulation)
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

    @property
    def null_class(self) -> int:
        """The index of the null class. Raises ValueError on a model without one."""
        if self.class_dropout_prob <= 0:
            raise ValueError("this model has no null class (class_dropout_prob is 0): it cannot drop labels")
        return self.num_classes


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

    Its weights may be in half precision while all else is in float32 (`networks.precision.cast`): the matrix products
    are then in half, the sum that runs through the blocks is not.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return linear(self.adaLN_modulation, 1).weight.dtype

    def forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """tokens (N, T, D); modulation (N, 6, D): shift, scale and gate of the attention, then of the MLP."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation[:, :, None].unbind(1)
        inputs = modulate(self.norm1(tokens), shift_attn, scale_attn).to(self.dtype)
        tokens = tokens + gate_attn * self.attn(inputs)
        inputs = modulate(self.norm2(tokens), shift_mlp, scale_mlp).to(self.dtype)
        return tokens + gate_mlp * self.mlp(inputs)


class Blocks(nn.ModuleList):
    """The transformer blocks in their order."""

    def __iter__(self) -> Iterator[Block]:
        return cast("Iterator[Block]", super().__iter__())


def linear(layers: nn.Sequential, index: int) -> nn.Linear:
    """A linear layer among others."""
    return cast(nn.Linear, layers[index])


class Attention(nn.Module):
    """Self-attention of `num_heads` heads. `fused` False: as two plain matrix products."""

    fused = True

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


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
        return self.mlp(features.to(linear(self.mlp, 0).weight.dtype))


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


def sincos_positions(hidden_size: int, height: int, width: int) -> Tensor:
    """Fixed 2-D positions (height*width, hidden_size): the first half of the channels encodes the column,
    the second the row, each as sines then cosines (He et al., MAE, 2022)."""
    quarter = hidden_size // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
