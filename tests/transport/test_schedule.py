from __future__ import annotations

import dataclasses
import random
import re

import pytest

from flowturbo.transport import Schedule


def random_blocks(rng):
    first = rng.choice("HPE")
    return first + "".join(rng.choice("HPRE") * rng.randint(1, 12) for _ in range(rng.randint(0, 8)))


def random_text(rng, depth=0):
    """(text, what it spells out), with groups, zero counts, spaces and either case."""
    text, blocks = "", ""
    for _ in range(rng.randint(1, 4)):
        if depth < 3 and rng.random() < 0.3:
            inner, spelled = random_text(rng, depth + 1)
            times = rng.choice([None, 0, 1, 2, 3])
            text += f"[{inner}]" + ("" if times is None else f"x{times}")
            blocks += spelled * (1 if times is None else times)
        else:
            letter, count = rng.choice("HPRE"), rng.randint(0, 5)
            text += rng.choice([letter, letter.lower()]) + str(count) + rng.choice(["", " "])
            blocks += letter * count
    return text, blocks


def test_random_schedules_round_trip_through_their_text():
    rng = random.Random(0)
    for _ in range(500):
        schedule = Schedule(random_blocks(rng))
        assert Schedule.parse(str(schedule)) == schedule
        assert re.fullmatch(r"([HPRE][1-9]\d*)+", str(schedule))  # safe in a file name


def test_random_texts_with_groups_parse_to_what_they_spell_out():
    rng, read, refused = random.Random(1), 0, 0
    for _ in range(2000):
        text, blocks = random_text(rng)
        if not blocks or blocks[0] == "R":
            refused += 1
            with pytest.raises(ValueError, match="expected blocks"):
                Schedule.parse(text)
        else:
            read += 1
            assert Schedule.parse(text).blocks == blocks, text
    assert read > 500
    assert refused > 200


@pytest.mark.parametrize(
    ("text", "blocks", "short"),
    [
        ("H1P5R3", "HPPPPPRRR", "H1P5R3"),
        ("P5R7H3", "PPPPPRRRRRRRHHH", "P5R7H3"),
        ("[H1P1R1]x2", "HPRHPR", "H1P1R1H1P1R1"),
        ("[H1[P2R1]x2]x2E1", "HPPRPPRHPPRPPRE", "H1P2R1P2R1H1P2R1P2R1E1"),
        ("H0P4R0", "PPPP", "P4"),
        ("H1H2", "HHH", "H3"),
        ("[R1]x0H1", "H", "H1"),
        ("[H1]", "H", "H1"),
        ("h1 p1\n[ r1 e1 ] X2", "HPRERE", "H1P1R1E1R1E1"),
        ("E12", "E" * 12, "E12"),
    ],
)
def test_texts_parse_to_their_blocks(text, blocks, short):
    schedule = Schedule.parse(text)
    assert (schedule.blocks, str(schedule), len(schedule)) == (blocks, short, len(blocks))


@pytest.mark.parametrize(
    "text",
    ["", "   ", "H0", "H0P0R0", "[]", "[H1]x0", "R1", "R3H1", "H0R1", "[R1]x2", "X2", "H", "1H", "H-1", "H1.5",
     "H1x2", "H1,P5", "Q3", "H1P5R3!", "[H1", "H1]", "H1]x2", "[[H1]x2", "[H1]2", "[H1]x", "H1 to P2", "dopri5",
     "../H1", "H1[P1", "H1[[P1]x2", None, 3, ["H1"]],
)  # fmt: skip
def test_impossible_schedules_are_refused_with_the_grammar(text):
    with pytest.raises(ValueError, match=re.escape('Examples: "H1P5R3", "P5R7H3", "[H1P1R1]x2"')):
        Schedule.parse(text)


@pytest.mark.parametrize("blocks", ["", "RH", "HX", "hp", "H1"])
def test_impossible_blocks_are_refused_with_the_grammar(blocks):
    with pytest.raises(ValueError, match="expected blocks"):
        Schedule(blocks)


@pytest.mark.parametrize("text", ["H10001", "H99999999999999999999", "[[[[H10]x10]x10]x10]x10", "H9999P2"])
def test_endless_schedules_are_refused(text):
    with pytest.raises(ValueError, match="10000 steps"):
        Schedule.parse(text)


@pytest.mark.parametrize(("text", "blocks"), [("H01", "H"), ("H0000000001P5", "HPPPPP"), ("[H1]x0000000002", "HH")])
def test_leading_zeros_do_not_change_a_count(text, blocks):
    assert Schedule.parse(text).blocks == blocks


def test_a_schedule_parses_to_itself():
    schedule = Schedule.parse("H1P5R3")
    assert Schedule.parse(schedule) is schedule


def test_schedules_are_frozen_and_hashable():
    schedule = Schedule.parse("H1P2")
    assert {schedule, Schedule.parse("[H1]P1P1"), Schedule("HPP")} == {schedule}
    assert schedule != Schedule.parse("H2P1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.blocks = "H"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9, 100])
def test_times_are_uniform_from_noise_to_data(n):
    schedule = Schedule("H" * n)
    assert schedule.times() == [k / n for k in range(n + 1)]
    backwards = schedule.times(1.0, 0.2)
    assert (backwards[0], backwards[-1]) == (1.0, pytest.approx(0.2))
    assert backwards == pytest.approx([1 - 0.8 * k / n for k in range(n + 1)])


@pytest.mark.parametrize(
    ("text", "predictor", "refiner"),
    [
        ("H1P5R3", 7, 3),
        ("H8", 16, 0),
        ("H2P4R2", 8, 2),
        ("H5P7R3", 17, 3),
        ("P5R7H3", 12, 7),
        ("P7", 8, 0),
        ("P1", 2, 0),
        ("E10", 10, 0),
        ("E1P3", 4, 0),
        ("[H1P1R1]x2", 6, 2),
        ("[P1R1]x3", 4, 3),
    ],
)
def test_evaluations_are_counted_for_each_form_of_the_refiner(text, predictor, refiner):
    schedule = Schedule.parse(text)
    assert schedule.evaluations() == schedule.evaluations("released") == (predictor, 2 * refiner)
    assert schedule.evaluations("consistent") == (predictor, 2 * refiner)
    assert schedule.evaluations("single") == (predictor, refiner)


def test_an_unknown_form_of_the_refiner_is_refused():
    with pytest.raises(ValueError, match=r"'double' .*released, consistent, single"):
        Schedule.parse("H1").evaluations("double")
