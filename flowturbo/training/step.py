"""The update of a training run: gradients over all ranks, optimizer, EMA; and what a checkpoint keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowturbo.data.loader import MICRO_BATCHES, Batch, micro_batch
from flowturbo.system.distributed import World
from flowturbo.training.options import Optimisation
from flowturbo.training.reduction import GradientBuckets
from flowturbo.weights.checkpoint import is_plain, load_checkpoint, load_weights, save_checkpoint, weights_of


@dataclass
class State:
    """Everything that the next step depends on besides the options of the run."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    buckets: GradientBuckets
    failed: Tensor  # 1.0, on the device, once a loss or gradient was not finite: AdamW then changes nothing any more
    step: int = 0

    @classmethod
    def new(cls, model: nn.Module, device: torch.device, optimisation: Optimisation, fp16: bool = False) -> State:
        """The state before the first step: the EMA is a copy, AdamW trains what requires gradients."""
        trained = [p for p in model.parameters() if p.requires_grad]
        lr, weight_decay, fused = optimisation.lr, optimisation.wd, device.type in ("cuda", "cpu")
        return cls(
            model.train(),
            deepcopy(model).requires_grad_(False).eval(),
            torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused),
            torch.amp.GradScaler(device.type, enabled=fp16),
            GradientBuckets(trained),
            torch.zeros((), device=device),
        )

    def save(self, path: Path, config: dict[str, Any]) -> str:
        """Write a checkpoint with the run's config (JSON types), whole or not at all; returns its sha256."""
        content = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": config,
        }
        return save_checkpoint(path, content)

    def load(self, path: Path) -> dict[str, Any]:
        """Take over a checkpoint; returns its config. Raises ValueError for weights alone, or another network's."""
        content = load_checkpoint(path)
        if not {"model", "ema", "opt", "step"} <= content.keys():
            raise ValueError(f"checkpoint {str(path)!r} holds weights only: expected one of a training run")
        load_weights(self.model, weights_of({"model": content["model"]}, path), path)
        load_weights(self.ema, weights_of({"ema": content["ema"]}, path), path)
        _load_moments(self.optimizer, content["opt"], path)
        scaler, step, config = content.get("scaler", {}), content["step"], content.get("config", {})
        numbers = isinstance(scaler, Mapping) and all(type(value) in (int, float) for value in scaler.values())
        if not (numbers and type(step) is int and step >= 0 and isinstance(config, Mapping)):
            raise ValueError(f"checkpoint {str(path)!r} is damaged: its step, scaler or config is none")
        if self.scaler.is_enabled() and self.scaler.state_dict().keys() == scaler.keys():
            self.scaler.load_state_dict(dict(scaler))
        self.step = step
        return dict(config)


def _load_moments(optimizer: torch.optim.Optimizer, state: object, path: Path) -> None:
    """Take over AdamW's moments; its settings stay those of this run.

    Raises ValueError where they are not those of the same parameters, or not finite.
    """
    ours = optimizer.state_dict()["param_groups"]
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]

    def fits(entry: object, shape: torch.Size) -> bool:
        return (
            isinstance(entry, Mapping)
            and entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and all(is_plain(value) and bool(torch.isfinite(value).all()) for value in entry.values())
            and entry["step"].shape == ()
            and entry["exp_avg"].shape == entry["exp_avg_sq"].shape == shape
        )

    moments = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(moments, Mapping) or len(moments) not in (
        0,
        len(shapes),
    ):  # none after skipped fp16 steps alone
        raise ValueError(f"checkpoint {str(path)!r} is damaged: its optimizer is of other parameters")
    if moments and not all(fits(moments.get(index), shape) for index, shape in enumerate(shapes)):
        raise ValueError(f"checkpoint {str(path)!r} is damaged: its optimizer's moments do not fit the parameters")
    optimizer.load_state_dict({"state": dict(moments), "param_groups": ours})


class Diverged(FloatingPointError):
    """A loss or a gradient is not finite."""


class Update:
    """What one step tells, the same on every rank: mean loss, norm of the gradient, whether any rank asks to stop.

    Its figures are on their way from the device when it is made, and waited for when they are read. Who reads them
    one step late never makes the device wait.
    """

    def __init__(self, step: int, figures: Tensor, forgiven: bool):
        self.step, self.forgiven = step, forgiven
        self.figures = figures.to("cpu", non_blocking=figures.is_cuda)  # if so, into pinned memory
        self.copied = torch.cuda.current_stream(figures.device).record_event() if figures.is_cuda else None

    def read(self) -> tuple[float, float, bool]:
        """(loss, norm, stop). Raises Diverged where loss or norm is not finite."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, stops, norm = self.figures.tolist()
        if not math.isfinite(loss) or not (self.forgiven or math.isfinite(norm)):
            raise Diverged(
                f"step {self.step}: the loss is {loss} and its gradient's norm {norm}; stopped before the update"
            )
        return loss, norm, stops > 0

    @property
    def loss(self) -> float:
        return self.read()[0]

    @property
    def norm(self) -> float:
        return self.read()[1]

    @property
    def stop(self) -> bool:
        return self.read()[2]


def update(
    state: State,
    ranks: World,
    batch: Batch,
    objective: Callable[[Batch], Tensor],
    optimisation: Optimisation,
    stop: bool = False,
) -> Update:
    """One step on this rank's share of the global batch; the objective gives the loss of each sample (n,).

    The gradient is that of the mean over the global batch, however unequal the shares. It crosses ranks in fixed
    buckets while the backward pass still runs, see `GradientBuckets`. With `exact` the bits do not even depend on the
    number of ranks: fixed micro-batches, whose gradients are added in a fixed order.

    Nothing here waits for the device, but in fp16. Where loss or gradient is not finite, the device itself skips this
    update and all later ones, and reading what is returned raises Diverged, on every rank: read it at latest after
    the next step, and before anything is saved. `stop` is this rank's wish to stop, which the others learn of so.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]

    def loss_of(part: Batch) -> Tensor:
        return objective(part).sum() / optimisation.global_batch_size

    if optimisation.exact:
        figures = _exact_sum(state, ranks, batch, loss_of, optimisation.global_batch_size, stop)
    else:
        *first, last = split(batch, optimisation.accumulate)
        losses = torch.zeros((), device=ranks.device)
        for part in first:
            loss = loss_of(part)
            state.scaler.scale(loss).backward()
            losses = losses + loss.detach()
        loss = loss_of(last)
        figures = torch.stack([losses + loss.detach(), losses.new_full((), float(stop))])
        wait = ranks.begin_sum(figures)
        state.buckets.backward(state.scaler.scale(loss), ranks)
        wait()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, optimisation.clip_grad or math.inf)
    figures = torch.cat([figures, norm[None]])
    # In fp16 the scaler skips steps whose gradient overflows until its scale fits; below 1 that is not the reason.
    forgiven = state.scaler.is_enabled() and state.scaler.get_scale() >= 1
    told = Update(state.step + 1, figures, forgiven)
    if state.optimizer.defaults["fused"] and not state.scaler.is_enabled():
        state.failed = torch.maximum(state.failed, 1 - figures.isfinite().all().float())
        state.optimizer.found_inf = state.failed  # type: ignore[attr-defined]  # makes fused AdamW skip its step
    else:
        told.read()
    state.step += 1
    for group in state.optimizer.param_groups:
        group["lr"] = optimisation.rate(state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema, state.model, min(optimisation.ema_decay, state.step / (state.step + 9)))
    return told


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in at most `parts` pieces of about equal size."""
    rows = len(batch.labels)
    size = max(1, math.ceil(rows / parts))
    return [batch.rows(start, start + size) for start in range(0, rows, size)]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay·ema + (1 - decay)·model, all weights in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def _exact_sum(
    state: State, ranks: World, batch: Batch, loss_of: Callable[[Batch], Tensor], global_batch_size: int, stop: bool
) -> Tensor:
    """Sum the gradients of all micro-batches in their order, and loss and stop flag, which are returned.

    Each rank fills its own rows of a table of zeros; adding zeros changes no bit, so one all-reduce gathers them.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    sizes = [p.numel() for p in parameters]
    table = torch.zeros(MICRO_BATCHES, sum(sizes) + 2, device=ranks.device)
    start = 0
    for micro in ranks.share(MICRO_BATCHES):
        size = len(micro_batch(micro, global_batch_size))
        if size:
            loss = loss_of(batch.rows(start, start + size))
            state.scaler.scale(loss).backward()
            flat = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters]
            table[micro] = torch.cat([*flat, loss.detach()[None], loss.new_full((1,), float(stop))])
            state.optimizer.zero_grad(set_to_none=True)
        start += size
    ranks.sum(table)
    total = table[0].clone()
    for row in table[1:]:
        total += row
    for parameter, part in zip(parameters, total.split([*sizes, 2])):
        parameter.grad = part.view_as(parameter)
    return total[-2:]
