import json
import math
from types import SimpleNamespace

import pytest
import runs

from flowturbo.training.log import RunLog


def test_figures_go_to_both_files_and_a_run_that_goes_on_appends(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 104.5, 7.0, 8.0])
    monkeypatch.setattr("flowturbo.training.log.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for first, steps in ((0, (2, 4)), (4, (5,))):
        with RunLog(tmp_path, total=9, first=first) as log:
            log.say("words")
            for step in steps:
                log.advance(step, images=5)
                log.scalars(1e-3 / step, loss=0.5, gradient=2.0)
    assert runs.metrics(tmp_path) == [
        {"step": 2, "loss": 0.5, "gradient": 2.0, "images/s": 2.5, "lr": 0.0005, "seconds": 2.0},
        {"step": 4, "loss": 0.5, "gradient": 2.0, "images/s": 2.0, "lr": 0.00025, "seconds": 4.5},
        {"step": 5, "loss": 0.5, "gradient": 2.0, "images/s": 5.0, "lr": 0.0002, "seconds": 1.0},
    ]
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        *("words", "step=2 loss=0.5 gradient=2 images/s=2.5", "step=4 loss=0.5 gradient=2 images/s=2"),
        *("words", "step=5 loss=0.5 gradient=2 images/s=5"),
    ]


def test_a_norm_that_overflowed_leaves_json(tmp_path):
    with RunLog(tmp_path, total=1) as log:
        log.advance(1, images=5)
        log.scalars(1e-3, loss=0.5, gradient=math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["gradient"] is None


def test_the_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(None, total=1) as log:
        log.say("words")
        log.advance(1, images=5)
        log.scalars(1e-3, loss=0.5)
    assert capsys.readouterr() == ("", "")
