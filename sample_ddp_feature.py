"""Sample many images for evaluation, on any number of GPUs or CPU processes; 50 000 by default.

Usage:
  torchrun --nnodes=1 --nproc_per_node=N sample_ddp_feature.py --cfg-scale 1.5 --tag h1p5r3
  torchrun --nnodes=1 --nproc_per_node=N sample_ddp_feature.py --features inception --png --tag with-features
  torchrun --nnodes=1 --nproc_per_node=N sample_ddp_feature.py --pipeline DIR --prompts FILE --schedule A8 --tag a8
  python evaluator.py REFERENCE.npz samples/h1p5r3.npz

With --pipeline the images are a diffusers pipeline's, of the captions in a file; its other flags: --pipeline --help.

Image i depends on the seed and i alone: the number of ranks changes no byte. Interrupted? Run the same command
again; only what is missing is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions, SetOptions
from flowturbo.system import cli

if TYPE_CHECKING:
    from flowturbo.sampling.sample_set import Summary


def main(argv: Sequence[str] | None = None) -> Summary:
    arguments = cli.hyphenate(argv)
    if any(argument.partition("=")[0] == "--pipeline" for argument in arguments):
        return of_prompts(arguments)
    kinds = {"what to sample": SetOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    options, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS, cfg_scale=1.5)

    from flowturbo.sampling.sample_set import make_sample_set
    from flowturbo.system.distributed import world

    # Nobody waits for another rank while sampling; at the end the slowest may be far behind.
    with world(network_options.device, timeout=timedelta(days=7)) as ranks:
        return make_sample_set(options, network_options, sampling, ranks)


def of_prompts(argv: Sequence[str]) -> Summary:
    """Sample a diffusers pipeline's images of captions."""
    from flowturbo.text_to_image.options import CaptionSetOptions, TextSamplingOptions

    kinds = {"what to sample": SetOptions, "captions": CaptionSetOptions, "pipeline": TextSamplingOptions}
    options, captions, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, schedule="A8")

    from flowturbo.system.distributed import world
    from flowturbo.text_to_image.sample_set import make_caption_set

    with world(sampling.device, timeout=timedelta(days=7)) as ranks:
        return make_caption_set(options, captions.read(), sampling, ranks)


if __name__ == "__main__":
    cli.run_script(main)
