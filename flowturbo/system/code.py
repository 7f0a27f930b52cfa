"""Which code and which torch computed something: what a record keeps, so that nothing is finished by another."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COMPUTING = ("configurations.py", "models.py", "refiner.py", "transport", "networks", "sampling", "training", "data")


@cache
def made_by() -> dict[str, str]:
    """The version of torch, and the beginning of a sha256 over the sources that results depend on."""
    digest = hashlib.sha256()
    for name in COMPUTING:
        place = PACKAGE / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"torch": version("torch"), "code": digest.hexdigest()[:12]}
