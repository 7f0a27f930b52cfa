"""Eight pictures of the model that comes with the package: no download, no GPU, some seconds.

python examples/minimal.py
"""

import torch

from flowturbo import FlowTurbo
from flowturbo.data.pictures import grid, save_png, to_uint8
from flowturbo.data.randomness import keyed_noise

sampler = FlowTurbo.from_name("colour")
noise = keyed_noise(seed=0, indices=range(8), shape=(3, 32, 32))
classes = torch.tensor([11, 12, 14, 9, 20, 28, 16, 32])  # by docs/colour-model.md: a face, a flag, a fruit, ...
images = sampler.sample(noise, classes)  # (8, 3, 32, 32), about [-1, 1]
save_png("minimal.png", grid(to_uint8(images).split(4), least_side=128))
