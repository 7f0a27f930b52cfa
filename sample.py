"""Sample images with FlowTurbo: by default the eight classes of the original, SiT-XL/2 with its refiner, H1P5R3.

Usage:
  python sample.py --model colour                  # comes with the package: no download
  python sample.py
  python sample.py --classes "golden retriever" 980 volcano --cfg-scale 4 --seed 1
  python sample.py --compare H8 H1P5R3 dopri5      # one row per sampler, from the same noise
  python sample.py --model colour --animate steps.gif
  python sample.py --model colour --interpolate 1 2 --animate way.gif
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.picture_options import PictureOptions, picture_name
from flowturbo.sampling.solvers import check_made_for
from flowturbo.system import cli
from flowturbo.system.files import check_writable
from flowturbo.system.options import option


@dataclass(frozen=True)
class FileOptions:
    """What is written. Raises ValueError for names of other kinds of files."""

    out: str | None = option(
        None, "(default: samples/SCHEDULE-cfgSCALE-seedSEED.png, with what else is not the default)", metavar="PNG"
    )
    animate: str | None = option(
        None,
        "also a moving picture, .gif or .mp4: the noise, then after each step the images that it leads to by now; with "
        "interpolate the way there and back",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        for name, endings in {"out": (".png",), "animate": (".gif", ".mp4")}.items():
            value = getattr(self, name)
            if value and Path(value).suffix.lower() not in endings:
                raise ValueError(f"{name} {value!r} must end in {' or '.join(endings)}")


def main(argv: Sequence[str] | None = None) -> None:
    kinds = {
        "what to sample": PictureOptions,
        "files": FileOptions,
        "networks": NetworkOptions,
        "sampling": SamplingOptions,
    }
    options, files, network_options, sampling = cli.parse(cli.new_parser(__doc__), argv, kinds, MODEL_PRESETS)
    out = Path(files.out or Path("samples") / f"{picture_name(options, network_options, sampling)}.png")
    for path in filter(None, (out, files.animate)):
        check_writable(path)

    from flowturbo.data.moving import check_moving
    from flowturbo.sampling.generate import find_files, load_networks
    from flowturbo.sampling.picture import make_picture

    if files.animate:
        check_moving(files.animate)
    found = find_files(network_options, any(spec.needs_refiner for spec in options.samplers))
    for spec in options.samplers:
        check_made_for(spec, found.predictor, sampling.guidance, sampling.strict, cli.warn)
    networks = load_networks(network_options, found)
    steps = files.animate is not None and options.interpolate is None
    made = make_picture(
        networks, options, sampling, compile=network_options.compile, steps=steps, say=print, progress=True
    )
    made.save(out)
    print(f"saved {out}")
    if files.animate:
        made.save_moving(files.animate)
        print(f"saved {files.animate}")


if __name__ == "__main__":
    cli.run_script(main)
