"""Options as frozen dataclasses: each field is declared once, and is a flag, a keyword and a setting.

    @dataclass(frozen=True)
    class NetworkOptions:
        device: str = option("auto", "auto, cuda, cuda:K or cpu")

`add_flags` gives a parser a flag for every field, `read_flags` makes the dataclass from what was parsed. A dataclass
checks its values in __post_init__ and raises ValueError in terms of the fields; a Group does so by what its fields
declare.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

Options = TypeVar("Options")


def option(
    default: Any = MISSING, help: str = "", *, flags: tuple[str, ...] = (), positional: bool = False, **settings: Any
) -> Any:
    """A dataclass field that is a flag too, or a positional argument. Without a default it is required.

    `flags` are other spellings, of which the first may be a short one. `settings` are argparse's (choices, metavar,
    type, nargs), and whatever else a dataclass wants to know of its fields.
    """
    return field(default=default, metadata={"help": help, "flags": flags, "positional": positional, **settings})


def seed(text: str) -> int:
    """An argument type: an integer in [0, 2^64), the keys of the random generator."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text} must lie in 0 to 2^64 - 1")
    return value


class Range(NamedTuple):
    """The values that a number may have."""

    contains: Callable[[float], bool]  # False for nan
    text: str


AT_LEAST_0 = Range(lambda value: value >= 0, "be at least 0")
AT_LEAST_1 = Range(lambda value: value >= 1, "be at least 1")
POSITIVE = Range(lambda value: value > 0, "be positive")
PART = Range(lambda value: 0 <= value < 1, "lie in [0, 1)")


@dataclass(frozen=True)
class Group:
    """Checks its values by what their fields declare. Raises ValueError for impossible ones."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, choices, within = (getattr(self, each.name), *map(each.metadata.get, ("choices", "within")))
            if value is not None and choices and value not in choices:
                raise ValueError(f"{each.name} {value!r} must be one of {', '.join(map(str, choices))}")
            if value is not None and within and not within.contains(value):
                raise ValueError(f"{each.name} {value} must {within.text}")


def flag_of(name: str) -> str:
    """The flag of a field: --cfg-scale of cfg_scale."""
    return "--" + name.replace("_", "-")


def add_flags(parser: Any, kind: type, **defaults: Any) -> None:
    """A flag for every field of an options dataclass that `option` has made; `defaults` replace those of fields."""
    hints = typing.get_type_hints(kind)
    for each in _declared(kind):
        settings = _settings(each, hints[each.name], defaults.get(each.name, each.default))
        if each.metadata["positional"]:
            settings.pop("required", None)
            parser.add_argument(settings.pop("dest"), **settings)
        else:
            parser.add_argument(flag_of(each.name), *each.metadata["flags"], **settings)


def read_flags(kind: type[Options], arguments: argparse.Namespace, **values: Any) -> Options:
    """The dataclass of what was parsed; `values` are those of fields that have no flag.

    Raises what the dataclass raises.
    """
    return kind(**{each.name: getattr(arguments, each.name) for each in _declared(kind)}, **values)


def words_of(options: Any, **defaults: Any) -> list[str]:
    """The words of a command line that gives these options; fields at their defaults, or at `defaults`, are left out.

    No word says None, so a field that is None is left out too.
    """
    words: list[str] = []
    for each in _declared(type(options)):
        value = getattr(options, each.name)
        if value is None or value == defaults.get(each.name, each.default):
            continue
        if isinstance(value, bool):
            words.append(flag_of(each.name if value else f"no_{each.name}"))
        else:
            flag = [] if each.metadata["positional"] else [flag_of(each.name)]
            words += [*flag, *map(spelled, value if isinstance(value, tuple) else (value,))]
    return words


def spelled(value: Any) -> str:
    """Such as 4 of 4.0: as short as it reads back."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _declared(kind: type) -> list[Field]:
    return [each for each in fields(kind) if "flags" in each.metadata]  # type: ignore[arg-type]


def _settings(each: Field, hint: Any, default: Any) -> dict[str, Any]:
    """add_argument's keywords for a field: what it was declared with, and what follows from its type."""
    own = {name: each.metadata[name] for name in ("choices", "metavar", "type", "nargs") if name in each.metadata}
    settings: dict[str, Any] = {"dest": each.name, "help": each.metadata["help"].replace("%", "%%"), **own}
    if default is MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        settings.setdefault("nargs", "+" if parts[-1] is Ellipsis else len(parts))
        settings.setdefault("action", _AsTuple)
        hint = parts[0]
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif hint in (int, float):
        settings.setdefault("type", hint)
    return settings


class _AsTuple(argparse.Action):
    """Keeps several values as a tuple: options are hashable and cannot change."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))
