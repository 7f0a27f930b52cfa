"""Checkpoints: weights, EMA, optimizer, step and config, as tensors and JSON types; nothing is ever unpickled
but tensors and plain containers."""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowturbo.system.claims import read_record, write_record
from flowturbo.system.files import atomic_write, check_file, remove_leftovers, sha256
from flowturbo.system.values import plain
from flowturbo.weights.fetch import MissingWeights, find, locate
from flowturbo.weights.pickles import Refused, check_pickles

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of them in a run's folder
EMA = ("ema", "ema_state_dict")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODEL = ("model", "model_state_dict", "state_dict")


def resolve(name: str | os.PathLike[str], field: str = "", say: Callable[[str], object] = print) -> Path:
    """The checkpoint file that a name stands for: a file, a run's folder for its newest whole one, or a download.

    `say` is told of damaged checkpoints that are passed over. Raises MissingWeights, naming the option `field` if
    given, where nothing is there, ValueError for a folder without checkpoints.
    """
    found = locate(os.fspath(name))
    if found is None:
        of = f" ({field})" if field else ""
        raise MissingWeights({field: os.fspath(name)}, f"checkpoint {os.fspath(name)!r}{of} does not exist")
    if not found.is_dir():
        return found
    folder = found if found.name == CHECKPOINTS else found / CHECKPOINTS
    newest = CheckpointFolder(folder).newest(say)
    if newest is None:
        raise ValueError(f"folder {os.fspath(found)!r} holds no checkpoint: expected {folder}/NUMBER.pt")
    return newest


def find_model(name: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights called `name`, on the CPU: a checkpoint file, a run, or a registered name, downloaded if need be.

    As in the original release: `model.load_state_dict(find_model("SiT-XL-2-256x256.pt"))`. Of a training checkpoint
    these are the EMA weights. Raises ValueError or OSError.
    """
    path = resolve(find(os.fspath(name)))
    return weights_of(load_checkpoint(path), path)


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> str:
    """Write a checkpoint whole or not at all; makes the folder; returns its sha256.

    Raises OSError naming a path that takes none; what was there before stays.
    """
    try:
        with atomic_write(path) as file:
            torch.save(dict(content), file)
            file.flush()
            return sha256(file.name)  # of what was written, read back before it takes its place
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU. Raises ValueError naming a file that is missing or is not one.

    Checkpoints of the original SiT and FlowTurbo scripts carry an argparse.Namespace: just that is let in. A
    .safetensors file gives {"ema", "config"} where its metadata hold a config, else its tensors.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise MissingWeights({"": path}, f"checkpoint {path!r} does not exist")
    check_file(path)
    verified = check_digest(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                config = json.loads((file.metadata() or {}).get("config", "null"))
            return {"ema": weights, "config": config} if isinstance(config, dict) else weights
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as archive:
                _check_stored(archive, os.path.getsize(path))
                if not verified and archive.testzip() is not None:
                    raise ValueError("its checksums are others")
        check_pickles(path, mapped)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle's protocol, where the file is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Refused as error:
        reason = f"it holds what is not loaded: {error}"
        raise ValueError(f"cannot read checkpoint {path!r}: {reason}") from None
    except Exception as error:  # a damaged file raises nearly anything; nine types were seen
        reason = "no checkpoint, or a damaged one"
        raise ValueError(f"cannot read checkpoint {path!r}: {reason} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path!r} holds a {type(content).__name__}, expected weights by name")
    return content


def _check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError for compressed members, which mapping would take for weights, and for sizes that lie."""
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("an archive that inflates")


def weights_of(content: Mapping[str, Any], path: str | os.PathLike[str], prefer_ema: bool = True) -> dict[str, Tensor]:
    """The weights in a checkpoint: its EMA where it has one, else its model, else itself.

    They may be called as other projects call them: `ema_state_dict`, `model_state_dict`, `state_dict`. Prefixes left
    by DistributedDataParallel and torch.compile are removed. Raises ValueError if there are none.
    """
    order = EMA + MODEL if prefer_ema else MODEL + EMA
    state = next((content[key] for key in order if isinstance(content.get(key), Mapping)), content)
    weights = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", key): value
        for key, value in state.items()
        if isinstance(value, Tensor) and isinstance(key, str)
    }
    if not weights:
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds no weights")
    return weights


def check_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raises ValueError that lists missing, unknown, misshapen and non-finite weights."""
    expected = module.state_dict()
    problems = [f"no {key}" for key in expected.keys() - weights.keys()]
    problems += [f"unknown {plain(key, 80)}" for key in weights.keys() - expected.keys()]
    for key in sorted(expected.keys() & weights.keys()):
        if not is_plain(weights[key]):
            problems.append(f"{key} is no plain tensor of real numbers in 16, 32 or 64 bits")
        elif expected[key].shape != weights[key].shape:
            problems.append(f"{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}")
        elif not torch.isfinite(weights[key]).all():
            problems.append(f"{key} is not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"checkpoint {os.fspath(path)!r} does not fit this {type(module).__name__}: {shown}")


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights strictly, as `check_weights` has them."""
    check_weights(module, weights, path)
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    module.load_state_dict(dict(weights), strict=True)


def is_plain(value: object) -> bool:
    """Whether something is a tensor of floats that lie in memory one by one: not sparse, nor expanded from one.

    Floats of 8 bits and less are none: they mean nothing without scales, which no checkpoint of ours has.
    """
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        return False
    stored = value.untyped_storage().nbytes()
    return value.dtype in FLOATS and stored >= value.numel() * value.element_size()


class CheckpointFolder:
    """The checkpoints of a run, NNNNNNN.pt by step, with a manifest of their sha256.

    A checkpoint counts once the manifest has it. `keep_last` keeps that many of the newest (0: all), besides those
    whose step is a multiple of `keep_every` (0: none).
    """

    def __init__(self, folder: str | os.PathLike[str], keep_last: int = 0, keep_every: int = 0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every

    def path(self, step: int) -> Path:
        return self.folder / f"{step:07d}.pt"

    def digests(self) -> dict[str, str]:
        """File name -> sha256. Raises ValueError naming a manifest that cannot be read."""
        content = read_record(self.folder / MANIFEST) or {}
        if not all(
            re.fullmatch(r"[0-9]{7,18}\.pt", name) and re.fullmatch("[0-9a-f]{64}", str(digest))
            for name, digest in content.items()
        ):
            raise ValueError(f"{self.folder / MANIFEST} is no manifest of checkpoints")
        return content

    def record(self, path: Path, digest: str) -> None:
        """Enter a checkpoint that has been written, and drop those that are no longer to be kept."""
        digests = {**self.digests(), path.name: digest}
        steps = sorted(int(Path(name).stem) for name in digests)
        until_now = [step for step in steps if step <= int(path.stem)]  # later ones may be all that another run left
        kept = set(until_now[-self.keep_last :] if self.keep_last else until_now) | (set(steps) - set(until_now))
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0 < step}
        names = {self.path(step).name for step in kept}
        self._write(digests)
        if dropped := digests.keys() - names:  # forgotten only once they are gone: a kill in between leaves no orphan
            for name in dropped:
                (self.folder / name).unlink(missing_ok=True)
            self._write({name: value for name, value in digests.items() if name in names})
        remove_leftovers(self.folder)

    def is_latest(self, path: Path) -> bool:
        """Whether a file is a checkpoint of this folder, and no other that the manifest has is of a later step."""
        steps = [int(Path(name).stem) for name in self.digests() if (self.folder / name).is_file()]
        return self.folder.name == CHECKPOINTS and path.stem.isdigit() and int(path.stem) >= max(steps, default=0)

    def newest(self, warn: Callable[[str], object]) -> Path | None:
        """The newest whole checkpoint, or None; `warn` is told of each damaged one that is passed over."""
        digests = self.digests()
        for name in sorted(digests, key=lambda name: int(Path(name).stem), reverse=True):
            path = self.folder / name
            if path.is_file() and sha256(path) == digests[name]:
                return path
            warn(f"checkpoint {path} is missing or damaged: passed over")
        return None

    def _write(self, digests: Mapping[str, str]) -> None:
        write_record(self.folder / MANIFEST, dict(sorted(digests.items())))


def check_digest(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's manifest has its sha256. Raises ValueError where it has another."""
    path = Path(path)
    digest = CheckpointFolder(path.parent).digests().get(path.name)
    if digest is not None and path.is_file() and sha256(path) != digest:
        raise ValueError(f"checkpoint {os.fspath(path)!r} is damaged: its sha256 is not the one in {MANIFEST}")
    return digest is not None


def is_run(folder: str, name: str) -> bool:
    """Whether a folder's name is NUMBER-name."""
    number, _, rest = folder.partition("-")
    return re.fullmatch("[0-9]+", number) is not None and rest == name
