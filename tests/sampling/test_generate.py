from pathlib import Path

import pytest
import torch

from flowturbo.refiner import VelocityRefiner
from flowturbo.sampling.generate import Files, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions, SamplingOptions
from flowturbo.weights.cache import MissingWeights
from flowturbo.weights.checkpoint import CheckpointFolder, save_checkpoint


@pytest.fixture
def options(save_network, tmp_path):
    """A predictor's run of two checkpoints, trained on another path, and a refiner's file."""
    folder = CheckpointFolder(tmp_path / "000-predictor-a" / "checkpoints")
    for step in (1, 2):
        content = torch.load(save_network(tmp_path / "a.pt", seed=step, in_channels=3))
        content["config"]["training"] = {"path_type": "gvp"}
        folder.record(folder.path(step), save_checkpoint(folder.path(step), content))
    refiner = save_network(tmp_path / "refiner.pt", VelocityRefiner, in_channels=3)
    return NetworkOptions(str(folder.folder.parent), str(refiner), "none", "cpu")


def test_a_run_stands_for_its_newest_checkpoint(options, tmp_path):
    newest = str(tmp_path / "000-predictor-a" / "checkpoints" / "0000002.pt")
    files = find_files(options, refiner=True)
    assert files == Files(newest, options.refiner_ckpt)
    assert find_files(options, refiner=False) == Files(newest, None)
    networks = load_networks(options, files)
    assert networks.path_type == "gvp"
    assert torch.equal(networks.predictor.pos_embed, torch.load(newest)["ema"]["pos_embed"])


@pytest.mark.parametrize(("recipe", "known"), [("endpoint", "midpoint"), ("paper", None)])
def test_a_refiner_that_was_trained_for_one_form_of_r_is_sampled_with_it(options, recipe, known):
    content = torch.load(options.refiner_ckpt)
    content["config"]["training"] = {"recipe": recipe, "refiner_step": "midpoint"}
    save_checkpoint(Path(options.refiner_ckpt), content)
    networks = load_networks(options, find_files(options, refiner=True))
    assert networks.refiner_step == known
    assert load_networks(options, find_files(options, refiner=False)).refiner_step is None
    assert SamplingOptions().settings(None, networks.refiner_step).refiner_step == (known or "released")
    assert SamplingOptions(refiner_step="adams").settings(None, known).refiner_step == "adams"


@pytest.mark.parametrize("refiner", [True, False])
def test_all_that_is_missing_is_named_at_once(tmp_path, monkeypatch, refiner):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingWeights, match=r"^no such file: SiT-XL-2-256x256\.pt") as caught:
        find_files(NetworkOptions(), refiner)
    assert caught.value.fields == ["predictor_ckpt", "refiner_ckpt"][: 1 + refiner]
