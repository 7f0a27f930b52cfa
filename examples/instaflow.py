"""InstaFlow (2-rectified flow from Stable Diffusion 1.5) with FlowTurbo, in diffusers' StableDiffusionPipeline.

Its U-Net answers data - noise, and its published scheduler config is that of the epsilon model it was made from: so
`velocity` has to say what it is.

    python examples/instaflow.py "a red fox in the snow"
"""

from __future__ import annotations

import argparse

import torch
from diffusers import StableDiffusionPipeline

from flowturbo.text_to_image import FlowRefiner, apply_flowturbo


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", default="XCLiu/2_rectified_flow_from_sd_1_5")
    parser.add_argument("--refiner", help="a folder that text_to_image.py train has written")
    parser.add_argument("--out", default="instaflow.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(options.pipeline, dtype=dtype, safety_checker=None).to(device)
    refiner = FlowRefiner.from_pretrained(options.refiner) if options.refiner else None
    schedule = "H1P6R3" if refiner else "A8"
    scheduler = apply_flowturbo(pipe, refiner, schedule, velocity="data-noise")
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        options.prompt, num_inference_steps=scheduler.evaluations, guidance_scale=1.5, generator=generator
    ).images[0]
    image.save(options.out)


if __name__ == "__main__":
    main()
