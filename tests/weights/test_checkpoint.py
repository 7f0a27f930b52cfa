import argparse
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from flowturbo.weights.cache import MissingWeights, cache_folder
from flowturbo.weights.checkpoint import (
    CheckpointFolder,
    find_model,
    load_checkpoint,
    load_weights,
    resolve,
    save_checkpoint,
    weights_of,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    monkeypatch.setattr(
        "flowturbo.system.files.os.fsync", lambda _: exec("raise OSError(28, 'No space left on device')")
    )
    with pytest.raises(OSError, match=r"^cannot write '.*a\.pt': No space left on device$"):
        save_checkpoint(tmp_path / "a.pt", {"step": 2})
    assert load_checkpoint(tmp_path / "a.pt") == {"step": 1}
    assert names(tmp_path) == ["a.pt"]


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    content = {
        "model": {"w": torch.randn(3, 2), "n": torch.arange(3), "h": torch.randn(2).half()},
        "opt": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
        "step": 7,
        "config": {"a": [1, 2.5, None, True, "x"]},
    }
    save_checkpoint(tmp_path / "runs" / "a.pt", content)
    loaded = load_checkpoint(tmp_path / "runs" / "a.pt")
    for name, value in content["model"].items():
        assert torch.equal(loaded["model"][name], value)
        assert loaded["model"][name].dtype == value.dtype
    assert {k: loaded[k] for k in ("opt", "step", "config")} == {k: content[k] for k in ("opt", "step", "config")}
    assert names(tmp_path / "runs") == ["a.pt"]


def test_safetensors_are_read_too(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")["w"], torch.ones(2))
    (tmp_path / "b.safetensors").write_bytes(b"\x10" * 30)
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*b\.safetensors"):
        load_checkpoint(tmp_path / "b.safetensors")


def test_the_namespace_of_the_original_scripts_is_let_in(tmp_path):
    torch.save({"ema": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt")["args"].lr == 1.0


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_a_checkpoint_runs_no_code(tmp_path, write):
    victim, path = tmp_path / "victim", tmp_path / "a.pt"
    content = {"model": Evil(victim)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*a\.pt") as caught:
        load_checkpoint(path)
    assert not victim.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_damaged_checkpoint_is_named_wherever_it_ends_or_breaks(tmp_path, new_format):
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.randn(3, 2)}, "step": 1}, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    stumps = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 150))]
    random = np.random.default_rng(0)
    for position in random.choice(len(whole), 150):
        broken = bytearray(whole)
        broken[position] ^= 1 << random.integers(8)
        stumps.append(bytes(broken))
    refused = []
    for stump in stumps:
        path.write_bytes(stump)
        try:
            load_checkpoint(path)  # a bit of a weight or of padding may flip unseen
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert all(str(path) in message and "\n" not in message for message in refused)


def zip_of_garbage(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"garbage")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: path.write_bytes(b""), "cannot read checkpoint"),
        (lambda path: path.write_bytes(b"\x80\x02garbage"), "cannot read checkpoint"),
        (lambda path: path.write_text("<!DOCTYPE html><html>not found</html>"), "cannot read checkpoint"),
        (zip_of_garbage, "cannot read checkpoint"),
        (lambda path: torch.save([1, 2], path), "holds a list, expected weights by name"),
        (lambda path: torch.save(torch.ones(2), path), "holds a Tensor, expected"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, write, message):
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert "a.pt" in str(caught.value)


def test_weights_are_the_ema_before_the_model_before_the_file_itself():
    a, b, c = ({"w": torch.full((1,), float(i))} for i in range(3))
    both = {"ema": a, "model": b, "opt": {"w": torch.ones(1)}, "step": 3}
    assert weights_of(both, "x") == a
    assert weights_of(both, "x", prefer_ema=False) == b
    assert weights_of({"model": b}, "x") == b
    assert weights_of({"ema": a}, "x", prefer_ema=False) == a
    assert weights_of({**c, "config": {}}, "x") == c


@pytest.mark.parametrize(
    ("content", "ema", "model"),
    [
        (["ema_state_dict", "model_state_dict"], 0, 1),
        (["state_dict", "ema_state_dict"], 1, 0),
        (["model_state_dict"], 0, 0),
        (["state_dict"], 0, 0),
        (["state_dict", "ema"], 1, 0),
    ],
)
def test_other_projects_call_them_otherwise(content, ema, model):
    states = [{"w": torch.full((1,), float(k))} for k in range(len(content))]
    content = {**dict(zip(content, states)), "optimizer_state_dict": {"w": torch.ones(1)}}
    assert weights_of(content, "x") == states[ema]
    assert weights_of(content, "x", prefer_ema=False) == states[model]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = {prefix + "model.module.w": torch.ones(1)}
    assert list(weights_of({"model": state}, "x")) == ["model.module.w"]


@pytest.mark.parametrize("content", [{}, {"ema": {}}, {"model": {"a": 1}}, {"step": 3}])
def test_no_weights_are_no_checkpoint(content):
    with pytest.raises(ValueError, match=r"checkpoint 'a\.pt' holds no weights"):
        weights_of(content, "a.pt")


def test_weights_of_another_network_are_listed():
    module = nn.Linear(3, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    cases = {
        r"'a\.pt' does not fit this Linear: no bias; unknown extra": {
            "weight": torch.ones(2, 3),
            "extra": torch.ones(1),
        },
        r"weight is \(2, 2\), expected \(2, 3\)": {"weight": torch.ones(2, 2), "bias": torch.ones(2)},
        "bias is not finite": {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, torch.nan])},
        "weight is not finite": {"weight": torch.full((2, 3), torch.inf), "bias": torch.ones(2)},
        "and 6 more": {f"k{i}": torch.ones(1) for i in range(8)},
    }
    for message, weights in cases.items():
        with pytest.raises(ValueError, match=message):
            load_weights(module, weights, "a.pt")
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_keeping_the_last_never_drops_what_was_just_written(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=1)

    def save(step):
        folder.record(folder.path(step), save_checkpoint(folder.path(step), {"step": step}))

    save(1000)
    save(2000)
    assert not folder.path(1000).exists()
    folder.path(2000).write_bytes(b"damaged")
    save(1100)  # resumed from an earlier one
    save(1200)
    assert folder.newest(lambda text: None) == folder.path(1200)
    assert not folder.path(1100).exists()


def test_what_is_read_stays_whole_when_it_is_dropped_and_the_first_step_is_no_fifth(tmp_path):
    """A checkpoint is mapped, not copied: a run may drop it while another process reads it."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=1, keep_every=50)

    def save(step):
        folder.record(folder.path(step), save_checkpoint(folder.path(step), {"w": torch.full((100_000,), float(step))}))

    save(0)
    (folder.folder / "best.pt").write_bytes(b"of a user")
    read = load_checkpoint(folder.path(0))
    for step in (10, 50, 60, 70):
        save(step)
    assert sorted(path.name for path in folder.folder.glob("*.pt")) == ["0000050.pt", "0000070.pt", "best.pt"]
    assert torch.equal(read["w"], torch.zeros(100_000))


# ---- what a name stands for


def test_a_run_stands_for_its_newest_whole_checkpoint(run, monkeypatch):
    told = []
    assert resolve(run, say=told.append) == run / "checkpoints" / "0000040.pt"
    assert resolve(run / "checkpoints", say=told.append) == run / "checkpoints" / "0000040.pt"
    assert resolve(run / "checkpoints" / "0000005.pt") == run / "checkpoints" / "0000005.pt"
    (run / "checkpoints" / "0000040.pt").write_bytes(b"damaged")
    assert resolve(str(run), say=told.append) == run / "checkpoints" / "0000005.pt"
    assert len(told) == 1
    assert "0000040.pt is missing or damaged: passed over" in told[0]
    monkeypatch.chdir(run.parent)
    assert resolve(run.name, say=told.append).name == "0000005.pt"


def test_what_stands_for_no_checkpoint_is_named(run, tmp_path):
    with pytest.raises(MissingWeights, match=r"^checkpoint 'nothing\.pt' does not exist$"):
        resolve("nothing.pt")
    with pytest.raises(MissingWeights, match=r"^checkpoint 'a/b\.pt' \(resume\) does not exist$") as caught:
        resolve("a/b.pt", field="resume")
    assert caught.value.paths == {"resume": "a/b.pt"}
    with pytest.raises(MissingWeights) as caught:
        resolve("SiT-XL-2-Refiner.pt")
    assert caught.value.assets == ["sit-xl-2-refiner"]
    for folder in (tmp_path / "results", tmp_path):
        with pytest.raises(ValueError, match=rf"^folder '{re.escape(str(folder))}' holds no checkpoint: expected "):
            resolve(folder)


def test_find_model(run, refiner):
    """As the original's: weights by the name of a public file, or of a local one."""
    expected = refiner.state_dict()
    for name in (run / "checkpoints" / "0000040.pt", run):
        weights = find_model(name)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
    save_checkpoint(cache_folder() / "SiT-XL-2-Refiner.pt", {"model": {}, "ema": expected})
    assert find_model("SiT-XL-2-Refiner.pt").keys() == find_model("sit-xl-2-refiner").keys() == expected.keys()
    with pytest.raises(ValueError, match=r"nothing is called 'nothing\.pt'"):
        find_model("nothing.pt")
