"""Gradients summed over ranks while the backward pass still runs: one bucket of parameters after another.

The layout of the buckets follows the order in which gradients arrive, which the network and its loss decide, and holds
from the first step on. DistributedDataParallel begins with another layout and changes it after the first step; since
the order in which ranks add depends on it, a resumed run then differs in the last bits, at 3 ranks or more.
Source of the overlap: Li et al., "PyTorch Distributed", VLDB 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowturbo.system.distributed import World

BUCKET_BYTES = 25 * 2**20  # large enough for the rate of the network, small enough to begin early


class GradientBuckets:
    """Where the gradients of parameters lie while they are summed over ranks: in flat tensors, from step to step.

    Each gradient is a view of its bucket, so that gradients are held once. A single rank has no buckets.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self._buckets: list[list[nn.Parameter]] = []  # laid out by the first backward pass
        self._flat: list[Tensor] = []  # a tensor for each
        self._views: dict[nn.Parameter, Tensor] = {}

    def backward(self, loss: Tensor, ranks: World) -> None:
        """The backward pass of this rank's loss; then every gradient is the sum over the ranks, zero where none came.

        Gradients that are there already count in, as of earlier parts of the batch. A bucket is sent as soon as it is
        full, but none before those in front of it, since all ranks must send alike. The first pass finds the layout,
        and sends all at its end. Raises LostRanks where another rank has ended.
        """
        if ranks.size == 1:
            loss.backward()
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        elif self._buckets:
            self._backward(loss, ranks)
        else:
            order: list[int] = []
            number = {parameter: k for k, parameter in enumerate(self.parameters)}
            _backward_with(loss, self.parameters, lambda parameter: order.append(number[parameter]))
            order += sorted(set(range(len(self.parameters))) - set(order))  # the loss does not depend on these
            self._lay_out(ranks.agree(lambda: order))
            self._send_rest([], ranks)

    def _backward(self, loss: Tensor, ranks: World) -> None:
        number = {parameter: k for k, bucket in enumerate(self._buckets) for parameter in bucket}
        missing = [len(bucket) for bucket in self._buckets]
        sent: list[Callable[[], None]] = []

        def arrived(parameter: nn.Parameter) -> None:
            self._take_over(parameter)
            missing[number[parameter]] -= 1
            while len(sent) < len(missing) and not missing[len(sent)]:
                sent.append(ranks.begin_sum(self._flat[len(sent)]))

        _backward_with(loss, self.parameters, arrived)
        self._send_rest(sent, ranks)

    def _send_rest(self, sent: list[Callable[[], None]], ranks: World) -> None:
        """Send the buckets that were not, with whatever is missing in them, and wait for all."""
        for k in range(len(sent), len(self._buckets)):
            for parameter in self._buckets[k]:
                self._take_over(parameter)
            sent.append(ranks.begin_sum(self._flat[k]))
        for wait in sent:
            wait()

    def _lay_out(self, order: Sequence[int]) -> None:
        """Make the buckets: each of one data type and, but for the last, at least BUCKET_BYTES."""
        filled = BUCKET_BYTES
        for parameter in (self.parameters[k] for k in order):
            if filled >= BUCKET_BYTES or parameter.dtype != self._buckets[-1][0].dtype:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(parameter)
            filled += parameter.numel() * parameter.element_size()
        for bucket in self._buckets:
            sizes = [parameter.numel() for parameter in bucket]
            self._flat.append(torch.empty(sum(sizes), dtype=bucket[0].dtype, device=bucket[0].device))
            views = (part.view(parameter.shape) for parameter, part in zip(bucket, self._flat[-1].split(sizes)))
            self._views.update(zip(bucket, views))

    def _take_over(self, parameter: nn.Parameter) -> None:
        """Let a gradient lie in its bucket, as zeros where there is none."""
        view = self._views[parameter]
        if parameter.grad is None:
            parameter.grad = view.zero_()
        elif parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)


def _backward_with(loss: Tensor, parameters: Sequence[nn.Parameter], arrived: Callable[[nn.Parameter], object]) -> None:
    """A backward pass that calls `arrived` for each parameter whose gradient is there."""
    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    try:
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
