"""The quick version of the campaign in torture.py, and what it led to; `make torture` runs the long one."""

import json
import threading
import zipfile
from contextlib import ExitStack
from functools import lru_cache

import pytest
import torch

from flowturbo.models import SiT
from flowturbo.system import cli
from flowturbo.system.files import exclusive, remove_leftovers
from flowturbo.training.options import Optimisation
from flowturbo.training.step import State
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint, load_weights, save_checkpoint

SAMPLE = {  # campaign -> how many trials there are at least
    **{"saves": 12, "flips": 60, "malformed": 90, "sockets": 3, "exports": 4},
}
REST = {
    **{"kills": 12, "signals": 9, "terminals": 8, "loaders": 6, "walkers": 4, "exact": 14, "ranks": 3},
    **{"disks": 0, "samples": 6, "caching": 4},
}
LEAST = SAMPLE | REST


@pytest.fixture(scope="module")
def report(python, tmp_path_factory):
    """report(campaigns) -> what came of them; each set is run once."""

    @lru_cache
    def run(campaigns):
        path = tmp_path_factory.mktemp("torture") / "report.json"
        done = python("tests/reliability/torture.py", "--quick", "--json", path, "--only", *campaigns, timeout=900)
        assert path.exists(), done.stderr
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("campaign", [*SAMPLE, *(pytest.param(campaign, marks=pytest.mark.slow) for campaign in REST)])
def test_nothing_is_lost(report, campaign):
    report = report(tuple(SAMPLE if campaign in SAMPLE else REST))
    assert report["laboratory"]["failures"] == []
    assert report[campaign]["failures"] == []
    assert sum(count for _, count, _ in report[campaign]["figures"]) >= LEAST[campaign]


# ---- checkpoints


def state():
    torch.manual_seed(0)
    network = SiT(input_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    made = State.new(network, torch.device("cpu"), Optimisation(lr=1e-3))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    made.step = 1
    return made


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["opt"].update(state=None),
        lambda content: content["opt"]["state"].pop(3),
        lambda content: content["opt"]["state"][3].update(exp_avg=torch.ones(2)),
        lambda content: content["opt"]["state"][3]["exp_avg_sq"].fill_(torch.nan),
        lambda content: content["opt"]["state"][3].update(step="1"),
        lambda content: content.update(opt=[]),
        lambda content: content.update(step=torch.ones(3)),
        lambda content: content.update(step=-1),
        lambda content: content.update(config="text"),
        lambda content: content.update(scaler={"scale": [1]}),
        lambda content: content.update(model=3),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_named(tmp_path, change):
    path = tmp_path / "a.pt"
    state().save(path, {})
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pt' (is damaged|holds no weights)"):
        state().load(path)


def test_a_resumed_optimizer_keeps_this_runs_settings(tmp_path):
    state().save(tmp_path / "a.pt", {})
    now = state()
    now.optimizer.param_groups[0]["weight_decay"] = 0.5
    now.load(tmp_path / "a.pt")
    assert now.optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "odd",
    [
        lambda w: w.to_sparse(),
        lambda w: w.to(torch.complex64),
        lambda w: w.bool(),
        lambda w: w.to("meta"),
        lambda w: torch.zeros(1).expand(w.shape),
    ],
)
def test_weights_are_plain_tensors_of_real_numbers(odd):
    layer = torch.nn.Linear(3, 2)
    weights = {**layer.state_dict(), "weight": odd(torch.ones(2, 3))}
    with pytest.raises(ValueError, match="weight is no plain tensor of real numbers"):
        load_weights(layer, weights, "a.pt")


def test_a_checkpoint_that_was_compressed_again_is_refused(tmp_path):
    """Its members would be mapped as they lie, compressed, and taken for weights."""
    torch.save({"model": {"w": torch.zeros(1000)}}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*b\.pt"):
        load_checkpoint(tmp_path / "b.pt")


def test_a_bit_flipped_in_a_weight_is_found_without_a_manifest(tmp_path):
    torch.save({"model": {"w": torch.full((1000,), 0.7)}}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(torch.full((9,), 0.7).numpy().tobytes()) + 5] ^= 4
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*a\.pt"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "text",
    [
        '{"../../0000001.pt": "' + "0" * 64 + '"}',
        '{"0000001.pt": "short"}',
        '{"0000001.pt": null}',
        '{"last.pt": "' + "0" * 64 + '"}',
        "[" * 100_000,
        "[]",
    ],
    ids=lambda text: text[:20],
)
def test_a_manifest_with_other_names_or_digests_is_refused(tmp_path, text):
    """Pruning would remove whatever it names."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        CheckpointFolder(tmp_path).newest(print)


def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=1)
    for name in (".0000001.pt.77.tmp", "keep.pt"):
        (tmp_path / name).write_bytes(b"x")
    for step in (1, 2):
        folder.record(folder.path(step), save_checkpoint(folder.path(step), {"step": step}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000002.pt", "keep.pt", "manifest.json"]


def test_only_leftovers_are_removed(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/.x.npz.1.tmp", "a/x.tmp", ".lock", "x.npz"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "a", "x.npz", "x.tmp"]


def test_a_lock_is_waited_for_with_patience(tmp_path):
    held = ExitStack()
    held.enter_context(exclusive(tmp_path))
    threading.Timer(0.3, held.close).start()
    with exclusive(tmp_path, patience=20):
        pass


# ---- flags


def test_two_dashes_are_no_value():
    with pytest.raises(ValueError, match="--steps takes no value '--'"):
        cli.hyphenate(["--steps=--"])
