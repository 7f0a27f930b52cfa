import time

import pytest
import torch

from flowturbo.system.values import check_json, plain, rounded, shown, typed


def nested(kind, depth=60):
    """A value of a few bytes in a file that prints as 2^depth numbers."""
    value = kind([0])
    for _ in range(depth):
        value = kind([value, value])
    return value


@pytest.mark.parametrize("kind", [tuple, list, lambda parts: {k: part for k, part in enumerate(parts)}])
def test_what_prints_for_ever_is_cut(kind):
    began = time.monotonic()
    assert len(shown(nested(kind))) < 400
    with pytest.raises(ValueError, match=r"^depth is .*expected a whole number$") as caught:
        typed(nested(kind), int, "depth")
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 1


def test_what_is_shown_stays_short():
    for value in ("x" * 10_000, list(range(10_000)), b"y" * 10_000, 10**100_000, torch.ones(9999)):
        assert len(shown(value)) < 400
    assert shown(0.5) == "0.5"


def test_what_is_very_deep_is_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown({"a": deep})) < 100


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J\x07cat", r"\x1b[2J\x07cat"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m", r"\x9b31m"),  # one byte that some terminals take for ESC [
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("\udcff", r"\udcff"),  # a file's name that is no UTF-8
        ("Käse 猫 × N", "Käse 猫 × N"),
    ],
)
def test_control_characters_are_escaped(text, safe):
    assert plain(text) == safe
    assert plain(safe) == safe
    assert "\x1b" not in shown([text])


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert plain("a" * 50 + "b" * 50, 10) == "aaaaa...bbbbb"


def test_a_value_of_its_type_comes_back_and_a_bool_is_no_number():
    assert typed(3, int, "depth") == 3
    assert typed(3, (int, float), "rate") == 3
    assert typed(True, bool, "flip") is True
    with pytest.raises(ValueError, match=r"^depth is True, expected a whole number$"):
        typed(True, int, "depth")
    with pytest.raises(ValueError, match=r"^rate is 'x', expected a whole number or a number$"):
        typed("x", (int, float), "rate")


def test_json_types_pass_and_what_would_be_endless_as_json_does_not():
    check_json({"a": [1, 0.5, "x", None, True], "b": {"c": (1, 2)}}, "it")
    deep = []
    for _ in range(100_000):
        deep = [deep]
    began = time.monotonic()
    for odd in (nested(list), deep, {1: 2}, {"a": [torch.ones(1)]}, {"a": 1j}, {"a": b"x"}):
        with pytest.raises(ValueError, match=r"its config"):
            check_json(odd, "its config")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1230"), (98765, "98800"), (12.34, "12.3"), (0.012345, "0.0123")])
def test_a_number_of_three_figures(value, text):
    assert rounded(value) == text
