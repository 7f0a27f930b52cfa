"""A picture of what editing does to real images: completed, and changed to another class by every method.

Usage:
  python -m benchmarks.gallery --out docs/images/editing.png       # digits of scikit-learn, and their model
  python -m benchmarks.gallery --model colour --data-path FOLDER --out FILE
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowturbo.sampling.edit_options import EditOptions
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.solvers import parse_sampler
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option


@dataclass(frozen=True)
class GalleryOptions:
    """What is drawn. Raises ValueError for impossible values."""

    out: str = option(metavar="PNG", help="where the picture goes")
    data_path: str | None = option(None, "one folder of images per class (default: digits)", metavar="DIR")
    images: int = option(12, "how many of them, going round the classes")
    classes: tuple[str, ...] | None = option(None, "of the images; each is changed into the next one (default: all)")
    kept: str = option("upper", "the half that inpainting keeps", choices=("upper", "left"))
    first: int = option(0, "which image of its class")
    schedule: str = option("M6", "of every edit")
    side: int = option(64, "pixels of an image in the picture, at least")

    def __post_init__(self) -> None:
        if min(self.images, self.side) < 1 or self.first < 0:
            raise ValueError("images and side must be at least 1, first at least 0")


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {"picture": GalleryOptions, "networks": NetworkOptions, "sampling": SamplingOptions}
    defaults: dict[str, Any] = {"predictor_ckpt": "digits-predictor.pt", "vae_ckpt": "none", "cfg_scale": 1.0}
    options, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS, **defaults)
    check_writable(options.out)

    import torch

    from benchmarks.judges import read_data
    from flowturbo.data.classes import class_index
    from flowturbo.data.pictures import grid, save_png
    from flowturbo.sampling.editing import edit
    from flowturbo.sampling.generate import find_files, load_networks

    networks = load_networks(
        network_options, find_files(network_options, parse_sampler(options.schedule).needs_refiner)
    )
    data = read_data(options.data_path, 0, networks)
    count = networks.predictor.num_classes
    wanted = options.classes or map(str, sorted(set(data.labels.tolist())))
    classes = [class_index(name, count, networks.class_names) for name in wanted]
    labels = [classes[k % len(classes)] for k in range(options.images)]
    chosen = [of_class(data.labels, label, options.first + k // len(classes)) for k, label in enumerate(labels)]
    size = networks.image_size
    mask = torch.zeros(size, size, dtype=torch.uint8)
    mask[(..., slice(size // 2, None)) if options.kept == "left" else slice(size // 2, None)] = 255

    def row(**wanted: object) -> torch.Tensor:
        """Every image edited: to its own class with a mask, to the next one without."""
        made = []
        for image, label in zip(data.images[chosen], labels):
            after = classes[(classes.index(label) + 1) % len(classes)]
            change = {"to_class": label if "feather" in wanted else after, **wanted}
            if wanted.get("method") in ("flowedit", "invert"):
                change["from_class"] = label
            how = EditOptions(options.schedule, **change)  # type: ignore[arg-type]
            made.append(edit(networks, image, how, sampling, mask if "feather" in wanted else None).images[0])
        return torch.stack(made)

    rows = {
        "original": data.images[chosen],
        f"the {options.kept} half is kept": torch.where(mask > 0, 128, data.images[chosen]),
        "the other half painted anew": row(feather=0),
        "into the next class: SDEdit, strength 0.7": row(method="sdedit", strength=0.7),
        "inversion, strength 0.7": row(method="invert", strength=0.7),
        "FlowEdit, strength 0.8": row(method="flowedit", strength=0.8),
    }
    save_png(options.out, grid(list(rows.values()), list(rows), least_side=options.side))
    print(f"saved {options.out}")


def of_class(labels, label: int, number: int) -> int:  # type: ignore[no-untyped-def]
    """The index of one image of a class, going round them."""
    found = (labels == label).nonzero()[:, 0]
    if not len(found):
        raise ValueError(f"the data have no image of class {label}")
    return int(found[number % len(found)])


if __name__ == "__main__":
    cli.run_script(main)
