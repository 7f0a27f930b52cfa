"""One update alone: what it waits for, and what it leaves where its figures are not finite."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowturbo.data.folders import Batch
from flowturbo.system.distributed import World
from flowturbo.training.step import State, update

ONE = World(0, 0, 1, torch.device("cpu"))


def new_state(fp16=False):
    return State.new(torch.nn.Linear(3, 2), torch.device("cpu"), 0.1, 0.0, fp16)


def step(state, factor=1.0, **more):
    """One update towards outputs of zero; the factor is the loss's."""
    batch = Batch(torch.arange(36.0).view(12, 3) / 36, torch.zeros(12), *[torch.empty(12, 0)] * 5)
    settings = {"global_batch_size": 12, "lr": 0.1, "clip": 1.0, "ema_decay": 0.9} | more
    return update(state, ONE, batch, lambda part: factor * state.model(part.images).square().mean(1), **settings)


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


@pytest.mark.parametrize("more", [{}, {"passes": 3}, {"clip": None}, {"exact": True}, {"stop": True}], ids=str)
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
    with pytest.raises(FloatingPointError, match=r"^step 2: the loss is .* stopped before the update \(lower --lr"):
        later[0].read()


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
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss is nan"):
        step(state, torch.nan)
    assert all(map(torch.equal, weights_and_moments(state), before))
