"""Weights and reference files: list what there is, and download it.

Usage:
  python download.py                                     # what exists, how large, whose, and whether it is here
  python download.py sit-xl-2-256 sit-xl-2-refiner vae-ema          # all that sample.py needs
  python download.py export ...                          # export.py by its earlier name; has its own --help

From Python:
  from download import find_model
  network.load_state_dict(find_model("SiT-XL-2-256x256.pt"))
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowturbo.system import cli
from flowturbo.system.advice import advice_for
from flowturbo.system.options import option
from flowturbo.weights.cache import CACHE_VARIABLE, cache_folder, progress
from flowturbo.weights.fetch import fetch
from flowturbo.weights.registry import ASSETS, Asset

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = f"""\
Downloads go to the cache folder: --cache-dir, else ${CACHE_VARIABLE}, else ~/.cache/flowturbo. The other scripts
look there for files that are not where they are told, so that `python sample.py` finds SiT-XL-2-256x256.pt; with
--cache-dir, set {CACHE_VARIABLE} to the same folder for them.

A download that is cut continues where it stopped, at once or with the next run. Sizes and hashes are held to where
they are published, and where not to those of the first download. Naming a file that is here hashes it again.
Without network: download elsewhere, copy the cache folder, and set FLOWTURBO_OFFLINE=1. HTTPS_PROXY is respected.
"""


@dataclass(frozen=True)
class Options:
    """What to download, and where to."""

    names: tuple[str, ...] = option(
        (), "what to download, or all; without, a list is shown", positional=True, metavar="NAME", nargs="*"
    )
    cache_dir: str | None = option(None, f"where to (default: ${CACHE_VARIABLE}, else see below)", metavar="DIR")
    offline: bool = option(False, "only check what is here (or set FLOWTURBO_OFFLINE=1)")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["export"]:
        import export

        return export.main(arguments[1:], prog="download.py export")
    (options,) = cli.parse(cli.new_parser(__doc__, EPILOG), arguments, {"what to download": Options})
    if options.names:
        download(options)
    else:
        print(listing(cache_folder(options.cache_dir)))


def find_model(name: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights called `name`, a file or a public one, as in the original release; see weights/checkpoint.py."""
    from flowturbo.weights.checkpoint import find_model

    return find_model(name)


def listing(folder: Path, assets: Mapping[str, Asset] = ASSETS) -> str:
    """What can be downloaded: name, size, state, contents, licence and sources."""
    lines = [f"{folder} (the cache folder; another one with --cache-dir or {CACHE_VARIABLE})", ""]
    for name, asset in assets.items():
        here = [progress(file, folder) for file in asset.files]
        complete = all((folder / file.path).is_file() for file in asset.files)
        known = complete or all(file.size for file in asset.files)
        sizes = [size if complete else file.size or file.about for file, size in zip(asset.files, here)]
        size = ("" if known else "about ") + _bytes(sum(filter(None, sizes)))
        arrived = sum(filter(None, here))
        state = "here" if complete else f"incomplete, {_bytes(arrived)} so far" if arrived else "not here"
        hosts = dict.fromkeys("/".join(url.split("/")[2:-1]) for file in asset.files for url in file.urls)
        lines += [
            f"{name:18}{size:>13}   {state}",
            f"    {asset.about}",
            f"    {asset.path}; licence: {asset.licence}",
            *(f"    from {host}" for host in hosts),
        ]
    return "\n".join([*lines, "", "python download.py NAME... or all; --help tells more"])


def _bytes(count: int) -> str:
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def download(options: Options) -> None:
    """Get each, and say where it is. One that fails does not keep the others from coming."""
    wanted = list(ASSETS) if "all" in options.names else options.names
    failed: list[str] = []
    for name in wanted:
        try:
            print(f"{name}: {fetch(name, options.cache_dir, offline=options.offline, verify=True)}", flush=True)
        except (ValueError, OSError) as error:
            if len(wanted) == 1:
                raise
            print(f"{name}: {cli.one_line(error)}{advice_for(error)}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(wanted)} not downloaded: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run_script(main)
