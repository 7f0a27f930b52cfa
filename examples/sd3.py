"""Stable Diffusion 3 with FlowTurbo: second order instead of Euler's steps, in one line; then a refiner.

python examples/sd3.py "a red fox in the snow"                       # 8 evaluations instead of 28
python examples/sd3.py "a red fox in the snow" --refiner runs/000-refiner-t2i/network
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

from flowturbo import FlowTurboScheduler
from flowturbo.text_to_image import FlowRefiner, apply_flowturbo


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", default="stabilityai/stable-diffusion-3.5-medium")
    parser.add_argument("--refiner", help="a folder that text_to_image.py train has written")
    parser.add_argument("--out", default="sd3.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, dtype=dtype).to(device)
    if options.refiner:
        refiner = FlowRefiner.from_pretrained(options.refiner)
        steps = apply_flowturbo(pipe, refiner, schedule="H1P5R3").evaluations
    else:
        pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config)
        steps = 8
    generator = torch.Generator().manual_seed(0)
    pipe(options.prompt, num_inference_steps=steps, generator=generator).images[0].save(options.out)


if __name__ == "__main__":
    main()
