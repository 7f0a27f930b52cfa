"""Counting the evaluations of a network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class CallCounter:
    """Counts the evaluations of a network while it is entered; `on_call` is called after each."""

    def __init__(self, network: nn.Module | None, on_call: Callable[[], object] = lambda: None):
        self.network, self.on_call, self.count = network, on_call, 0

    def __enter__(self) -> CallCounter:
        def hook(*_: object) -> None:
            self.count += 1
            self.on_call()

        self.handle = self.network.register_forward_hook(hook) if self.network is not None else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.remove()
