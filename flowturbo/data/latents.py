"""Cache the autoencoder's moments of every image, both flips, so that training never encodes again.

Usage:
  python -m flowturbo.data.latents SRC DST                                       # SRC: one folder of images per class
  torchrun --nproc_per_node=8 -m flowturbo.data.latents SRC DST --batch-size 64

DST then takes the place of SRC as train.py's --data-path. Interrupted? Run the same command again; only missing or
damaged shards are made.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flowturbo.data.classes import class_indices
from flowturbo.data.folders import ClassFolder
from flowturbo.data.pictures import from_uint8
from flowturbo.networks.autoencoder import Autoencoder, load_autoencoder
from flowturbo.system import cli
from flowturbo.system.distributed import World, world
from flowturbo.system.files import atomic_write, exclusive, remove_leftovers, sha256

INDEX = "index.json"


class LatentFolder:
    """Cached moments in place of a folder of images: shards of float16 (n, 2 flips, 2C, h, w) and an index.

    Raises ValueError where the folder is incomplete or damaged, or was made with another autoencoder, image size or
    number of latent channels than the model needs.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        autoencoder: Autoencoder,
        image_size: int | None = None,
        num_classes: int | None = None,
        class_map: Mapping[str, int] | None = None,
    ):
        self.root = Path(root)
        index = _read_json(self.root / INDEX)
        if not isinstance(index, dict) or "shards" not in index:
            raise ValueError(f"{self.root} holds no finished latents: run python -m flowturbo.data.latents again")
        plan = _checked_plan(self.root, index)
        if plan["autoencoder"] != autoencoder.fingerprint():
            raise ValueError(
                f"{self.root} was made with another autoencoder ({plan['autoencoder_name']}) than this one"
            )
        if image_size not in (None, plan["image_size"]):
            raise ValueError(f"{self.root} was made at image size {plan['image_size']}, not {image_size}")
        self._dataset, self._digests = plan["dataset"], index["shards"]
        self.image_size, self.classes, self.shard_size = plan["image_size"], plan["classes"], plan["shard_size"]
        indices = class_indices(self.classes, num_classes, class_map)
        self.labels = [indices[target] for target in plan["folders"]]
        self._shards: dict[int, np.ndarray] = {}  # opened where they are read, so that loader workers open their own
        for shard in range(len(index["shards"])):
            rows = min(self.shard_size, len(self) - shard * self.shard_size)
            if self._open(shard).shape[:2] != (rows, 2):
                raise ValueError(
                    f"{shard_path(self.root, shard)} is damaged: run python -m flowturbo.data.latents again"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, flipped: bool) -> tuple[np.ndarray, int]:
        """(moments float16 (2C, h, w), class index)."""
        shard, row = divmod(index, self.shard_size)
        if shard not in self._shards:
            if sha256(shard_path(self.root, shard)) != self._digests[shard]:
                raise ValueError(
                    f"{shard_path(self.root, shard)} is damaged: run python -m flowturbo.data.latents again"
                )
            self._shards[shard] = self._open(shard)
        return np.array(self._shards[shard][row, int(flipped)]), self.labels[index]

    def fingerprint(self) -> str:
        return self._dataset

    def _open(self, shard: int) -> np.ndarray:
        path = shard_path(self.root, shard)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ValueError(f"{path} is missing or damaged: run python -m flowturbo.data.latents again") from None


def _checked_plan(root: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The plan in a finished index. Raises ValueError where it is anything but what `main` writes."""
    plan: Any = index.get("plan")
    shards = index["shards"]
    texts = ("dataset", "autoencoder", "autoencoder_name")
    whole = (
        isinstance(plan, dict)
        and all(isinstance(plan.get(name), str) for name in texts)
        and all(type(plan.get(name)) is int and plan[name] > 0 for name in ("image_size", "shard_size"))
        and all(isinstance(plan.get(name), list) for name in ("classes", "folders"))
        and all(isinstance(name, str) for name in plan["classes"])
        and all(type(target) is int and 0 <= target < len(plan["classes"]) for target in plan["folders"])
        and isinstance(shards, list)
        and len(shards) == -(-len(plan["folders"]) // plan["shard_size"]) > 0
    )
    if not whole:
        raise ValueError(f"{root / INDEX} is damaged: run python -m flowturbo.data.latents again")
    return plan


def is_latent_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a data folder holds cached latents, finished or not, rather than images."""
    return (Path(path) / INDEX).is_file()


def shard_path(root: Path, shard: int) -> Path:
    """Where shard number `shard` lies; its digest stands beside it until the index has it."""
    return root / f"{shard:05d}.npy"


class _Images(Dataset):
    """The images at `indices`, uint8 (C, H, W)."""

    def __init__(self, data: ClassFolder, indices: range):
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data.read(self.indices[position], False)[0]))


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip())
    parser.prog = "python -m flowturbo.data.latents"
    parser.add_argument("source", metavar="SRC", help="one folder of images per class")
    parser.add_argument("destination", metavar="DST", help="folder for the latents")
    parser.add_argument("--vae-ckpt", default="vae-ema", metavar="NAME", help="alias, hub id or local folder")
    parser.add_argument("--image-size", type=int, default=256, help="side of the square crop")
    parser.add_argument("--batch-size", type=int, default=16, help="images encoded at once by each rank")
    parser.add_argument("--shard-size", type=int, default=4096, help="images per file; 64 KiB each at 256 pixels")
    parser.add_argument("--num-workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the autoencoder")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    if args.batch_size < 1 or args.shard_size < 1 or args.num_workers < 0:
        parser.error("--batch-size and --shard-size must be at least 1, --num-workers at least 0")
    with world(args.device) as ranks:
        autoencoder = load_autoencoder(args.vae_ckpt, ranks.device)
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError("--vae-ckpt none has no latents to cache")
        if args.image_size < 1 or args.image_size % autoencoder.factor:
            raise ValueError(f"--image-size {args.image_size} is not a multiple of {autoencoder.factor}")
        data = ClassFolder(args.source, args.image_size)
        plan = {
            "dataset": data.fingerprint(),
            "autoencoder": autoencoder.fingerprint(),
            "autoencoder_name": args.vae_ckpt,
            "image_size": args.image_size,
            "shard_size": args.shard_size,
            "precision": args.precision,
            "classes": data.classes,
            "folders": data.folders,
        }
        root = Path(args.destination)
        ranks.agree(lambda: claim(root, plan))
        autoencoder.network.to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
        with exclusive(root, patience=20) if ranks.is_main else nullcontext():  # a killed run's workers linger
            seconds, made = encode(args, ranks, autoencoder, data, root)
            ranks.barrier()
            ranks.agree(lambda: finish(root, plan, len(data)))
        if ranks.is_main:
            rate = f", {ranks.size * made / seconds:.1f} images/s" if made else ""
            print(
                f"{len(data)} images in {len(data.classes)} classes: {root}{rate}; pass it as --data-path to train.py"
            )


def claim(root: Path, plan: dict[str, Any]) -> None:
    """Make the folder for this plan, or go on with one made for the same.

    Raises ValueError naming the first difference where the folder was made with another plan.
    """
    others = [path for path in root.iterdir() if path.suffix != ".tmp"] if root.is_dir() else []
    if others and not is_latent_folder(root):
        raise ValueError(f"{os.fspath(root)!r} holds something else than latents: choose another folder")
    before = _read_json(root / INDEX)
    if before is None:
        with atomic_write(root / INDEX) as file:
            file.write(json.dumps({"plan": plan}).encode())
        return
    found = before.get("plan", {})
    for name, value in plan.items():
        if name != "autoencoder_name" and found.get(name) != value:
            shown = "" if isinstance(value, list) else f" {found.get(name)!r}, not {value!r}"
            raise ValueError(f"{os.fspath(root)!r} was made with another {name.replace('_', ' ')}{shown}")


def encode(
    args: argparse.Namespace, ranks: World, autoencoder: Autoencoder, data: ClassFolder, root: Path
) -> tuple[float, int]:
    """Make this rank's shards that are not there or damaged; returns the seconds and images it took."""
    shards = range(ranks.rank, -(-len(data) // args.shard_size), ranks.size)
    started, made = time.perf_counter(), 0
    bar = tqdm(total=len(data), unit="img", disable=not ranks.is_main, dynamic_ncols=True, desc="encoding")
    with bar:
        for shard in shards:
            indices = range(shard * args.shard_size, min((shard + 1) * args.shard_size, len(data)))
            if _is_whole(root, shard):
                bar.update(min(len(indices) * ranks.size, len(data) - bar.n))
                continue
            moments = []
            for part in _encoded(args, ranks, autoencoder, data, indices):
                moments.append(part)
                made += len(part)
                bar.update(min(len(part) * ranks.size, len(data) - bar.n))
            with atomic_write(shard_path(root, shard)) as file:
                np.save(file, np.concatenate(moments))
            with atomic_write(shard_path(root, shard).with_suffix(".sha256")) as file:
                file.write(sha256(shard_path(root, shard)).encode())
    return time.perf_counter() - started, made


def _encoded(
    args: argparse.Namespace, ranks: World, autoencoder: Autoencoder, data: ClassFolder, indices: range
) -> Iterator[np.ndarray]:
    """Moments of images and of their mirror images, float16 (n, 2, 2C, h, w), batch by batch."""
    loader = DataLoader(
        _Images(data, indices),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=ranks.device.type == "cuda",
    )
    for images in loader:
        images = from_uint8(images.to(ranks.device, non_blocking=True))
        both = torch.stack([autoencoder.moments(images), autoencoder.moments(images.flip(-1))], dim=1)
        yield both.half().cpu().numpy()


def finish(root: Path, plan: dict[str, Any], count: int) -> None:
    """Gather the shards' digests into the index, which makes the folder complete."""
    shards = range(-(-count // plan["shard_size"]))
    digests = [shard_path(root, shard).with_suffix(".sha256").read_text() for shard in shards]
    with atomic_write(root / INDEX) as file:
        file.write(json.dumps({"plan": plan, "shards": digests}).encode())
    remove_leftovers(root)


def _is_whole(root: Path, shard: int) -> bool:
    path = shard_path(root, shard)
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_text() == sha256(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None where there is no file. Raises ValueError naming a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an index of latents")
    return content


if __name__ == "__main__":
    cli.run_script(main)
