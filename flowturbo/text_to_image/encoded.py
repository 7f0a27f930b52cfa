"""What training takes of captions and images: embeddings and latents, encoded once and kept in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flowturbo.data.loader import Batch, order_of
from flowturbo.data.pictures import from_uint8
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.system.claims import check_same, read_record, write_record
from flowturbo.text_to_image.captions import identity, read_folder, read_picture
from flowturbo.text_to_image.families import Conditions
from flowturbo.text_to_image.pipelines import Encoded, encode_images, encode_prompts, fingerprint, image_channels

LATENTS, RECORD, CAPTIONS = "latents.npy", "record.json", "captions.npy"


class Draws(NamedTuple):
    """What a training sample is drawn, and its prompt: the null prompt's rows where it is dropped."""

    noise: Tensor  # (N, C, h, w)
    uniform: Tensor  # (N, 3) in [0, 1): for the time, Δ and the guidance embedding
    states: Tensor  # (N, tokens, width)
    summary: Tensor  # (N, ...): pooled embeddings or a mask; (N, 0) where the network takes none


@dataclass(frozen=True)
class CaptionSamples(Dataset):
    """Batches by sample numbers; all that is random about number k depends on (seed, k) alone.

    The arrays may lie on the disk. Row 0 of the embeddings is the null prompt's.
    """

    latents: np.ndarray  # (images, C, h, w)
    captions: np.ndarray  # (images,): the row of its caption
    embeddings: Sequence[np.ndarray]  # of each of the family's conditions
    seed: int
    dropout: float

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        images, rows, uniform, noise = [], [], [], []
        for number in numbers:
            epoch, position = divmod(number, len(self))
            image = int(order_of(self.seed, epoch, len(self))[position])
            random = keyed_generator(self.seed, number, Stream.TRAINING)
            *others, drop = random.random(4, dtype=np.float32)
            uniform.append(others)
            noise.append(random.standard_normal(self.latents.shape[1:], dtype=np.float32))
            rows.append(0 if drop < self.dropout else int(self.captions[image]))
            images.append(self.latents[image])
        kept = [
            torch.from_numpy(np.stack([array[row] for row in rows]).astype(np.float32)) for array in self.embeddings
        ]
        kept += [torch.empty(len(rows), 0)] * (2 - len(kept))
        return Batch(
            torch.from_numpy(np.stack(images).astype(np.float32)),
            torch.tensor(rows),
            torch.tensor(numbers),
            Draws(torch.from_numpy(np.stack(noise)), torch.from_numpy(np.array(uniform, np.float32)), *kept),
        )


@torch.no_grad()
def encode_folder(pipe: Any, root: str, cache: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Encode a folder's images and captions into `cache`, unless that was done; returns the record of it.

    Raises OtherSettings where the cache is of other data or another pipeline, and ValueError as the readers do.
    """
    items = read_folder(root)
    height, width = size
    record = {"data": identity(items), "pipeline": fingerprint(pipe), "height": height, "width": width}

    def encode() -> None:
        prompts = _encode_texts(pipe, sorted({item.caption for item in items}), cache)
        np.save(cache / CAPTIONS, np.array([prompts[item.caption] for item in items]))

        def latents(part: range) -> Encoded:
            pixels = [read_picture(items[i], height, width, image_channels(pipe)) for i in part]
            return {"latents": encode_images(pipe, from_uint8(torch.from_numpy(np.stack(pixels))))}

        _write_rows(cache, latents, len(items))

    return _once(cache, record, encode)


@torch.no_grad()
def encode_texts(pipe: Any, prompts: Sequence[str], cache: Path) -> dict[str, Any]:
    """Encode prompts into `cache`, in their order, unless that was done; returns the record. Raises OtherSettings."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    record = {"data": digest, "pipeline": fingerprint(pipe), "prompts": len(prompts)}
    return _once(cache, record, lambda: _encode_texts(pipe, prompts, cache))


def _once(cache: Path, record: dict[str, Any], encode: Callable[[], object]) -> dict[str, Any]:
    if (before := read_record(cache / RECORD)) is not None:
        check_same(f"cache {str(cache)!r}", before, record)
        return record
    cache.mkdir(parents=True, exist_ok=True)
    encode()
    write_record(cache / RECORD, record)  # last: without it nothing here counts
    return record


def _encode_texts(pipe: Any, prompts: Sequence[str], cache: Path) -> dict[str, int]:
    """Write the embeddings of the null prompt and of these; returns the row of each."""
    rows = ["", *prompts]
    _write_rows(cache, lambda part: encode_prompts(pipe, rows[part.start : part.stop]), len(rows))
    return {prompt: row for row, prompt in enumerate(rows)}


def _write_rows(cache: Path, encode: Callable[[range], Encoded], count: int, batch: int = 16) -> None:
    """Write what `encode` makes of 0 to count - 1, a part at a time, as NAME.npy in half precision."""
    arrays: dict[str, np.ndarray] = {}
    for start in tqdm(range(0, count, batch), desc="encoding", unit="batch", disable=None):
        part = range(start, min(start + batch, count))
        for name, value in encode(part).items():
            if name not in arrays:
                shape = (count, *value.shape[1:])
                arrays[name] = np.lib.format.open_memmap(cache / f"{name}.npy", "w+", np.float16, shape)
            arrays[name][part.start : part.stop] = value.float().cpu().numpy()
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]


def open_samples(cache: Path, conditions: Sequence[str], seed: int, dropout: float) -> CaptionSamples:
    """The samples of a cache."""
    arrays = [np.load(cache / f"{name}.npy", mmap_mode="r") for name in conditions]
    return CaptionSamples(np.load(cache / LATENTS, mmap_mode="r"), np.load(cache / CAPTIONS), arrays, seed, dropout)


@dataclass(frozen=True)
class Prompts:
    """The embeddings of a cache, by the names of their family's conditions. Row 0 is the null prompt's."""

    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, cache: Path, conditions: Sequence[str]) -> Prompts:
        return cls({name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in conditions})

    def rows(self, numbers: Tensor, like: Tensor) -> Conditions:
        """Those of rows by number (N,), with the dtype and on the device of another tensor."""
        picked = numbers.cpu().numpy()
        return {name: torch.from_numpy(array[picked]).to(like) for name, array in self.arrays.items()}
