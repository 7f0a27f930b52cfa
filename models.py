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
from timm.layers import Mlp, PatchEmbed
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
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(
            (height, width), patch_size, in_channels * self.images_in, hidden_size, bias=True
        )
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
        self._check_shapes(x=x)
        return self._transform(x, t, self._labels(y, drop))

    def _check_shapes(self, **images: Tensor) -> None:
        for name, image in images.items():
            if image.ndim != 4 or tuple(image.shape[1:]) != self.input_shape:
                expected = ", ".join(map(str, self.input_shape))
                raise ValueError(f"{name} has shape {tuple(image.shape)}, expected (N, {expected})")

    def _labels(self, y: Tensor, drop: Tensor | None) -> Tensor:
        if drop is None:
            return y
        if self.class_dropout_prob <= 0:
            raise ValueError("this model has no null class (class_dropout_prob is 0): it cannot drop labels")
        return torch.where(drop, self.num_classes, y)

    def _transform(self, images: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        images = images.to(self.x_embedder.proj.weight.dtype)  # states stay in float32 where weights are in half
        tokens = self.x_embedder(images) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, p*p*C_out) -> (N, C, H, W); of the learned-sigma channels only the mean's half."""
        channels, height, width = self.input_shape
        p = self.patch_size
        patches = tokens.reshape(-1, height // p, width // p, p, p, self.out_channels)
        images = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)
        return images[:, :channels]


class Block(nn.Module):
    """A transformer block with adaptive layer norm (adaLN-Zero) conditioning."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=_gelu_tanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        tokens = tokens + gate_attn * self.attn(modulate(self.norm1(tokens), shift_attn, scale_attn))
        return tokens + gate_mlp * self.mlp(modulate(self.norm2(tokens), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
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
