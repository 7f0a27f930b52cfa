"""Cache an autoencoder's moments of every image, both flips, so that training never encodes again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flowturbo.data.identity import READING_RULES, data_changes
from flowturbo.data.labelled import LabelledImages
from flowturbo.data.latents import INDEX, OtherLatents, identity_of, is_latent_folder, shard_path
from flowturbo.data.options import CachingOptions
from flowturbo.data.pictures import from_uint8
from flowturbo.data.workers import Loader, items
from flowturbo.system.claims import differences, read_record, write_record
from flowturbo.system.distributed import World
from flowturbo.system.files import LOCK, atomic_write, exclusive, remove_leftovers, sha256

ENCODING = ("autoencoder", "image_size", "shard_size", "precision", "classes", "folders")  # what shapes the shards


class Encoder(Protocol):
    """What makes moments: an Autoencoder is one."""

    factor: int  # how many times smaller than the images the latents are

    def fingerprint(self) -> str:
        """The sha256 of the weights."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """(N, 2C, h, w) from images (N, 3, H, W) in [-1, 1]."""
        ...

    def to(self, dtype: torch.dtype) -> object:
        """Hold the weights in this type."""
        ...


class Cached(NamedTuple):
    """What caching has done on this rank."""

    images: int  # encoded; those that were there already do not count
    seconds: float


def cache_latents(
    data: LabelledImages,
    encoder: Encoder,
    name: str,
    root: str | os.PathLike[str],
    options: CachingOptions,
    ranks: World,
) -> Cached:
    """Make a LatentFolder of data under `root`, or go on with one; `name` is what the autoencoder is called.

    Only shards that are missing or damaged are made. Raises OtherLatents where the folder was made with other
    settings, and ValueError where it holds something else, the image size is no multiple of the encoder's factor, or
    an image has moments that are not finite (it is named).
    """
    if data.image_size < 1 or data.image_size % encoder.factor:
        raise ValueError(f"image_size {data.image_size} is not a multiple of {encoder.factor}")
    root = Path(root)
    with ranks.hold(lambda: _locked(root)):
        plan = ranks.agree(lambda: _claim(root, _plan(data, encoder, name, options), data))
        encoder.to({"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision])
        done = _make_shards(data, encoder, root, options, ranks)
        ranks.barrier()
        ranks.agree(lambda: _finish(root, plan, len(data)))
    return done


def _plan(data: LabelledImages, encoder: Encoder, name: str, options: CachingOptions) -> dict[str, Any]:
    """Everything that the latents depend on, as JSON types."""
    return {
        "dataset": data.fingerprint(),
        "dataset_covers": data.fingerprint_covers,
        "dataset_of_0_1": data.fingerprint_of_0_1,
        "reading_rules": READING_RULES,
        "read_otherwise": {rule: data.read_otherwise(rule) for rule in READING_RULES},
        "background": data.background,
        "autoencoder": encoder.fingerprint(),
        "autoencoder_name": name,
        "image_size": data.image_size,
        "shard_size": options.shard_size,
        "precision": options.precision,
        "classes": data.classes,
        **({} if data.keys == data.classes else {"class_keys": data.keys}),
        "folders": data.folders,
    }


def _locked(root: Path) -> AbstractContextManager[None]:
    """The folder's lock; the folder is made. Raises ValueError where it holds something else."""
    if root.is_dir() and not is_latent_folder(root) and _others(root):
        raise ValueError(f"{os.fspath(root)!r} holds something else than latents")
    root.mkdir(parents=True, exist_ok=True)
    return exclusive(root, patience=20)  # a killed run's workers linger


def _others(root: Path) -> list[Path]:
    """What is in a folder besides what killed runs leave."""
    return [path for path in root.iterdir() if path.suffix != ".tmp" and path.name != LOCK]


def _claim(root: Path, plan: dict[str, Any], data: LabelledImages) -> dict[str, Any]:
    """Record the plan in the folder, or go on with one made for the same; returns its plan."""
    if _others(root) and not is_latent_folder(root):
        raise ValueError(f"{os.fspath(root)!r} holds something else than latents")
    index = read_record(root / INDEX)
    if index is None:
        write_record(root / INDEX, {"plan": plan})
        return plan
    before = index.get("plan")
    if not isinstance(before, Mapping) or not isinstance(before.get("dataset"), str):
        raise OtherLatents(f"{os.fspath(root)!r} was made for images that its index does not name")
    found = differences(before, plan, ENCODING) + data_changes(identity_of(before).record(), data)
    if found:
        raise OtherLatents(f"{os.fspath(root)!r} was made otherwise: {found[0]}")
    return plan


def _make_shards(data: LabelledImages, encoder: Encoder, root: Path, options: CachingOptions, ranks: World) -> Cached:
    """Make this rank's shards that are not there or damaged."""
    size, started, made = options.shard_size, time.perf_counter(), 0
    bar = tqdm(total=len(data), unit="img", disable=not ranks.is_main, dynamic_ncols=True, desc="encoding")
    with bar:
        for shard in range(ranks.rank, -(-len(data) // size), ranks.size):
            indices = range(shard * size, min((shard + 1) * size, len(data)))
            if _is_whole(root, shard):
                bar.update(min(len(indices) * ranks.size, len(data) - bar.n))
                continue
            moments = []
            for part in _encoded(data, indices, encoder, options, ranks.device):
                moments.append(part)
                made += len(part)
                bar.update(min(len(part) * ranks.size, len(data) - bar.n))  # the other ranks are about as far
            with atomic_write(shard_path(root, shard)) as file:
                np.save(file, np.concatenate(moments))
            with atomic_write(_digest_path(root, shard)) as file:
                file.write(sha256(shard_path(root, shard)).encode())
    return Cached(made, time.perf_counter() - started)


def _encoded(
    data: LabelledImages, indices: range, encoder: Encoder, options: CachingOptions, device: torch.device
) -> Iterator[np.ndarray]:
    """Moments of images and of their mirror images, float16 (n, 2, 2C, h, w), batch by batch."""
    loader = Loader(_Images(data, indices), options.num_workers, device, batch_size=options.batch_size)
    done = indices.start
    for batch in items(loader):
        images = from_uint8(batch.to(device, non_blocking=True))
        both = torch.stack([encoder.moments(images), encoder.moments(images.flip(-1))], dim=1).half()
        finite = both.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            raise ValueError(f"the moments of {data.path(done + finite.index(False))!r} are not finite in float16")
        done += len(both)
        yield both.cpu().numpy()


class _Images(Dataset):
    """The images at `indices`, uint8 (C, H, W)."""

    def __init__(self, data: LabelledImages, indices: range):
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.data.read(self.indices[position], False)[0]))


def _finish(root: Path, plan: dict[str, Any], count: int) -> None:
    """Gather the shards' digests into the index, which makes the folder complete."""
    shards = range(-(-count // plan["shard_size"]))
    digests = [_digest_path(root, shard).read_text() for shard in shards]
    write_record(root / INDEX, {"plan": plan, "shards": digests})
    remove_leftovers(root)


def _is_whole(root: Path, shard: int) -> bool:
    path, digest = shard_path(root, shard), _digest_path(root, shard)
    return path.is_file() and digest.is_file() and digest.read_text() == sha256(path)


def _digest_path(root: Path, shard: int) -> Path:
    return shard_path(root, shard).with_suffix(".sha256")
