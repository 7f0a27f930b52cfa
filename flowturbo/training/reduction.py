"""Gradients summed over ranks while the backward pass still runs: one bucket of parameters after another.

The layout of the buckets is a function of the parameters alone. DistributedDataParallel's adapts to the first step,
and the order in which a ring adds depends on it, so that a resumed run differs in the last bits at 3 ranks or more.
Source of the overlap: Li et al., "PyTorch Distributed", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowturbo.system.distributed import World

BUCKET_BYTES = 25 * 2**20  # large enough for the rate of the network, small enough to begin early


def buckets_of(parameters: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """The parameters in buckets of at least `size` bytes, but for the last, and of one data type each.

    The last parameter comes first: a backward pass reaches it first, where parameters stand in the order of their use.
    """
    buckets: list[list[nn.Parameter]] = []
    filled = size
    for parameter in reversed(parameters):
        if filled >= size or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel() * parameter.element_size()
    return buckets


def summed_backward(loss: Tensor, parameters: Sequence[nn.Parameter], ranks: World) -> None:
    """The backward pass of this rank's loss; then every gradient is the sum over the ranks, zero where none arrived.

    Gradients that are there already count in, as of earlier parts of the batch. A bucket is sent once it is full, but
    none before those in front of it, since all ranks must send alike; there each gradient becomes a view of what is
    sent, so that besides the gradients no more memory is held than for one bucket. Raises LostRanks where another rank
    has ended.
    """
    buckets = buckets_of(parameters, BUCKET_BYTES)
    bucket_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
    missing = [len(bucket) for bucket in buckets]
    sent: list[Callable[[], None]] = []

    def arrived(parameter: nn.Parameter) -> None:
        missing[bucket_of[parameter]] -= 1
        while ranks.size > 1 and len(sent) < len(buckets) and not missing[len(sent)]:
            sent.append(_send(buckets[len(sent)], ranks))

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    try:
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    while len(sent) < len(buckets):  # those with parameters that the loss does not depend on
        sent.append(_send(buckets[len(sent)], ranks))
    for wait in sent:
        wait()


def _send(bucket: Sequence[nn.Parameter], ranks: World) -> Callable[[], None]:
    """Begin to sum the gradients of a bucket, which become views of one tensor; what is returned waits for its end."""
    for parameter in bucket:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.size == 1:
        return lambda: None
    flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
    for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket])):
        parameter.grad = part.view_as(parameter)
    return ranks.begin_sum(flat)
