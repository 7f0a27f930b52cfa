"""The options of the web page. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.options import option

DEFAULT_MODEL = "colour"


@dataclass(frozen=True)
class PageOptions:
    """Where the page is served, and what it starts with. Raises ValueError for impossible values."""

    host: str = option("127.0.0.1", "address to serve at; 0.0.0.0 lets every machine of the network in")
    port: int = option(7860, "port to serve at")
    share: bool = option(False, "also through a public link by gradio's servers, which then carry all that is shown")
    schedule: str = option("H1P5R3", "what the page starts with; as in sample.py")
    classes: tuple[str, ...] | None = option(
        None, "what the page starts with (default: the model's first four)", metavar="CLASS"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} must lie in 1 to 65535")
        if not self.host:
            raise ValueError("host is empty: expected an address such as 127.0.0.1")
        parse_sampler(self.schedule)
