"""The original's import name. The code is in flowturbo/models.py."""

from flowturbo.models import *  # noqa: F403
