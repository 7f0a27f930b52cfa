"""The options of editing, shared by the command line, Python and the web page. No torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system.options import option
from flowturbo.transport.spec import SamplerSpec

METHODS = ("sdedit", "flowedit", "invert")
STRENGTHS = {"sdedit": 0.7, "flowedit": 0.8, "invert": 0.7}


@dataclass(frozen=True)
class EditOptions:
    """How an image is edited. Raises ValueError for impossible values and combinations."""

    schedule: str = option(
        "H1P5R3", "blocks with counts or a solver, as in sample.py; all of it runs, whatever the strength"
    )
    to_class: str | int | None = option(
        None, "what is generated: an index or a name, as in sample.py", flags=("--class",), metavar="CLASS"
    )
    from_class: str | int | None = option(None, "what the image shows, for a change of class", metavar="CLASS")
    remove: bool = option(
        False, "fill the mask with what surrounds it: generated without a class, or of a background class that is given"
    )
    method: str | None = option(
        None,
        "sdedit: add noise, then sample; flowedit: follow the difference of the two classes; invert: go back to the "
        "noise that makes the image, then sample (default: flowedit with a from-class, else sdedit)",
        choices=METHODS,
    )
    strength: float | None = option(
        None,
        "start at t = 1 - strength, in (0, 1]: 1 keeps nothing of what is generated anew (default: 1 with a mask, else "
        + ", ".join(f"{value:g} for {name}" for name, value in STRENGTHS.items())
        + ")",
    )
    num_images: int = option(1, "how many results, each from other noise")
    resample: int = option(1, "passes over what is generated, each from less noise than the one before: RePaint's idea")
    feather: int = option(0, "pixels within which the result fades in, inside the mask")
    composite: bool = option(True, "put the original's own bytes back outside the mask")
    keep_size: bool = option(False, "put the result back into the whole image, where it is cropped or scaled")

    def __post_init__(self) -> None:
        if self.sampler.schedule is None:
            raise ValueError(f"an edit takes a schedule of blocks, not {self.sampler}")
        if self.strength is not None and not (math.isfinite(self.strength) and 0 < self.strength <= 1):
            raise ValueError(f"strength {self.strength:g} must lie in (0, 1]: 1 starts from noise alone")
        if min(self.num_images, self.resample) < 1 or self.feather < 0:
            raise ValueError("num_images and resample must be at least 1, feather at least 0")
        if self.changes_class and (self.to_class is None or self.from_class is None):
            raise ValueError(f"method {self.chosen_method} needs to_class and from_class")
        if self.method == "sdedit" and self.from_class is not None:
            raise ValueError("from_class is for the methods flowedit and invert: sdedit knows no old class")
        if self.changes_class and (self.remove or self.resample > 1):
            raise ValueError("remove and resample are for the method sdedit, without from_class")
        if self.chosen_method == "invert" and self.num_images > 1:
            raise ValueError("inversion draws no noise, so there is one result: expected num_images 1")

    @property
    def chosen_method(self) -> str:
        """The method, by what is asked for where none is named."""
        return self.method or ("sdedit" if self.from_class is None else "flowedit")

    @property
    def changes_class(self) -> bool:
        """Whether the method knows an old class and a new one."""
        return self.chosen_method != "sdedit"

    def strength_with(self, mask: bool) -> float:
        """The strength, by what is asked for where none is named."""
        if self.strength is not None:
            return self.strength
        return 1.0 if mask and not self.changes_class else STRENGTHS[self.chosen_method]

    @property
    def sampler(self) -> SamplerSpec:
        """What the schedule names."""
        return parse_sampler(self.schedule)
