"""Images with captions, and what training takes of them: latents and embeddings, encoded once and kept in a folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flowturbo.data.images import read_image
from flowturbo.data.loader import Batch
from flowturbo.data.pictures import from_uint8
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.data.walk import walk
from flowturbo.system.claims import check_same, read_record, write_record
from flowturbo.text_to_image.pipelines import Encoded, encode_images, encode_prompts, fingerprint, image_channels

EXPECTED = "expected images with NAME.txt beside each, metadata.jsonl (file_name, text), .tar shards, or .parquet files"
LATENTS, RECORD, CAPTIONS = "latents.npy", "record.json", "captions.npy"


class Captioned(NamedTuple):
    """An image, by a name that tells it from others, its caption, and how to read its file."""

    name: str
    caption: str
    file: Callable[[], str | io.BytesIO]


def read_folder(root: str | os.PathLike[str]) -> list[Captioned]:
    """The captioned images of a folder, in a fixed order. Raises ValueError where there are none."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"data folder {str(folder)!r} does not exist: {EXPECTED}")
    sources = (_of_metadata, _of_text_files, _of_tars, _of_parquet)
    found = next((items for source in sources if (items := list(source(folder)))), [])
    if not found:
        raise ValueError(f"data folder {str(folder)!r} holds no captioned images: {EXPECTED}")
    return found


def _of_metadata(folder: Path) -> Iterator[Captioned]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            name, caption = str(entry["file_name"]), str(entry["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(path)!r}, line {number}: expected an object with file_name and text") from None
        yield Captioned(name, caption, partial(str, folder / name))


def _of_text_files(folder: Path) -> Iterator[Captioned]:
    for name in walk(folder).files:
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            caption = text.read_text(encoding="utf-8").strip()
            yield Captioned(name, caption, partial(str, folder / name))


def _of_tars(folder: Path) -> Iterator[Captioned]:
    """Shards as webdataset makes them: members of one name, NAME.jpg and NAME.txt."""

    def member(path: Path, offset: int, size: int) -> io.BytesIO:
        with open(path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = {m.name: m for m in archive if m.isfile()}
        for name, text in members.items():
            stem, dot, kind = name.rpartition(".")
            image = next(
                (members[stem + end] for end in (".jpg", ".jpeg", ".png", ".webp") if stem + end in members), None
            )
            if dot and kind == "txt" and image is not None:
                caption = member(path, text.offset_data, text.size).read().decode("utf-8").strip()
                place = (path, image.offset_data, image.size)
                yield Captioned(f"{path.name}/{image.name}", caption, partial(member, *place))


def _of_parquet(folder: Path) -> Iterator[Captioned]:
    """Tables with a column image (bytes, or a struct with bytes) and a column text or caption."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        return
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"reading {str(paths[0])!r} needs pyarrow") from None

    def cell(path: Path, row: int) -> io.BytesIO:
        value = pq.read_table(path, columns=["image"])["image"][row].as_py()
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)

    for path in paths:
        names = pq.read_schema(path).names
        text = next((name for name in ("text", "caption") if name in names), None)
        if text is None or "image" not in names:
            raise ValueError(f"{str(path)!r} has the columns {', '.join(names)}: expected image, and text or caption")

        for row, caption in enumerate(pq.read_table(path, columns=[text])[text].to_pylist()):
            yield Captioned(f"{path.name}/{row}", str(caption), partial(cell, path, row))


def read_picture(item: Captioned, height: int, width: int, channels: int) -> np.ndarray:
    """uint8 (C, height, width): the largest part of that shape around the image's centre. Raises ValueError."""
    file = item.file()
    if not isinstance(file, str):  # the one reader of images reads files
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile() as copy:
            copy.write(file.getvalue())
            copy.flush()
            pixels = read_image(copy.name, None, channels).pixels
    else:
        pixels = read_image(file, None, channels).pixels
    if pixels.shape[1:] == (height, width):
        return pixels
    picture = Image.fromarray(pixels.transpose(1, 2, 0).squeeze())
    scale = max(height / picture.height, width / picture.width)
    w, h = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (w - width) // 2, (h - height) // 2
    picture = picture.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    array = np.asarray(picture)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


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
            image = int(_order(self.seed, epoch, len(self))[position])
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


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the images in a pass over the data."""
    return keyed_generator(seed, epoch, Stream.ORDER).permutation(count)


def identity(items: Sequence[Captioned]) -> str:
    """A sha256 over names and captions."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.name}\0{item.caption}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def encode_folder(pipe: Any, root: str, cache: Path, size: tuple[int, int], batch: int = 16) -> dict[str, Any]:
    """Encode a folder's images and captions into `cache`, unless that was done; returns the record of it.

    Raises OtherSettings where the cache is of other data or another pipeline, and ValueError as the readers do.
    """
    items = read_folder(root)
    height, width = size
    record = {"data": identity(items), "pipeline": fingerprint(pipe), "height": height, "width": width}
    if (before := read_record(cache / RECORD)) is not None:
        check_same(f"cache {str(cache)!r}", before, record)
        return record
    cache.mkdir(parents=True, exist_ok=True)
    prompts = ["", *sorted({item.caption for item in items})]
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    np.save(cache / CAPTIONS, np.array([rows[item.caption] for item in items]))
    _write_rows(cache, lambda part: encode_prompts(pipe, prompts[part.start : part.stop]), len(prompts), batch)

    def latents(part: range) -> Encoded:
        pixels = [read_picture(items[i], height, width, image_channels(pipe)) for i in part]
        return {"latents": encode_images(pipe, from_uint8(torch.from_numpy(np.stack(pixels))))}

    _write_rows(cache, latents, len(items), batch)
    write_record(cache / RECORD, record)  # last: without it nothing here counts
    return record


def _write_rows(cache: Path, encode: Callable[[range], Encoded], count: int, batch: int) -> None:
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
