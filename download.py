"""Weights and reference files: list them, download them, and export what you trained.

Usage:
  python download.py                                     # what exists, how large, whose, and whether it is here
  python download.py sit-xl-2-256 sit-xl-2-refiner vae-ema          # all that sample.py needs
  python download.py export results/000-refiner-no-note -o refiner.safetensors       # has its own --help

From Python:
  from download import find_model
  network.load_state_dict(find_model("SiT-XL-2-256x256.pt"))
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline
from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.system import cli
from flowturbo.system.files import atomic_write, sha256
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint, weights_of
from flowturbo.weights.fetch import CACHE_VARIABLE, cache_folder, fetch, locate, progress
from flowturbo.weights.registry import ASSETS, Asset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = (".safetensors", ".pt")

EPILOG = f"""\
Downloads go to the cache folder: --cache-dir, else ${CACHE_VARIABLE}, else ~/.cache/flowturbo. The other scripts
look there for files that are not where they are told, so that `python sample.py` finds SiT-XL-2-256x256.pt; with
--cache-dir, set {CACHE_VARIABLE} to the same folder for them.

A download that is cut continues where it stopped, at once or with the next run. Sizes and hashes are held to where
they are published, and where not to those of the first download. Naming a file that is here hashes it again.
Without network: download elsewhere, copy the cache folder, and set FLOWTURBO_OFFLINE=1. HTTPS_PROXY is respected.
"""

EXPORT_EPILOG = """\
Writes the averaged (EMA) weights with the model's config, which every script loads without further flags, and
beside them a model card (refiner.md) with config, training settings and how to use it. Absolute paths in the
settings are reduced to their last part.

examples:
  python download.py export results/000-refiner-no-note -o refiner.safetensors
  python download.py export results/000-refiner-no-note/checkpoints/0005000.pt -o half.pt --dtype fp16
  python download.py export results/000-refiner-no-note -o refiner.safetensors --push-to-hub me/my-refiner
  python sample.py --refiner-ckpt refiner.safetensors
"""


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to download, or all; without, a list is shown")
    parser.add_argument("--cache-dir", metavar="DIR", help=f"where to (default: ${CACHE_VARIABLE}, else see below)")
    parser.add_argument("--offline", action="store_true", help="only check what is here (or set FLOWTURBO_OFFLINE=1)")
    return parser


def build_export_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("Export a trained network: its weights and config in one file.", EXPORT_EPILOG)
    parser.prog += " export"
    parser.add_argument("run", metavar="RUN", help="a run's folder, for its newest checkpoint, or a checkpoint file")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="ending in " + " or ".join(FORMATS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the exported weights")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload weights and card to this hub repository")
    parser.add_argument("--private", action="store_true", help="create that repository as a private one")
    return parser


def main(argv: list[str] | None = None) -> None:
    """List, download, or export."""
    arguments = cli.hyphenate(argv)
    if arguments[:1] == ["export"]:
        args = build_export_parser().parse_args(arguments[1:])
        out = export(args.run, args.out, DTYPES[args.dtype])
        if args.push_to_hub:
            push(out, args.push_to_hub, args.private)
        return
    args = build_parser().parse_args(arguments)
    if args.names:
        download(args.names, args.cache_dir, args.offline)
    else:
        print(listing(cache_folder(args.cache_dir)))


def find_model(name: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights called `name`, on the CPU: a checkpoint file, or a registered name, downloaded if need be.

    As in the original release: `model.load_state_dict(find_model("SiT-XL-2-256x256.pt"))`. Of a training checkpoint
    these are the EMA weights. `flowturbo.weights.fetch.fetch` gives the path instead. Raises ValueError or OSError.
    """
    path = locate(str(name)) or fetch(str(name))
    if path.is_dir():
        raise ValueError(f"{str(name)!r} is a folder, not the weights of a SiT or its refiner: pass it as --vae-ckpt")
    return weights_of(load_checkpoint(path), path)


def listing(folder: Path, assets: dict[str, Asset] = ASSETS) -> str:
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


def download(names: list[str], folder: str | None, offline: bool) -> None:
    """Get each, and say where it is. One that fails does not keep the others from coming."""
    wanted = list(ASSETS) if "all" in names else names
    failed: list[str] = []
    for name in wanted:
        try:
            print(f"{name}: {fetch(name, folder, offline=offline, verify=True)}", flush=True)
        except (ValueError, OSError) as error:
            if len(wanted) == 1:
                raise
            print(f"{name}: {cli.one_line(error)}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(wanted)} not downloaded: {', '.join(failed)}")


def export_weights(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Write a training checkpoint's EMA weights and config alone, as .safetensors or .pt, and return the config.

    The config holds "model", "training" and "step". ValueError for a checkpoint without a config, for weights that
    do not fit it, are not finite or leave the range of `dtype`, and for another ending of `out`.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"{str(out)!r} must end in {' or '.join(FORMATS)}")
    content = load_checkpoint(checkpoint)
    config = content.get("config", {})
    kinds = {kind.__name__: kind for kind in (SiT, VelocityRefiner)}
    kind = kinds.get(config.get("model", {}).get("class"))
    if kind is None:
        raise ValueError(f"checkpoint {os.fspath(checkpoint)!r} holds no config: export takes what train.py wrote")
    config = {**config, "training": _without_folders(config.get("training", {}))}
    config["step"] = content.get("step", config.get("step"))
    network = pipeline.load_network(kind, os.fspath(checkpoint))
    weights = {name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError(
            f"weights of {os.fspath(checkpoint)!r} leave the range of {dtype}: take --dtype bf16 or fp32"
        )
    if out.suffix == ".pt":
        save_checkpoint(out, {"ema": weights, "config": config})
    else:
        from safetensors.torch import save

        with atomic_write(out) as file:
            file.write(save(weights, {"format": "pt", "config": json.dumps(config)}))
    return config


def export(run: str, out: str, dtype: torch.dtype) -> Path:
    """Export a run's newest checkpoint, or a checkpoint file, with a model card beside it; the file's path."""
    folder = Path(run).resolve()
    checkpoint = Path(run)
    if folder.is_dir():
        found = CheckpointFolder(folder / "checkpoints").newest(print)
        if found is None:
            raise ValueError(f"run {run!r} has no checkpoint; expected {folder / 'checkpoints'}/NUMBER.pt")
        checkpoint = found
    config = export_weights(checkpoint, out, dtype)
    with atomic_write(Path(out).with_suffix(".md")) as file:
        file.write(card(Path(out), config, dtype).encode())
    print(f"{checkpoint} -> {out} ({_bytes(Path(out).stat().st_size)}), {Path(out).with_suffix('.md')}")
    return Path(out)


def _without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths reduced to their last part: an exported file tells nothing of a machine."""
    return {
        name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in settings.items()
    }


def card(path: Path, config: dict[str, Any], dtype: torch.dtype) -> str:
    """The model card of an exported file: Markdown with the hub's front matter."""
    training, is_refiner = config["training"], config["model"]["class"] == "VelocityRefiner"
    after = "" if config["step"] is None else f" after {config['step']} steps"
    what = "FlowTurbo velocity refiner" if is_refiner else "SiT velocity predictor"
    command = f"python sample.py --predictor-ckpt {path.name} --schedule H8"
    if is_refiner:
        command = f"python sample.py --predictor-ckpt PREDICTOR --refiner-ckpt {path.name} --schedule H1P5R3"
    if training.get("vae_ckpt"):
        command += f" --vae-ckpt {training['vae_ckpt']}"
    lines = [
        "---",
        "library_name: pytorch",
        "pipeline_tag: unconditional-image-generation",
        "tags: [flowturbo, flow-matching]",
        "---",
        "",
        f"# {path.stem}",
        "",
        f"A {what}: averaged (EMA) weights{after}, {str(dtype).removeprefix('torch.')}.",
        "",
        f"`{path.name}`, {path.stat().st_size:,} bytes, sha256 `{sha256(path)}`",
        "",
        "## Use",
        "",
        "```bash",
        command,
        "```",
    ]
    for title, table in (("Model", config["model"]), ("Training", training)):
        rows = [f"| {name} | {value} |" for name, value in table.items() if value is not None]
        lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def push(path: Path, repository: str, private: bool) -> None:
    """Upload an exported file and its card to a hub repository, made if need be. Raises ValueError where it fails."""
    if repository.count("/") != 1:
        raise ValueError(f"--push-to-hub {repository!r} must be OWNER/NAME")
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        for source, name in ((path, path.name), (path.with_suffix(".md"), "README.md")):
            api.upload_file(path_or_fileobj=source, path_in_repo=name, repo_id=repository)
    except Exception as error:  # the hub's client raises its own and its transport's types
        raise ValueError(
            f"cannot upload {path} to {repository}: {cli.one_line(error)}; it needs a token that may write there "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    print(f"uploaded to https://huggingface.co/{repository}")


if __name__ == "__main__":
    cli.run_script(main)
