"""The page's edits: a picture and what was drawn over it become what edit.py is given. It knows nothing of gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowturbo.data.pictures import grid, save_png, to_pil
from flowturbo.sampling.edit_options import STRENGTHS, EditOptions
from flowturbo.sampling.editing import Editor
from flowturbo.sampling.generate import Networks
from flowturbo.sampling.options import SamplingOptions
from flowturbo.system.values import plus

LEAST_SIDE = 256  # pixels of an image on the page, so that one can draw over it


class Task(NamedTuple):
    """A kind of edit."""

    about: str
    strength: float  # where nothing else is said
    needs_mask: bool


INPAINT, REMOVE, REDRAW, CHANGE = "Paint a class", "Remove", "Redraw", "Change the class"
TASKS: Mapping[str, Task] = {
    INPAINT: Task("What you draw over becomes the class; all else keeps its bytes.", 1.0, True),
    REMOVE: Task("What you draw over is filled from what surrounds it, without a class.", 1.0, True),
    REDRAW: Task(
        "Noise is added, and the class is drawn from there (SDEdit). Draw to change a part only.",
        STRENGTHS["sdedit"],
        False,
    ),
    CHANGE: Task(
        "From the class it shows to another, along the difference of both (FlowEdit). Draw to change a part only.",
        STRENGTHS["flowedit"],
        False,
    ),
}


def edit_options(task: str, schedule: str, to_class: str | None, from_class: str | None, **others: Any) -> EditOptions:
    """What a task asks for: of the two classes those that it knows. Raises ValueError for impossible values."""
    if task not in TASKS:
        raise ValueError(f"no kind of edit is called {task!r}: expected {', '.join(TASKS)}")
    if task != REMOVE and not to_class:
        raise ValueError("no class is chosen: expected the one to draw")
    if task == CHANGE and not from_class:
        raise ValueError("no class is chosen that the picture shows")
    return EditOptions(
        schedule,
        to_class=None if task == REMOVE else to_class,
        from_class=from_class if task == CHANGE else None,
        remove=task == REMOVE,
        **others,
    )


def drawn_mask(layers: Sequence[Image.Image], size: tuple[int, int], needed: bool) -> Tensor | None:
    """What was drawn, as a mask (H, W) for a picture of a size (W, H): 255 where a layer is not transparent.

    None where nothing was drawn; if a mask is `needed`, raises ValueError.
    """
    drawn = np.zeros(size[::-1], bool)
    for layer in layers:
        drawn |= np.asarray(layer.convert("RGBA").resize(size, Image.Resampling.NEAREST))[..., 3] > 127
    if not drawn.any():
        if needed:
            raise ValueError("nothing is drawn over the picture: draw where it is to change")
        return None
    return torch.from_numpy(np.where(drawn, 255, 0).astype(np.uint8))


def enlarged(picture: Image.Image, least: int = LEAST_SIDE) -> Image.Image:
    """The picture with each pixel as a square of 2, 4, 8, … pixels, so that its short side is at least `least`.

    A crop to the original's size, which halves while it can, gives the original's bytes back.
    """
    factor = 1
    while factor * min(picture.size) < least:
        factor *= 2
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


class EditedPicture(NamedTuple):
    """The results of an edit."""

    picture: Image.Image  # the original, then the results
    words: str
    files: list[Path]  # the results as edit.py writes them, then the image and the mask that it is given
    flags: list[str]  # that name those files to edit.py


def edit_picture(
    networks: Networks,
    picture: Image.Image,
    mask: Tensor | None,
    options: EditOptions,
    sampling: SamplingOptions,
    folder: Path,
    compile: bool = False,
) -> EditedPicture:
    """Edit a picture, and write the results and what they were made of into a folder. Raises as `editing.edit`."""
    given = picture.convert("RGB")
    image = torch.from_numpy(np.array(given)).permute(2, 0, 1)
    made = Editor(networks, options, sampling, compile).edit(image, mask)
    inputs = {"image.png": given, **({} if mask is None else {"mask.png": to_pil(mask[None])})}
    names = ["edited.png"] if len(made.images) == 1 else [f"edited-{k}.png" for k in range(len(made.images))]
    for name, each in {**dict(zip(names, map(to_pil, made.images))), **inputs}.items():
        save_png(folder / name, each)
    strength = options.strength_with(mask is not None)
    return EditedPicture(
        grid([torch.cat([made.original[None], made.images])], least_side=LEAST_SIDE),
        f"{options.sampler}: {plus(*made.evaluations)} evaluations, strength {strength:g}",
        [folder / name for name in (*names, *inputs)],
        ["--image", "image.png", *([] if mask is None else ["--mask", "mask.png"]), "--out", "edited.png"],
    )
