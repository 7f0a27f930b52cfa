"""TensorBoard and Weights & Biases: they get the figures of a run, and cannot end one."""

import json
import sys

import pytest
from runs import metrics, run

from flowturbo.training import boards
from flowturbo.training.log import Measured, RunLog

FAKE = """
import json, os
class Run:
    def __init__(self, dir): self.file = open(os.path.join(dir, "told.jsonl"), "a", buffering=1)
    def log(self, figures, step): self.file.write(json.dumps([step, figures]) + chr(10))
    def finish(self): self.file.close()
def init(**given):
    if os.environ.get("FAKE_WANDB_FAILS"):
        raise RuntimeError("no key")
    with open(os.path.join(given["dir"], "given.jsonl"), "a") as file:
        file.write(json.dumps(given) + chr(10))
    return Run(given["dir"])
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package that has wandb's calls, and writes what it is given into the run's folder."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield
    sys.modules.pop("wandb", None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboards_event_files_have_every_figure_of_metrics_jsonl(flags, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    common = [*flags("refiner"), "--log-every", 1, "--ckpt-every", 2, "--holdout", "0.6", "--end-points", 4]
    folder = run(tmp_path, *common, "--schedule", "H1P1R1", "--steps", 2)
    run(tmp_path, *common, "--schedule", "H1P1R1", "--steps", 4, "--resume", "auto")
    found = reader.EventAccumulator(str(folder)).Reload()
    expected = {}
    for record in metrics(folder):
        for name, value in record.items():
            if name not in ("step", "lr", "seconds"):
                expected.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-5)))
    assert set(found.Tags()["scalars"]) == set(expected) >= {"loss", "gradient", "holdout", "rmse_free_error"}
    for name, values in expected.items():
        assert [(event.step, event.value) for event in found.Scalars(name)] == values, name


def test_weights_and_biases_gets_the_figures_and_one_run_goes_on(flags, tmp_path, wandb):
    common = [*flags("predictor"), "--wandb", "--log-every", 1, "--ckpt-every", 2, "--holdout", "0.6"]
    folder = run(tmp_path / "results", *common, "--steps", 2)
    run(tmp_path / "results", *common, "--steps", 3, "--resume", "auto")
    first, second = lines(folder / "given.jsonl")
    assert first["id"] == second["id"] == (folder / "wandb-id.txt").read_text()
    assert (first["project"], first["name"], first["resume"]) == ("flowturbo", folder.name, "allow")
    assert first["config"]["training"]["data_path"] == "images"  # no path of this machine
    told = lines(folder / "told.jsonl")
    assert [step for step, _ in told] == [record["step"] for record in metrics(folder)] == [1, 2, 2, 3, 3]
    assert told[0][1]["loss"] == metrics(folder)[0]["loss"]
    assert "holdout" in told[2][1]


def test_a_board_that_is_not_installed_or_fails_is_a_word(flags, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("FAKE_WANDB_FAILS", "1")
    folder = run(tmp_path / "a", *flags("predictor"), "--wandb", "--steps", 2, "--log-every", 1)
    text = (folder / "log.txt").read_text()
    assert text.count("note: wandb failed and gets no more figures: RuntimeError: no key") == 1
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    folder = run(tmp_path / "b", *flags("predictor"), "--wandb", "--steps", 2, "--log-every", 1)
    text = (folder / "log.txt").read_text()
    assert [line.split(" ", 2)[2] for line in text.splitlines() if "not installed" in line] == [
        "note: tensorboard is not installed, and gets no figures",
        "note: wandb is not installed, and gets no figures",
    ]
    assert not list(folder.glob("events.*"))


def test_a_disk_that_is_full_for_a_board_ends_nothing(tmp_path, monkeypatch):
    def full(self, figures, step):
        raise OSError("No space left on device")

    monkeypatch.setattr(boards.TensorBoard, "add", full)
    with RunLog(tmp_path, total=3) as log:
        for step in (1, 2):
            log.advance(step, images=5)
            log.scalars(1e-3, loss=0.5)
            log.tell(lambda: Measured("held-out loss 0.4", {"holdout": 0.4}))
    assert (tmp_path / "log.txt").read_text().count("tensorboard failed and gets no more figures: OSError") == 1
    assert len(metrics(tmp_path)) == 4
