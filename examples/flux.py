"""FLUX.1 [dev] with FlowTurbo, which keeps the model's dynamic shift, and fits 80 GB or less by offloading.

python examples/flux.py "a red fox in the snow" --steps 10
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

from flowturbo import FlowTurboScheduler


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--steps", type=int, default=10, help="evaluations of the transformer")
    parser.add_argument("--solver", default="A", help="A, M, P: see docs/text-to-image.md")
    parser.add_argument("--out", default="flux.png")
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        pipe.enable_model_cpu_offload()
    pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config, solver=options.solver)
    generator = torch.Generator().manual_seed(0)
    pipe(options.prompt, num_inference_steps=options.steps, generator=generator).images[0].save(options.out)


if __name__ == "__main__":
    main()
