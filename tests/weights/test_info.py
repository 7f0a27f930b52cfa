import pytest
import torch

from flowturbo.weights.checkpoint import load_checkpoint
from flowturbo.weights.info import CheckpointInfo


def test_a_checkpoint_says_how_its_network_was_trained(run, refiner):
    path = run / "checkpoints" / "0000040.pt"
    info = CheckpointInfo.of(load_checkpoint(path), path)
    assert (info.path, info.step, info.path_type) == (path, 40, "gvp")
    assert info.model == {"class": "VelocityRefiner", **refiner.config}
    assert info.training["lr"] == 5e-5


@pytest.mark.parametrize(
    "content",
    [
        {"w": 1},
        {"config": {}},
        {"config": {"training": {}}},
        {"config": {"training": {"path_type": "spiral"}}},
        {"config": {"training": {"path_type": [1]}}},
        {"step": "3"},
    ],
)
def test_a_checkpoint_may_say_nothing(content):
    info = CheckpointInfo.of(content, "a.pt")
    assert (info.step, info.path_type, info.model) == (None, None, {})


@pytest.mark.parametrize(
    "config", [3, "SiT", [1], None, torch.ones(3), {"model": "SiT-B/2"}, {"training": [1]}, {"model": None}]
)
def test_a_config_that_is_none_is_named(config):
    with pytest.raises(ValueError, match=r"^checkpoint 'a\.pt' is damaged: its config is no table of settings$"):
        CheckpointInfo.of({"config": config}, "a.pt")
