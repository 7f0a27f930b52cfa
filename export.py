"""Export a trained network: its weights and config in one file that every script loads, and a model card.

Usage:
  python export.py results/000-refiner-no-note -o refiner.safetensors
  python export.py results/000-refiner-no-note/checkpoints/0005000.pt -o half.pt --dtype fp16
  python export.py results/000-refiner-no-note -o refiner.safetensors --push-to-hub me/my-refiner
  python sample.py --refiner-ckpt refiner.safetensors

The weights are the averaged (EMA) ones. The card, refiner.md, holds the config, the training settings and how to use
the file. Paths in the settings are reduced to their last part.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option

if TYPE_CHECKING:
    from flowturbo.weights.info import CheckpointInfo


@dataclass(frozen=True)
class Options:
    """What to export, and where to. Raises ValueError for impossible values."""

    run: str = option(
        help="a run's folder, for its newest checkpoint, or a checkpoint file", positional=True, metavar="RUN"
    )
    out: str = option(help="ending in .safetensors or .pt", flags=("-o",), metavar="FILE")
    dtype: str = option("fp32", "of the exported weights", choices=("fp32", "bf16", "fp16"))
    push_to_hub: str | None = option(None, "upload weights and card to this hub repository", metavar="OWNER/NAME")
    private: bool = option(False, "create that repository as a private one")

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"push_to_hub {self.push_to_hub!r} must be OWNER/NAME")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.new_parser(__doc__)
    parser.prog = prog or parser.prog
    (options,) = cli.parse(parser, argv, {"what to export": Options})
    for path in (options.out, Path(options.out).with_suffix(".md")):
        check_writable(path)

    import torch

    from flowturbo.networks.precision import pick_precision
    from flowturbo.weights.checkpoint import resolve
    from flowturbo.weights.export import export_weights, push, write_card

    checkpoint, dtype = resolve(options.run), pick_precision(options.dtype, torch.device("cpu"))
    info = export_weights(checkpoint, options.out, dtype, says_nothing())
    card = write_card(info, dtype, usage(info))
    print(f"{checkpoint} -> {info.path} ({info.path.stat().st_size:,} bytes), {card}")
    if options.push_to_hub:
        print(f"uploaded to {push(info.path, card, options.push_to_hub, options.private)}")


def says_nothing() -> dict[str, set[str]]:
    """The settings that say nothing of an exported network, by its class: of its size, which its config has, of files
    and of another target."""
    from flowturbo.training.options import OutputOptions, PredictorOptions, RefinerOptions

    sizes = {each.name for each in fields(PredictorOptions) if not each.metadata.get("shapes")}
    times = {each.name for each in fields(PredictorOptions)} - {"path_type"}
    output = {each.name for each in fields(OutputOptions)}
    return {
        "SiT": sizes | output | {each.name for each in fields(RefinerOptions)},
        "VelocityRefiner": times | output,
    }


def usage(info: CheckpointInfo) -> str:
    """The command that samples with an exported file."""
    name = shlex.quote(info.path.name)
    command = f"python sample.py --predictor-ckpt {name} --schedule H8"
    if info.kind == "VelocityRefiner":
        command = f"python sample.py --predictor-ckpt PREDICTOR --refiner-ckpt {name} --schedule H1P5R3"
    vae = info.training.get("vae_ckpt")
    return f"{command} --vae-ckpt {shlex.quote(vae)}" if isinstance(vae, str) and vae else command


if __name__ == "__main__":
    cli.run_script(main)
