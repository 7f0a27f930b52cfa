from pathlib import Path

import pytest
import torch

from flowturbo.models import SiT
from flowturbo.networks.load import load_network, load_with_info
from flowturbo.refiner import VelocityRefiner
from flowturbo.weights.cache import MissingWeights
from flowturbo.weights.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint, sha256, weights_of

EARLIER = Path(__file__).parents[1] / "compatibility" / "v0.1.0"


def test_a_network_comes_back_from_its_file(save_network, tmp_path, batch):
    x, y = batch(3)
    for kind, more in ((SiT, ()), (VelocityRefiner, (x,))):
        path = save_network(tmp_path / "a.pt", kind, class_dropout_prob=0.2, learn_sigma=False, input_size=[8, 8])
        network = load_network(kind, str(path))
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        again = kind(**network.config).eval()
        again.load_state_dict(torch.load(path)["ema"])
        assert torch.equal(network(x, torch.full((3,), 0.4), *more, y), again(x, torch.full((3,), 0.4), *more, y))


def test_a_checkpoint_of_the_other_network_is_refused(save_network, tmp_path):
    path = str(save_network(tmp_path / "a.pt", SiT))
    with pytest.raises(ValueError, match="holds a SiT, expected a VelocityRefiner"):
        load_network(VelocityRefiner, path)


def test_a_public_checkpoint_tells_its_shape_by_its_weights(randomise, tmp_path, batch):
    config = {"input_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 10}
    x, y = batch(2)
    for kind, more in ((SiT, ()), (VelocityRefiner, (x,))):
        network = randomise(kind(**config), 1)
        torch.save({f"module.{k}": v for k, v in network.state_dict().items()}, tmp_path / "public.pt")
        loaded = load_network(kind, str(tmp_path / "public.pt"))
        assert loaded.config == network.config
        t = torch.rand(2)
        assert torch.equal(loaded(x, t, *more, y), network(x, t, *more, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["config"]["model"].update(depth=3), "does not fit this SiT: no blocks.2"),
        (lambda content: content["config"]["model"].update(num_heads=5), "hidden_size 32 must be a multiple"),
        (lambda content: content["config"]["model"].update(surprise=1), "surprise"),
        (lambda content: content["config"]["model"].update(depth=10**9), "its config has 1000000000 blocks"),
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
        load_network(SiT, str(path))
    assert "a.pt" in str(caught.value)


def test_a_file_that_is_not_here_is_told_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path))
    for name, assets in (("SiT-XL-2-256x256.pt", ["sit-xl-2-256"]), (str(tmp_path / "mine.pt"), [])):
        with pytest.raises(MissingWeights, match=f"^checkpoint '{name}' does not exist$") as caught:
            load_network(SiT, name)
        assert caught.value.assets == assets


def test_a_run_is_read_once_for_its_newest_network_and_what_it_says(save_network, tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path / "000-predictor-a" / "checkpoints")
    for step in (1, 2):
        content = torch.load(save_network(tmp_path / "a.pt", SiT, seed=step))
        content["step"] = step
        content["config"]["training"] = {"path_type": "gvp", "lr": 1e-4}
        folder.record(folder.path(step), save_checkpoint(folder.path(step), content))
    reads = []
    monkeypatch.setattr(
        "flowturbo.networks.load.load_checkpoint", lambda path: reads.append(path) or load_checkpoint(path)
    )
    network, info = load_with_info(SiT, str(tmp_path / "000-predictor-a"))
    assert reads == [info.path] == [folder.path(2)]
    assert (info.step, info.path_type, info.training["lr"]) == (2, "gvp", 1e-4)
    expected = torch.load(folder.path(2))["ema"]
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


# ---- files of version 0.1.0


@pytest.mark.parametrize(
    ("kind", "name", "step"),
    [
        (SiT, "predictor.safetensors", 8),
        (VelocityRefiner, "refiner.safetensors", 4),
        (SiT, "results/000-predictor-no-note/checkpoints/0000004.pt", 4),
        (SiT, "results/000-predictor-no-note", 4),
    ],
)
def test_files_of_an_earlier_version_load(kind, name, step):
    network, info = load_with_info(kind, str(EARLIER / name))
    assert {**network.config, "class": kind.__name__} == info.model
    assert info.model["hidden_size"] == 8
    assert info.step == step
    assert info.path_type == "linear"
    file = info.path
    expected = weights_of(load_checkpoint(file), file)
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    inputs = [torch.randn(2, 3, 8, 8) for _ in range(kind.images_in)]
    output = network(inputs[0], torch.rand(2), *inputs[1:], torch.tensor([0, 1]))
    assert output.isfinite().all()


def test_a_run_of_an_earlier_version_has_its_newest_checkpoint():
    run = EARLIER / "results" / "000-predictor-no-note"
    folder, told = CheckpointFolder(run / "checkpoints"), []
    assert folder.newest(told.append) == folder.path(4) == run / "checkpoints" / "0000004.pt"
    assert folder.digests() == {"0000004.pt": sha256(folder.path(4))}
    assert folder.is_latest(folder.path(4))
    assert told == []
