"""From seed, numbers and conditions to uint8 images; from images and what is wanted of them to others.

Names load when they are first used: options need no torch.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowturbo.sampling.bundled import load_bundled
    from flowturbo.sampling.edit_options import EditOptions
    from flowturbo.sampling.editing import edit
    from flowturbo.sampling.options import NetworkOptions, SamplingOptions
    from flowturbo.sampling.picture import make_picture
    from flowturbo.sampling.picture_options import PictureOptions

_HOMES = {
    "EditOptions": "edit_options",
    "NetworkOptions": "options",
    "PictureOptions": "picture_options",
    "SamplingOptions": "options",
    "edit": "editing",
    "load_bundled": "bundled",
    "make_picture": "picture",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
