import argparse
import hashlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import pipeline
from flowturbo.models import SiT
from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.sample_folder import SampleFolder, read_archive
from flowturbo.system.files import atomic_write, exclusive, sha256
from flowturbo.weights.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    weights_of,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"new")
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_place_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.bin", tmp_path / "folder"):  # below a file; over a folder
        with pytest.raises(OSError, match=f"cannot write '{path}'"), atomic_write(path) as file:
            file.write(b"x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=f"cannot write '{tmp_path / 'a.pt'}': Permission denied"):
        save_checkpoint(tmp_path / "a.pt", {})


def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"step": 1})
    monkeypatch.setattr(
        "flowturbo.system.files.os.fsync", lambda _: exec("raise OSError(28, 'No space left on device')")
    )
    with pytest.raises(OSError, match=r"^cannot write '.*a\.pt': No space left on device$"):
        save_checkpoint(tmp_path / "a.pt", {"step": 2})
    assert load_checkpoint(tmp_path / "a.pt") == {"step": 1}
    assert names(tmp_path) == ["a.pt"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match="is in use by another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# ---- checkpoints


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
        (lambda path: path.mkdir(), "does not exist"),
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


def test_the_newest_checkpoint_is_that_of_the_highest_step_of_the_last_run(tmp_path):
    def make(run, *steps):
        folder = CheckpointFolder(tmp_path / run / "checkpoints")
        for step in steps:
            folder.record(folder.path(step), save_checkpoint(folder.path(step), {"step": step}))

    def newest(name="refiner-a"):
        found = newest_checkpoint(tmp_path, name, warnings.append)
        return found and (found.parent.parent.name, int(found.stem))

    warnings = []
    assert newest_checkpoint(tmp_path / "none", "refiner-a") is None
    assert newest() is None
    make("000-refiner-a", 900, 10_000_000)
    make("001-refiner-a", 9, 10)
    make("002-predictor-a", 1)
    (tmp_path / "003-refiner-a" / "checkpoints").mkdir(parents=True)  # stopped before its first checkpoint
    assert newest() == ("001-refiner-a", 10)
    make("004-refiner-refiner-a", 3)  # another note
    assert newest("predictor-a") == ("002-predictor-a", 1)
    assert warnings == []
    (tmp_path / "001-refiner-a/checkpoints/0000010.pt").write_bytes(b"damaged")
    assert newest() == ("001-refiner-a", 9)
    assert "0000010.pt is missing or damaged" in warnings[0]
    with pytest.raises(ValueError, match=r"0000010\.pt' is damaged"):
        load_checkpoint(tmp_path / "001-refiner-a/checkpoints/0000010.pt")
    (tmp_path / "000-refiner-a/checkpoints/10000000.pt").unlink()
    make("999-refiner-a", 1)
    make("1000-refiner-a", 2)
    assert newest() == ("1000-refiner-a", 2)


# ---- networks from checkpoints


def test_a_network_comes_back_from_its_file(save_network, tmp_path, batch):
    x, y = batch(3)
    for kind, more in ((SiT, ()), (VelocityRefiner, (x,))):
        path = save_network(tmp_path / "a.pt", kind, class_dropout_prob=0.2, learn_sigma=False, input_size=[8, 8])
        network = pipeline.load_network(kind, str(path))
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        again = kind(**network.config).eval()
        again.load_state_dict(torch.load(path)["ema"])
        assert torch.equal(network(x, torch.full((3,), 0.4), *more, y), again(x, torch.full((3,), 0.4), *more, y))


def test_a_checkpoint_of_the_other_network_is_refused(save_network, tmp_path):
    path = str(save_network(tmp_path / "a.pt", SiT))
    with pytest.raises(ValueError, match="holds a SiT, expected a VelocityRefiner"):
        pipeline.load_network(VelocityRefiner, path)


def test_a_public_checkpoint_tells_its_shape_by_its_weights(randomise, tmp_path, batch):
    config = {"input_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 10}
    x, y = batch(2)
    for kind, more in ((SiT, ()), (VelocityRefiner, (x,))):
        network = randomise(kind(**config), 1)
        torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "public.pt")
        loaded = pipeline.load_network(kind, str(tmp_path / "public.pt"))
        assert loaded.config == network.config
        t = torch.rand(2)
        assert torch.equal(loaded(x, t, *more, y), network(x, t, *more, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["config"]["model"].update(depth=3), "does not fit this SiT: no blocks.2"),
        (lambda content: content["config"]["model"].update(num_heads=5), "hidden_size 32 must be a multiple"),
        (lambda content: content["config"]["model"].update(surprise=1), "surprise"),
        (lambda content: content.pop("config"), "the checkpoint holds no config, and width 32"),
        (lambda content: content["ema"]["pos_embed"].fill_(torch.nan), "pos_embed is not finite"),
        (lambda content: content["config"].update(model="SiT-B/2"), "config"),
        (lambda content: content.update(config=[1]), "config"),
        (lambda content: content["config"]["model"].update(patch_size=0), "patch_size"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_named(save_network, tmp_path, change, message):
    path = save_network(tmp_path / "a.pt", SiT)
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.load_network(SiT, str(path))
    assert "a.pt" in str(caught.value)


# ---- folders of samples


@pytest.fixture
def samples(tmp_path):
    """Ten samples of 2x2 pixels in micro-batches of four, all written."""
    folder = SampleFolder(tmp_path / "set", 10, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 2, 2, 3), dtype=np.uint8)
    for k in range(folder.batches):
        folder.write(k, {"images": pixels[4 * k : 4 * k + 4], "labels": np.arange(4 * k, 4 * k + 4)})
    folder.pixels = pixels
    return folder


def test_micro_batches_are_trimmed_to_the_count_and_make_one_archive(samples):
    assert [samples.kept(k) for k in range(3)] == [4, 4, 2]
    assert [list(samples.numbers(k)) for k in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert samples.read(2)["labels"].tolist() == [8, 9]
    samples.write_archive()
    with np.load(samples.archive) as archive:
        assert archive.files == ["arr_0"]
    stored = read_archive(samples.archive)
    assert (stored.dtype, stored.flags.c_contiguous) == (np.uint8, True)
    assert np.array_equal(stored, samples.pixels[:10])


def test_a_micro_batch_with_any_bit_flipped_is_right_or_missing(samples):
    path, expected = samples._path(0), samples.read(0)
    whole = path.read_bytes()
    missing = 0
    for position in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        arrays = samples.read(0)
        missing += arrays is None
        if arrays is not None:
            assert arrays.keys() == expected.keys(), f"bit {position}"
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected), f"bit {position}"
    assert missing > 8 * len(expected["images"].tobytes())


def test_a_micro_batch_cut_short_is_missing(samples):
    whole = samples._path(1).read_bytes()
    for length in range(len(whole)):
        samples._path(1).write_bytes(whole[:length])
        assert samples.read(1) is None
    with pytest.raises(OSError, match=r"000001\.batch is missing or damaged; run the same command again"):
        samples.expect(1)
    with pytest.raises(OSError, match=r"000001\.batch is missing or damaged"):
        samples.write_archive()
    assert not samples.archive.exists()


def test_a_folder_is_claimed_for_one_set_of_settings(tmp_path):
    folder, settings = SampleFolder(tmp_path / "set", 2, 2), {"seed": 0, "interval": (0, 1)}
    assert folder.claim(settings) is False
    assert folder.claim(settings) is False
    with pytest.raises(ValueError, match=r"was made with seed 0, not 1: choose another --tag or remove it"):
        folder.claim({**settings, "seed": 1})
    with pytest.raises(ValueError, match=r"was made with new None, not 1"):
        folder.claim({**settings, "new": 1})
    folder.write(0, {"images": np.zeros((2, 1, 1, 3), np.uint8)})
    folder.write_archive()
    folder.complete(settings, [folder.archive])
    assert folder.claim(settings) is True
    assert not any((tmp_path / "set" / "batches").iterdir())
    folder.archive.write_bytes(b"changed")
    assert folder.claim(settings) is False
    for damage in ("{", "[]", "{}", '{"settings": 3}', "\udcff"):
        (tmp_path / "set" / "settings.json").write_text(damage, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"settings\.json is damaged"):
            folder.claim(settings)


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
