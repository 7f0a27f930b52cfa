import os

import pytest

from flowturbo.system.claims import OtherSettings, check_same, differences, read_record, write_record


def test_a_record_comes_back(tmp_path):
    assert read_record(tmp_path / "a.json") is None
    write_record(tmp_path / "new" / "a.json", {"seed": 1, "interval": [0, 1]})
    assert read_record(tmp_path / "new" / "a.json") == {"seed": 1, "interval": [0, 1]}


@pytest.mark.parametrize("text", [b"{", b"[1]", b"3", b"\xff", b"[" * 100_000, b""])
def test_a_damaged_record_is_named_on_one_line(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json'") as caught:
        read_record(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json' is no file"):
        read_record(tmp_path / "a.json")


def test_the_first_difference_is_named_and_what_is_off_may_be_missing():
    before, now = {"seed": 0, "png": False, "steps": 3}, {"seed": 1, "steps": 4, "new": None}
    assert differences(before, now) == ["seed 0, not 1", "steps 3, not 4"]
    assert differences(before, now, ["steps"]) == ["steps 3, not 4"]
    with pytest.raises(OtherSettings, match=r"^folder 'x' was made with seed 0, not 1$"):
        check_same("folder 'x'", before, now)
    check_same("folder 'x'", before, {**before, "new": None})
