"""Folders that belong to the settings they were made with: records, and what differs from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowturbo.system.files import atomic_write, check_file
from flowturbo.system.values import plain, shown


class OtherSettings(ValueError):
    """Something was made with other settings than those at hand."""


def write_record(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file. Raises ValueError naming one that is damaged."""
    try:
        check_file(path)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {os.fspath(path)!r}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)!r} is damaged: it holds no JSON object")
    return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """What two settings differ in, as texts; of `names`, by default all. A setting that is missing counts as off."""
    names = sorted(before.keys() | now.keys()) if names is None else names
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [f"{plain(name, 80)} {shown(a)}, not {shown(b)}" for name, a, b in pairs if a != b and (a or b)]


def check_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises OtherSettings naming the first difference."""
    if found := differences(before, now):
        raise OtherSettings(f"{what} was made with {found[0]}")
