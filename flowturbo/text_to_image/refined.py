"""A refiner for any network of a flow pipeline: the network itself, of one transformer block, given the velocity too.

Source: FlowTurbo, section 4.1 (the refiner shares the predictor's architecture, with one block; InstaFlow's is a U-Net
of 43.5 M parameters).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.system.files import atomic_write
from flowturbo.text_to_image.families import Family, family_of

CARD = "README.md"
RECORD = "refiner.json"


def refiner_config(network: Any) -> dict[str, Any]:
    """The config of a network's refiner: one block, the velocity's channels behind those of x."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    family = family_of(network)
    out = int(config.get("out_channels") or config["in_channels"])
    answered = out * config.get("patch_size", 1) ** 2 if family.packed else out  # a token has those of a patch
    changes = {**family.depth, "in_channels": config["in_channels"] + answered, "out_channels": out}
    if "block_out_channels" in config:  # a U-Net: narrower too, which gives the paper's 43.5 M for InstaFlow's
        first, *others = config["block_out_channels"]
        changes["block_out_channels"] = (first // 2, *(width // 4 for width in others))
    return {**config, **changes}


def refiner_from(network: Any) -> FlowRefiner:
    """A refiner for a pipeline's transformer or U-Net, on the CPU or the meta device as the default device is.

    It begins as the network's embedders and first block, blind to the velocity, with an output of zero: at first the
    velocity is used again as it is. What has no counterpart in the network, as most of a U-Net, keeps its random start.
    Raises ValueError for a class that is not known.
    """
    family = family_of(network)
    refiner = type(network).from_config(refiner_config(network))
    ours = refiner.state_dict()
    theirs = {name.replace(".base_layer", ""): weight for name, weight in network.state_dict().items()}  # without LoRA
    with torch.no_grad():
        for name, weight in ours.items():
            if weight.is_meta or name not in theirs or theirs[name].is_meta:
                continue
            if theirs[name].shape == weight.shape:
                weight.copy_(theirs[name])
            elif name == f"{family.input}.weight" and theirs[name].shape[0] == weight.shape[0]:
                weight.copy_(_widened(theirs[name], weight, network.config.in_channels, family))
        output = refiner.get_submodule(family.output)
        for parameter in output.parameters():
            parameter.zero_()
    return FlowRefiner(refiner)


def _widened(weight: Tensor, shape_of: Tensor, channels: int, family: Family) -> Tensor:
    """An input layer's weights with zeros for the channels of the velocity, behind those of x."""
    if weight.ndim == 4:  # a convolution
        return torch.cat([weight, weight.new_zeros(len(weight), shape_of.shape[1] - channels, *weight.shape[2:])], 1)
    width, features = weight.shape
    more = shape_of.shape[1] - features
    if family.channels_last:
        patch = features // channels
        parts = weight.reshape(width, patch, channels)
        return torch.cat([parts, parts.new_zeros(width, patch, more // patch)], 2).flatten(1)
    return torch.cat([weight, weight.new_zeros(width, more)], 1)


class FlowRefiner(nn.Module):
    """A refiner r for a flow network of diffusers, with that network's own conventions.

    `network` is of the class of the one that it refines. It is called as that one is, with the velocity given first.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self.family = family_of(network)

    @property
    def config(self) -> Any:
        """The network's config."""
        return self.network.config

    def fits(self, network: nn.Module) -> bool:
        """Whether it has the shape of a refiner for this network."""
        if type(network) is not type(self.network):
            return False
        expected = refiner_config(network)
        return all(self.config.get(name) == expected[name] for name in ("in_channels", "out_channels"))

    def forward(self, velocity: Tensor, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The offset of a velocity at states, both as the refined network takes and gives them."""
        states = torch.cat([states, velocity], self.family.channel_dim)
        kwargs = {**kwargs, "return_dict": False}
        return self.network(states, *args, **kwargs)[0]

    def save_pretrained(self, folder: str | os.PathLike[str], record: Mapping[str, Any] | None = None) -> None:
        """Write weights (safetensors), config and a model card; `record`, of JSON types, says how it was trained."""
        self.network.save_pretrained(folder)
        record = dict(record or {})
        with atomic_write(Path(folder) / RECORD) as file:
            file.write(json.dumps(record, indent=2).encode() + b"\n")
        with atomic_write(Path(folder) / CARD) as file:
            file.write(_card(self, record).encode())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> FlowRefiner:
        """A refiner that `save_pretrained` has written. Raises ValueError for a folder that holds none."""
        import diffusers

        path = Path(folder) / "config.json"
        if not (Path(folder) / RECORD).is_file() or not path.is_file():
            raise ValueError(f"folder {os.fspath(folder)!r} holds no refiner: expected config.json and {RECORD}")
        kind = getattr(diffusers, json.loads(path.read_text(encoding="utf-8"))["_class_name"])
        return cls(kind.from_pretrained(folder, dtype=dtype)).eval()


def _card(refiner: FlowRefiner, record: Mapping[str, Any]) -> str:
    count = sum(p.numel() for p in refiner.parameters())
    made = "".join(f"- {name}: {value}\n" for name, value in record.items())
    return (
        "---\nlibrary_name: diffusers\ntags: [flowturbo, text-to-image]\n---\n\n# FlowTurbo refiner\n\n"
        f"A velocity refiner, {type(refiner.network).__name__} of {count:,} parameters (FlowTurbo, NeurIPS 2024).\n\n"
        "```python\nfrom flowturbo.text_to_image import FlowRefiner, apply_flowturbo\n\n"
        'apply_flowturbo(pipe, FlowRefiner.from_pretrained("FOLDER"), schedule="H1P5R3")\n```\n'
        + (f"\nTrained with:\n\n{made}" if made else "")
    )
