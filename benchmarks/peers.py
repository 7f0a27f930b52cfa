"""Peers in the table of solvers: multistep schedulers of diffusers, each at its best setting for a flow model.

UniPC (Zhao et al., 2023) and DPM-Solver++ (Lu et al., 2022) with flow sigmas, one evaluation a step. Their σ is 1 − t
here, and their model output noise − data, the opposite of the velocity.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from flowturbo.transport.guidance import Guidance
from flowturbo.transport.samplers import Network, guided

PEERS = ("UniPC", "DPM++")
_NAME = re.compile(r"(UniPC|DPM\+\+)([1-9][0-9]{0,3})")


def is_peer(name: str) -> bool:
    """Whether a name is one of theirs."""
    return _NAME.fullmatch(name) is not None


class PeerSampler:
    """Samples with a scheduler of diffusers in place of a schedule: "UniPC6" makes 6 evaluations, "DPM++8" 8.

    Raises ValueError for another name.
    """

    def __init__(self, predictor: Network, name: str, guidance: Guidance = Guidance()):
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"peer {name!r} is none of {', '.join(PEERS)} with a number of evaluations")
        self.name, self.predictor, self.guidance = name, predictor, guidance
        self.kind, self.steps = found[1], int(found[2])

    def __str__(self) -> str:
        return self.name

    def evaluations(self) -> tuple[int, int]:
        """(predictor, refiner) evaluations of one trajectory."""
        return self.steps, 0

    def rows(self) -> tuple[int, int]:
        """(predictor, refiner) rows that one image takes."""
        return self.steps * (1 if self.guidance.scale == 1 else 2), 0

    @torch.no_grad()
    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        """Latents from noise z (N, C, H, W) and labels y (N,)."""
        velocity = guided(self.guidance, y, self.predictor).velocity
        scheduler = _scheduler(self.kind)
        scheduler.set_timesteps(self.steps)
        x = z
        # The timesteps are rounded to whole numbers of thousandths: the sigmas are not.
        for sigma, step in zip(scheduler.sigmas.tolist(), scheduler.timesteps):
            v = velocity(x, self.guidance.instant(1 - sigma))[: len(x)]
            x = scheduler.step(-v, step, x).prev_sample
        return x


def _scheduler(kind: str):  # type: ignore[no-untyped-def]  # diffusers' own types are none
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    flow: dict[str, object] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    makers: dict[str, Callable] = {
        "UniPC": lambda: UniPCMultistepScheduler(**flow, solver_order=2),
        "DPM++": lambda: DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++", solver_order=2),
    }
    return makers[kind]()
