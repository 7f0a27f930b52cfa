"""FlowTurbo on a pipeline: the scheduler, and a hook on its network that evaluates the refiner in R blocks."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from flowturbo.text_to_image.families import network_of
from flowturbo.text_to_image.refined import FlowRefiner
from flowturbo.text_to_image.scheduler import FlowTurboScheduler

HOOK = "flowturbo"
_DISTILLED = re.compile("schnell|turbo|sprint|lightning|hyper|lcm", re.IGNORECASE)
# Arguments of a network's forward that change it from outside in a way that no refiner was trained with.
_FOREIGN = (
    "skip_layers",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def apply_flowturbo(
    pipe: Any,
    refiner: FlowRefiner | None = None,
    schedule: str | None = "H1P5R3",
    refiner_step: str = "single",
    **settings: Any,
) -> FlowTurboScheduler:
    """Let a pipeline of diffusers sample with FlowTurbo; returns its scheduler, which knows its number of evaluations.

        scheduler = apply_flowturbo(pipe, FlowRefiner.from_pretrained("refiner"), "H1P5R3")
        pipe("a cat", num_inference_steps=scheduler.evaluations)

    refiner_step as in `FlowTurbo`; settings as of FlowTurboScheduler, such as velocity="data-noise" for InstaFlow. The
    network stays where it is: LoRA, compilation and offloading go on working. A second call takes the place of the
    first. Raises ValueError for a schedule with R blocks without a refiner, for one of another network, together with
    diffusers' caches, and as FlowTurboScheduler.
    """
    remove_flowturbo(pipe)
    network = network_of(pipe)
    scheduler = FlowTurboScheduler.from_config(
        pipe.scheduler.config, schedule=schedule, refiner_step=refiner_step, **settings
    )
    if scheduler.has_refiner:
        if refiner is None:
            raise ValueError(f"schedule {schedule} has R blocks: they need a refiner")
        if not refiner.fits(network):
            raise ValueError(
                f"the refiner, a {type(refiner.network).__name__}, is not one of this {type(network).__name__}"
            )
        if getattr(network, "is_cache_enabled", False):
            raise ValueError("a cache of diffusers is enabled on the network: expected none together with R blocks")
        refiner.to(next(network.parameters()).dtype)
    name = str(getattr(network.config, "_name_or_path", ""))
    if _DISTILLED.search(name):
        warnings.warn(f"{name} is made for a few steps of its own: other solvers gain nothing on it", stacklevel=2)
    hook = FlowTurboHook(scheduler, refiner, pipe.scheduler)
    HookRegistry.check_if_exists_or_initialize(network).register_hook(hook, HOOK)
    pipe.scheduler = scheduler
    return scheduler


def remove_flowturbo(pipe: Any) -> None:
    """Undo `apply_flowturbo`: the pipeline has the scheduler again that it had before. Without it nothing happens."""
    registry = HookRegistry.check_if_exists_or_initialize(network_of(pipe))
    if hook := registry.get_hook(HOOK):
        registry.remove_hook(HOOK, recurse=False)
        if pipe.scheduler is hook.scheduler:
            pipe.scheduler = hook.before


class FlowTurboHook(ModelHook):
    """Evaluates the refiner in a network's place where the scheduler's trajectory says so.

    A pipeline may call its network several times at one evaluation, once for each branch of guidance: call k of an
    evaluation goes on from the velocities of call k before. So a refiner sees each branch's own velocity, not guided,
    as it does in training.
    """

    _is_stateful = True

    def __init__(self, scheduler: FlowTurboScheduler, refiner: FlowRefiner | None, before: Any):
        super().__init__()
        self.scheduler, self.refiner, self.before = scheduler, refiner, before
        self._forget()

    def _forget(self) -> None:
        self._place = (-1, -1)  # the trajectory, and the evaluation in it
        self._call = 0
        self._kept: dict[tuple[int, int], Tensor] = {}  # velocities by call and evaluation

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._forget()
        return module

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The network's forward, or the refiner's answer in its form."""
        scheduler = self.scheduler
        if not scheduler.has_refiner:
            return self.fn_ref.original_forward(*args, **kwargs)
        self._check(module, kwargs)
        place = (scheduler.trajectories, scheduler.current)
        if place[0] != self._place[0]:
            self._forget()
        self._call = self._call + 1 if place == self._place else 0
        self._place = place
        evaluation = scheduler.evaluation
        if evaluation.network == "predictor":
            output = self.fn_ref.original_forward(*args, **kwargs)
            self._keep(output[0])
            return output
        seen, base = (self._velocity(number) for number in (evaluation.seen, evaluation.base))
        args, states = _take_states(args, kwargs)
        v = base + self._on(states.device)(seen, states, *args, **kwargs).to(base.dtype)
        self._keep(v)
        return (v,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(sample=v)

    def _on(self, device: torch.device) -> FlowRefiner:
        """The refiner, where the network computes: offloading moves the network alone."""
        assert self.refiner is not None
        if next(self.refiner.parameters()).device != device:
            self.refiner.to(device)
        return self.refiner

    def _keep(self, v: Tensor) -> None:
        """Remember a velocity for the refiner's later evaluations, and forget those that none asks for any more."""
        current = self._place[1]
        self._kept[self._call, current] = v
        wanted = {number for e in self.scheduler.trajectory[current:] for number in (e.seen, e.base)}
        self._kept = {key: value for key, value in self._kept.items() if key[1] in wanted}

    def _velocity(self, number: int | None) -> Tensor:
        v = self._kept.get((self._call, number))  # type: ignore[arg-type]
        if v is None:
            raise ValueError(
                f"evaluation {self._place[1]} calls the network {self._call + 1} times, the ones before fewer: a "
                "refiner needs the same calls at every evaluation"
            )
        return v

    def _check(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
        if getattr(module, "is_cache_enabled", False):
            raise ValueError("a cache of diffusers is enabled on the network: expected none together with R blocks")
        if foreign := [name for name in _FOREIGN if kwargs.get(name) is not None]:
            raise ValueError(f"R blocks do not go together with {foreign[0]}")
        if self.scheduler.current >= len(self.scheduler.trajectory):
            raise ValueError("the pipeline samples with another scheduler than the one that FlowTurbo was applied with")


def _take_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor]:
    """The positional arguments without the states, and the states, which are taken out of the others too."""
    if args:
        return args[1:], args[0]
    return args, kwargs.pop("hidden_states" if "hidden_states" in kwargs else "sample")
