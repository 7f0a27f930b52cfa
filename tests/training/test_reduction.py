"""Gradients that are summed while the backward pass runs: when they are sent, what arrives, and whether it repeats."""

import hashlib
from functools import partial
from typing import NamedTuple

import pytest
import torch

from flowturbo.data.loader import Batch
from flowturbo.system.distributed import World
from flowturbo.training import reduction
from flowturbo.training.options import Optimisation
from flowturbo.training.reduction import GradientBuckets
from flowturbo.training.step import State, update

SMALL = 900  # bytes of a bucket
SETTINGS = {"global_batch_size": 13, "lr": 0.05, "steps": 9, "clip_grad": 1.0}


class Nothing(NamedTuple):
    """What an objective draws that draws nothing."""


class Net(torch.nn.Module):
    """Three layers in the order of their use, the middle one twice, and one that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = torch.nn.Linear(5, 40), torch.nn.Linear(40, 40), torch.nn.Linear(40, 3)
        self.c = torch.nn.Linear(40, 2)

    def forward(self, x):
        return self.c(self.b(self.b(self.a(x).tanh()).tanh()).tanh())


class Recorder:
    """A rank of two that hears of nobody: it notes which gradients are there when a bucket is sent."""

    size = 2

    def __init__(self, net):
        self.net, self.sent = net, []

    def begin_sum(self, value):
        there = [name for name, p in self.net.named_parameters() if p.grad is not None]
        self.sent.append((value.numel(), there))
        return lambda: value.mul_(2)

    def agree(self, function):
        return function()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(reduction, "BUCKET_BYTES", SMALL)


def names_of(net):
    return {parameter: name for name, parameter in net.named_parameters()}


def test_the_layout_follows_the_order_in_which_gradients_arrive():
    """What no loss depends on comes last; a bucket ends where it is full, or at another data type."""
    net = Net()
    buckets, ranks = GradientBuckets(list(net.parameters())), Recorder(net)
    for _ in range(2):
        buckets.backward(net(torch.ones(2, 5)).square().sum(), ranks)
        net.zero_grad()
    names = names_of(net)
    order = [names[p] for bucket in buckets._buckets for p in bucket]
    assert order[:2] == ["c.bias", "c.weight"]
    assert order[-2:] == ["unused.weight", "unused.bias"]
    assert sorted(order) == sorted(names.values())
    assert [len(bucket) for bucket in buckets._buckets] == [4, 2, 2]
    assert [size for size, _ in ranks.sent] == [82 + 1640, 240, 123] * 2


def test_buckets_are_sent_while_other_gradients_are_missing():
    net = Net()
    net(torch.ones(2, 5)).square().sum().backward()
    plain = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    buckets = GradientBuckets(list(net.parameters()))
    for first in (True, False):
        net.zero_grad()
        ranks = Recorder(net)
        buckets.backward(net(torch.ones(2, 5)).square().sum(), ranks)
        assert any(name.startswith("a.") for name in ranks.sent[0][1]) == first
        for name, p in net.named_parameters():
            assert torch.equal(p.grad, torch.zeros_like(p) if plain[name] is None else 2 * plain[name])


def test_gradients_are_views_of_what_was_sent_and_no_hook_is_left():
    net = Net()
    parameters = list(net.parameters())
    buckets = GradientBuckets(parameters)
    for _ in range(2):
        net.zero_grad()
        buckets.backward(net(torch.ones(2, 5)).square().sum(), Recorder(net))
        storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in parameters}
        assert len(storages) == 3
        assert sum(storages.values()) == 4 * sum(p.numel() for p in parameters)
        assert not any(p._post_accumulate_grad_hooks for p in parameters)


def run_steps(ranks, state, steps, accumulate=1):
    """Updates on this rank's rows of a batch that is not divisible."""
    share = ranks.share(SETTINGS["global_batch_size"])
    for _ in range(steps):
        rows = torch.randn(13, 5, generator=torch.Generator().manual_seed(state.step))[share.start : share.stop]
        batch = Batch(rows, torch.zeros(len(rows)), torch.zeros(len(rows)), Nothing())
        optimisation = Optimisation(**SETTINGS, accumulate=accumulate)
        update(state, ranks, batch, lambda part: state.model(part.images).square().mean(1), optimisation).read()


def fresh():
    torch.manual_seed(0)
    return State.new(Net(), torch.device("cpu"), Optimisation(**SETTINGS))


def digest(state):
    """Of weights, averages and moments."""
    moments = [value for each in state.optimizer.state.values() for value in each.values()]
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values(), *moments]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in tensors)).hexdigest()[:16]


def resume(folder, accumulate, ranks):
    """Tell what six updates come to at once, and with a checkpoint after two."""
    reduction.BUCKET_BYTES = SMALL
    straight, first, second = fresh(), fresh(), fresh()
    run_steps(ranks, straight, 6, accumulate)
    run_steps(ranks, first, 2, accumulate)
    first.save(folder / f"{ranks.rank}.pt", {})
    second.load(folder / f"{ranks.rank}.pt")
    run_steps(ranks, second, 4, accumulate)
    print(digest(straight), digest(second))


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (2, 3), (3, 1), (4, 2)])
def test_a_resumed_run_ends_with_the_same_bits(forked, tmp_path, size, accumulate):
    done = forked(partial(resume, tmp_path, accumulate), size, clean=True)
    assert done.codes == [0] * size, done.text
    assert len({text for line in done.lines for text in line.split()}) == 1


def flat(buckets, loss, ranks):
    """What `GradientBuckets.backward` is compared with: one sum of all gradients, after the backward pass."""
    parameters = buckets.parameters
    loss.backward()
    total = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])
    ranks.sum(total)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


def compare_with_flat(accumulate, ranks):
    reduction.BUCKET_BYTES = SMALL
    state, other, alone = fresh(), fresh(), fresh()
    run_steps(ranks, state, 4, accumulate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientBuckets, "backward", flat)
        run_steps(ranks, other, 4, accumulate)
    assert digest(state) == digest(other)
    run_steps(World(0, 0, 1, torch.device("cpu")), alone, 4)
    for ours, theirs in zip(state.model.parameters(), alone.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_ranks_add_as_one_flat_sum_does(forked, accumulate):
    """To the bit, at 2 ranks; and as one rank up to the order of additions."""
    done = forked(partial(compare_with_flat, accumulate), 2, clean=True)
    assert done.codes == [0, 0], done.text


def lose_one(ranks):
    if ranks.rank == 1:
        raise ValueError("the cause")
    run_steps(ranks, fresh(), 1)


def test_a_rank_that_ends_is_told(forked):
    done = forked(lose_one, 2, clean=True)
    assert done.codes == [2, 2]
    assert "the cause" in done.text
    assert "lost the other ranks: one has ended" in done.text
