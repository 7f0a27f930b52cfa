"""FlowTurbo: fast sampling of frozen flow models."""

__version__ = "0.2.0"
