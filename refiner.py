"""The original's import name. The code is in flowturbo/refiner.py."""

from flowturbo.refiner import *  # noqa: F403
