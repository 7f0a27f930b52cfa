"""One update alone: what it waits for, and what it leaves where its figures are not finite."""

from typing import NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowturbo.data.loader import Batch
from flowturbo.system.advice import advice_for
from flowturbo.system.distributed import World
from flowturbo.training.options import Optimisation
from flowturbo.training.step import Diverged, State, split, update

CPU = torch.device("cpu")
SETTINGS = {"global_batch_size": 12, "lr": 0.1, "steps": 9, "clip_grad": 1.0, "ema_decay": 0.9}


class Nothing(NamedTuple):
    """What an objective draws that draws nothing."""


BATCH = Batch(torch.arange(36.0).view(12, 3) / 36, torch.zeros(12), torch.arange(12), Nothing())


def new_state(fp16=False):
    return State.new(torch.nn.Linear(3, 2), CPU, Optimisation(**SETTINGS), fp16)


def step(state, factor=1.0, stop=False, **more):
    """One update towards outputs of zero; the factor is the loss's."""

    def objective(part):
        return factor * state.model(part.images).square().mean(1)

    return update(state, World(0, 0, 1, CPU), BATCH, objective, Optimisation(**SETTINGS | more), stop)


class Reads(TorchDispatchMode):
    """Collects what hands a tensor's values to Python: on a GPU each waits until the device has come so far."""

    def __init__(self):
        super().__init__()
        self.found, self.lists = [], _ListReads(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found.append("a number")
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)


class _ListReads(TorchFunctionMode):
    """Tensor.tolist takes no operator on the way."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            self.reads.found.append("a list")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"accumulate": 3}, {"clip_grad": None}, {"exact": True}, {"stop": True}], ids=str)
def test_a_step_reads_no_value_and_its_figures_read_them(more):
    state = new_state()
    with Reads() as reads:
        results = [step(state, **more) for _ in range(3)]
        assert reads.found == []
        losses = [result.loss for result in results]
        assert len(reads.found) == 3
    assert losses[0] > losses[1] > losses[2]
    assert all(result.norm > 0 for result in results)
    assert [result.stop for result in results] == [more.get("stop", False)] * 3
    assert state.step == 3


def weights_and_moments(state):
    moments = state.optimizer.state_dict()["state"]
    return [*state.model.state_dict().values(), *(value for each in moments.values() for value in each.values())]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])  # of the last only the gradient's norm is infinite
def test_a_step_that_is_not_finite_and_those_after_it_change_nothing(bad):
    state = new_state()
    good = step(state)
    before = [value.clone() for value in weights_and_moments(state)]
    later = [step(state, bad), step(state), step(state)]
    for ours, theirs in zip(weights_and_moments(state), before, strict=True):
        assert torch.equal(ours, theirs)
    assert all(value.isfinite().all() for value in state.ema.state_dict().values())
    assert good.loss > 0
    with pytest.raises(Diverged, match=r"^step 2: the loss is .* stopped before the update$") as caught:
        later[0].read()
    assert isinstance(caught.value, FloatingPointError)  # exit code 1 of scripts
    assert advice_for(caught.value).startswith("; lower --lr")


def test_in_fp16_steps_whose_gradient_overflows_are_forgiven_and_others_told_at_once():
    """The scaler skips the first, and halves its scale."""
    state = new_state(fp16=True)
    before = [value.clone() for value in state.model.state_dict().values()]
    scale = state.scaler.get_scale()
    overflow = step(state, 1e36)
    assert overflow.loss < torch.inf
    assert not overflow.norm < torch.inf
    assert state.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, state.model.state_dict().values(), before))
    assert step(state).norm < torch.inf
    before = [value.clone() for value in weights_and_moments(state)]
    with pytest.raises(Diverged, match=r"^step 3: the loss is nan"):
        step(state, torch.nan)
    assert all(map(torch.equal, weights_and_moments(state), before))


def test_parts_of_a_batch_make_the_gradient_of_all():
    """In pieces of about equal size, whose gradients are summed; the norm is that before it is clipped."""
    assert [len(part.labels) for part in split(BATCH, 5)] == [3, 3, 3, 3]
    assert [len(part.labels) for part in split(BATCH.rows(0, 5), 3)] == [2, 2, 1]
    assert [len(part.labels) for part in split(BATCH.rows(0, 2), 3)] == [1, 1]
    told = {}
    for more in ({}, {"accumulate": 5}, {"exact": True}, {"clip_grad": 1e-3}):
        torch.manual_seed(0)
        state = new_state()
        told[str(more)] = step(state, **more)
        gradient = torch.cat([10 * value["exp_avg"].flatten() for value in state.optimizer.state.values()])
        assert gradient.norm().item() == pytest.approx(min(told[str(more)].norm, more.get("clip_grad", 1.0)), rel=1e-3)
    assert {round(each.norm, 5) for each in told.values()} == {round(told["{}"].norm, 5)}
    assert {round(each.loss, 5) for each in told.values()} == {round(told["{}"].loss, 5)}


def test_the_moving_average_follows_the_weights():
    """The decay is step / (step + 9) until it reaches its own."""
    state = new_state()
    for number in (1, 2, 3):
        before = state.ema.weight.clone()
        step(state, ema_decay=0.15)
        decay = min(0.15, number / (number + 9))
        torch.testing.assert_close(state.ema.weight, decay * before + (1 - decay) * state.model.weight)


def test_the_learning_rate_is_that_of_the_step():
    state = new_state()
    rates = []
    for _ in range(4):
        step(state, warmup=2, steps=4, lr_schedule="cosine")
        rates += [group["lr"] for group in state.optimizer.param_groups]
    assert rates == pytest.approx([0.05, 0.1, 0.05, 0])
