"""Edit an image: a class painted into it, an object removed, its class changed, or the noise that makes it.

Usage:
  python edit.py --image cat.png --class "golden retriever" --strength 0.6       # SDEdit
  python edit.py --image cat.png --mask mask.png --class 980                     # inpainting, white is generated
  python edit.py --image cat.png --mask mask.png --remove                        # object removal
  python edit.py --image cat.png --from-class tabby --to-class 207 --method flowedit
  python edit.py --image cat.png --class tabby --invert --out noise.pt           # and back:
  python edit.py --noise noise.pt --out again.png
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowturbo.sampling.edit_options import EditOptions
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.picture_options import settings_name
from flowturbo.sampling.solvers import check_made_for
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option
from flowturbo.system.values import plus, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from flowturbo.sampling.editing import Edited, Editor
    from flowturbo.sampling.generate import Networks


@dataclass(frozen=True)
class FileOptions:
    """Which image, and what is written. Raises ValueError for impossible values and combinations."""

    image: str | None = option(None, "the image; cropped to the model's size as in training", metavar="FILE")
    mask: str | None = option(
        None, "of the image's size: white is generated, black kept, grey edited to that strength", metavar="FILE"
    )
    invert: bool = option(False, "write the noise that makes the image, as --out FILE.pt")
    noise: str | None = option(None, "make the image of such a noise again", metavar="FILE")
    out: str | None = option(
        None,
        "a PNG of the image's own size, numbered where there are several (default: in edits/, named by the settings)",
        metavar="FILE",
    )
    compare: tuple[str, ...] | None = option(
        None, "one captioned row for each of these, in one picture", metavar="SCHEDULE"
    )
    steps_picture: str | None = option(
        None, "also the states after each step, as a filmstrip (.png) or moving (.gif, .mp4)", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if (self.image is None) == (self.noise is None):
            raise ValueError("expected image, or the noise that makes one")
        if (self.invert or self.noise) and (self.mask or self.compare or self.steps_picture):
            raise ValueError("mask, compare and steps_picture are for edits, not for inversion")
        if self.invert and (self.noise or not self.out):
            raise ValueError("invert needs image and out, where the noise goes")
        kinds = {"out": (".pt",) if self.invert else (".png",), "steps_picture": (".png", ".gif", ".mp4")}
        for name, endings in kinds.items():
            value = getattr(self, name)
            if value and Path(value).suffix.lower() not in endings:
                raise ValueError(f"{name} {value!r} must end in {' or '.join(endings)}")


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"files": FileOptions, "edit": EditOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    files, options, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS)
    variants = [replace(options, schedule=text) for text in files.compare or [options.schedule]]
    out = Path(files.out or default_name(files, options, network_options, sampling))
    check_together(files, options, out)
    for path in filter(None, (out, files.steps_picture)):
        check_writable(path)

    from flowturbo.data.moving import check_moving
    from flowturbo.sampling.editing import Editor
    from flowturbo.sampling.generate import find_files, load_networks

    if files.steps_picture:
        check_moving(files.steps_picture)
    given = read_inputs(files)  # a mistake in them shows before the networks are loaded
    found = find_files(network_options, any(each.sampler.needs_refiner for each in variants))
    for each in variants:
        check_made_for(each.sampler, found.predictor, sampling.guidance, sampling.strict, cli.warn)
    networks = load_networks(network_options, found)
    if given.noise is not None and options.to_class is None:
        variants = [replace(each, to_class=given.noise_class) for each in variants]
    editors = [
        Editor(networks, each, sampling, network_options.compile, files.steps_picture is not None) for each in variants
    ]
    if files.invert:
        save_noise(out, editors[0].invert(given.image), editors[0].to_class)
    elif given.noise is not None:
        save_images(out, editors[0].restore(given.noise))
    else:
        tell_of_crop(files, options, given, networks)
        made, captions = edit_with_each(editors, given, sampling, network_options.compile)
        if files.compare:
            save_comparison(out, made, captions)
        else:
            save_images(out, made[0].images)
        if files.steps_picture:
            save_steps(Path(files.steps_picture), [strip(*each) for each in zip(editors, made)], captions)


def check_together(files: FileOptions, options: EditOptions, out: Path) -> None:
    """Raises ValueError for two outputs in one file, and where inversion is asked for what edits alone can do."""
    if files.steps_picture and Path(files.steps_picture).resolve() == out.resolve():
        raise ValueError(f"out and steps_picture are both {os.fspath(out)!r}: expected two files")
    if files.invert or files.noise:
        for name in ("from_class", "remove", "method", "strength", "num_images", "resample", "feather", "keep_size"):
            if getattr(options, name) != getattr(EditOptions(), name):
                raise ValueError(f"{name} is for edits, not for inversion")


def default_name(files: FileOptions, options: EditOptions, *others: NetworkOptions | SamplingOptions) -> str:
    """edits/NAME-TASK-SCHEDULE-... by `settings_name`: another image, mask or setting, another file."""
    kept = "remove" if options.remove else "inpaint" if files.mask else None
    method = options.chosen_method if options.changes_class or kept is None else None
    task = "-".join(filter(None, (kept, method))) if files.image else "restore"
    before = f"{Path(str(files.image or files.noise)).name.removesuffix('.png')}-{task}"
    settings = replace(files, steps_picture=None), options, *others
    return f"edits/{settings_name(settings, before, ('image', 'noise', 'remove', 'method'))}.png"


class Inputs(NamedTuple):
    """What was read: an image and its mask, or a noise with its class."""

    image: Tensor  # uint8 (3, H, W); empty where there is a noise
    mask: Tensor | None = None
    noise: Tensor | None = None
    noise_class: int | None = None


def read_inputs(files: FileOptions) -> Inputs:
    """Read the files. Raises ValueError naming one that is not what it should be."""
    import torch

    from flowturbo.data.images import read_image
    from flowturbo.data.masks import check_mask, read_mask

    if files.noise is not None:
        try:
            content = torch.load(files.noise, map_location="cpu", weights_only=True)
            return Inputs(torch.empty(0), None, content["noise"].float(), int(content["class"]))
        except OSError:
            raise
        except Exception as error:  # torch raises a dozen types for files that are others
            raise ValueError(
                f"noise {files.noise!r} is no file that inversion writes ({type(error).__name__})"
            ) from None
    image = torch.from_numpy(read_image(str(files.image)).pixels.copy())
    mask = None if files.mask is None else read_mask(files.mask)
    if mask is not None:
        check_mask(mask, image)
    return Inputs(image, mask)


def tell_of_crop(files: FileOptions, options: EditOptions, given: Inputs, networks: Networks) -> None:
    """Say so where the model does not see the whole image."""
    from flowturbo.data.masks import share_outside

    size = networks.image_size
    height, width = given.image.shape[1:]
    if (height, width) != (size, size):
        then = "and put back" if options.keep_size else "as in training (--keep-size puts the result back)"
        print(f"{files.image}: {width} x {height} pixels, cropped to {size} x {size} {then}")
        if given.mask is not None and 0 < (outside := share_outside(given.mask)) < 1:
            print(f"{files.mask}: {rounded(100 * outside)} % of what is white lies outside the crop, and is kept")


def edit_with_each(
    editors: Sequence[Editor], given: Inputs, sampling: SamplingOptions, compiled: bool
) -> tuple[list[Edited], list[str]]:
    """What each editor makes of the image, and the captions: schedule, evaluations, guidance and time, from bytes to
    bytes."""
    if len(editors) > 1:  # so that no row's time contains the device's start-up or a compilation
        for editor in editors if compiled else editors[:1]:
            editor.edit(given.image, given.mask)
    made, captions = [], []
    for editor in editors:
        start = time.perf_counter()
        made.append(editor.edit(given.image, given.mask))
        ms = rounded(1000 * (time.perf_counter() - start) / len(made[-1].images))
        count = plus(*made[-1].evaluations)
        captions.append(f"{editor.sampler}   {count} evaluations   cfg {sampling.cfg_scale:g}   {ms} ms/image")
        print(captions[-1] + (", compilation included" if compiled and len(editors) == 1 else ""))
    return made, captions


def strip(editor: Editor, made: Edited) -> Tensor:
    """The first result after each step, uint8 (steps + 1, C, h, w)."""
    import torch

    return torch.cat([editor.decode(state[:1]) for state in made.steps])


def save_images(out: Path, images: Tensor) -> None:
    """One PNG for each image, of its own size."""
    from flowturbo.data.pictures import save_png, to_pil

    for k, image in enumerate(images):
        path = out if len(images) == 1 else out.with_stem(f"{out.stem}-{k}")
        save_png(path, to_pil(image))
        print(f"saved {path}")


def save_comparison(out: Path, made: Sequence[Edited], captions: Sequence[str]) -> None:
    """The original, and a captioned row for each."""
    from flowturbo.data.pictures import grid, save_png

    save_png(out, grid([made[0].original[None], *(each.images for each in made)], ["original", *captions]))
    print(f"saved {out}")


def save_steps(out: Path, strips: Sequence[Tensor], captions: Sequence[str]) -> None:
    """The trajectories of the first results, each (steps + 1, C, H, W): a row for each, or moving pictures."""
    from flowturbo.data.moving import save_moving
    from flowturbo.data.pictures import grid

    save_moving(out, [strip.split(1) for strip in strips], lambda states: grid(states, captions), captions)
    print(f"saved {out}")


def save_noise(out: Path, noise: Tensor, label: int | None) -> None:
    """The noise and its class."""
    import torch

    from flowturbo.system.files import atomic_write

    with atomic_write(out) as file:
        torch.save({"noise": noise.cpu(), "class": label}, file)
    print(f"saved {out}")


if __name__ == "__main__":
    cli.run_script(main)
