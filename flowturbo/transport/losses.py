"""Training losses, per sample. All randomness is an argument.

No torch is imported before a loss is computed, so that options can name the recipes at once.

Source: SiT equation 4 (velocity matching); FlowTurbo equations 8-13 (the refiner's regression).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flowturbo.transport.path import PATHS, Path

if TYPE_CHECKING:
    from torch import Tensor

RECIPES = ("paper", "release")
TIME_DISTRIBUTIONS = ("uniform", "logit-normal")
MAX_DT = 0.12  # the upper end of Δ's range in the paper


def flow_matching_loss(
    predictor: Callable[..., Tensor],
    x1: Tensor,
    y: Tensor,
    *,
    x0: Tensor,
    t: Tensor,
    drop: Tensor | None = None,
    path: Path = PATHS["linear"],
) -> Tensor:
    """Mean squared error of the predicted velocity, (N,).

    x1 data and x0 standard normal noise, both (N, C, H, W); y (N,) labels; t (N,) in the path's interval;
    drop (N,) bool, True trains the null class.
    """
    x_t, u_t = path.sample(x0, x1, t)
    return _mean_square(predictor(x_t, t, y, drop) - u_t)


def refiner_loss(
    refiner: Callable[..., Tensor],
    predictor: Callable[..., Tensor],
    x1: Tensor,
    y: Tensor,
    *,
    x0: Tensor,
    t: Tensor,
    dt: Tensor | float,
    drop: Tensor | None = None,
    recipe: str = "paper",
    path: Path = PATHS["linear"],
) -> Tensor:
    """Mean squared error of the velocity refined from one Euler step earlier, (N,).

    v_t = v(x_t, t), x' = x_t + Δ·v_t, target v(x', t + Δ), prediction v_t + r(x', t + Δ, v_t). Shapes as in
    flow_matching_loss; dt (N,) or scalar; `refiner_times` draws t and dt. Recipe "paper" gives every call the
    same condition; "release" keeps the label in the first predictor call even where `drop` is set, as the
    published code does. Gradients reach the refiner alone. Raises ValueError for another recipe.
    """
    import torch

    _check_recipe(recipe)
    x_t, _ = path.sample(x0, x1, t)
    dt = torch.as_tensor(dt, dtype=t.dtype, device=t.device).expand(len(t))
    with torch.inference_mode():
        v_t = predictor(x_t, t, y, drop if recipe == "paper" else None)
        x_next = x_t + dt.reshape(-1, *[1] * (x_t.ndim - 1)) * v_t
        v_next = predictor(x_next, t + dt, y, drop)
    # Tensors made in inference mode cannot be saved for the backward pass, whatever a refiner would save; copies can.
    v_t, x_next, v_next = v_t.clone(), x_next.clone(), v_next.clone()
    return _mean_square(v_next - (refiner(x_next, t + dt, v_t, y, drop) + v_t))


def endpoint_loss(end: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance (N,) of the ends of trajectories from those of a finer solution from the same noise.

    Both (N, C, H, W). The root of its mean over samples is the end-point RMSE.
    """
    return _mean_square(end - target)


def predictor_times(u_t: Tensor, distribution: str = "uniform") -> Tensor:
    """Times (N,) in [0, 1] from uniform draws u_t (N,) in [0, 1), by the distribution's inverse.

    "uniform" is SiT's; "logit-normal", the sigmoid of a standard normal, sees the middle times more often (Esser et
    al., "Scaling Rectified Flow Transformers", 2024, section 3.1). Raises ValueError for another.
    """
    if distribution not in TIME_DISTRIBUTIONS:
        raise ValueError(f"time distribution {distribution!r} is not one of {', '.join(TIME_DISTRIBUTIONS)}")
    if distribution == "uniform":
        return u_t
    import torch

    return torch.special.ndtri(u_t).sigmoid()


def refiner_times(u_t: Tensor, u_dt: Tensor, max_dt: float = MAX_DT, recipe: str = "paper") -> tuple[Tensor, Tensor]:
    """(t, Δ), each (N,), from uniform draws u_t, u_dt (N,) in [0, 1).

    "paper": Δ in (0, max_dt] for every sample, t in [0, 1 − Δ]. "release": one Δ, the first draw's, for the
    whole batch and t in [0, 1), so t + Δ may pass 1. Raises ValueError for another recipe or max_dt.
    """
    _check_recipe(recipe)
    if not 0 < max_dt < 1:
        raise ValueError(f"max_dt {max_dt} must lie between 0 and 1")
    if recipe == "release":
        return u_t, (max_dt * u_dt[:1]).expand_as(u_t)
    dt = max_dt * (1 - u_dt)
    return u_t * (1 - dt), dt


def _check_recipe(recipe: str) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"refiner recipe {recipe!r} is not one of {', '.join(RECIPES)}")


def _mean_square(error: Tensor) -> Tensor:
    import torch

    error = error.to(torch.promote_types(error.dtype, torch.float32))  # under autocast it may be in half precision
    return error.square().flatten(1).mean(1)
