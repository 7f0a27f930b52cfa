"""Values that files hold: checked for their type before they are used, cut and escaped before they are printed.

A file may hold anything: a tuple that prints as a billion letters, or a name that moves the cursor of a terminal.
"""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")
CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control and format characters, half characters, line separators

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80
_SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 4, 4, 4


def shown(value: object) -> str:
    """A value as a short text on one line, however long or deeply nested it is."""
    try:
        return plain(_SHORT.repr(value))
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a {type(value).__name__} that is too long to show"


def plain(text: str, most: int = 2000) -> str:
    """A text without control characters (they are escaped, as \\x1b), cut in the middle beyond `most` characters."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[len(text) - most // 2 :]}"
    return "".join(_escaped(c) if unicodedata.category(c) in CONTROL else c for c in text)


def rounded(value: float) -> str:
    """A number of at most three figures, without an exponent where it has fewer than seven digits: 0.0123, 1230."""
    return f"{float(f'{value:.3g}'):g}"


def plus(*counts: int) -> str:
    """Evaluations of the predictor and of the refiner, such as "7 + 6"; without those that are none: "8"."""
    return " + ".join(str(count) for count in counts if count) or "0"


def typed(value: Any, kind: type[Value] | tuple[type[Value], ...], what: str) -> Value:
    """The value, where it is of that type; a bool passes for no number. Raises ValueError naming `what` it is."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{what} is {shown(value)}, expected {' or '.join(_NAMES.get(k, k.__name__) for k in kinds)}")
    return value


def check_json(value: object, what: str, depth: int = 20, most: int = 1_000_000) -> None:
    """Raises ValueError, naming `what` it is, unless a value is of JSON types (tuples pass), and no more than `most`.

    What is shared counts wherever it appears, as it does in JSON: some bytes of a file may hold 2^60 values.
    """
    rest: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while rest:
        each, level = rest.pop()
        count += 1
        if level > depth or count > most:
            raise ValueError(f"{what} holds more than {most:,} values, or more than {depth} in each other")
        if isinstance(each, Mapping):
            for name in each:
                typed(name, str, f"a name in {what}")
            rest += [(part, level + 1) for part in each.values()]
        elif isinstance(each, (list, tuple)):
            rest += [(part, level + 1) for part in each]
        else:
            typed(each, (str, int, float, bool, type(None)), f"a value in {what}")


_NAMES: dict[type, str] = {int: "a whole number", float: "a number", str: "text", list: "a list", type(None): "nothing"}


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
