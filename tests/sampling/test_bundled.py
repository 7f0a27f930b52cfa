"""The models that come with the package."""

from __future__ import annotations

import socket
from dataclasses import fields

import pytest
import torch

import sample
import transport
from flowturbo import FlowTurbo
from flowturbo.data.randomness import keyed_noise
from flowturbo.sampling.bundled import load_bundled
from flowturbo.sampling.options import MODEL_PRESETS, NetworkOptions, SamplingOptions
from flowturbo.sampling.picture_options import PictureOptions
from flowturbo.transport import Guidance
from flowturbo.weights.registry import MODELS, PACKAGED


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("FLOWTURBO_CACHE", str(tmp_path / "no-cache"))


@pytest.mark.parametrize("name", MODELS)
def test_a_models_files_are_small_and_its_classes_its_own(name):
    model = MODELS[name]
    assert (PACKAGED / model.predictor_ckpt).stat().st_size <= 5e6
    assert (PACKAGED / model.refiner_ckpt).stat().st_size <= 1e6
    networks = load_bundled(name, device="cpu")
    numbers = [str(k) for k in range(networks.predictor.num_classes)]
    assert set(model.classes) <= set(networks.class_names.names if networks.class_names else numbers)
    assert networks.refiner is not None


def test_what_a_model_sets_are_options():
    known = {
        each.name
        for kind in (sample.FileOptions, PictureOptions, NetworkOptions, SamplingOptions)
        for each in fields(kind)
    }
    for values in MODEL_PRESETS.values.values():
        assert set(values) <= known


@pytest.mark.parametrize("name", MODELS)
def test_from_name_is_the_sampler_of_the_models_networks(name):
    model, networks = MODELS[name], load_bundled(name, device="cpu")
    shape = networks.predictor.input_shape
    z, y = keyed_noise(0, range(2), shape), torch.tensor([0, 1])
    sampler = FlowTurbo.from_name(name, device="cpu")
    assert (str(sampler), sampler.guidance.scale) == (model.schedule, model.cfg_scale)
    by_hand = FlowTurbo(networks.predictor, networks.refiner, model.schedule, model.cfg_scale)
    x = sampler.sample(z, y)
    assert torch.equal(x, by_hand.sample(z, y))
    assert x.abs().mean() < 1.5


def test_the_form_of_r_is_the_one_that_the_refiner_was_trained_for():
    assert FlowTurbo.from_name("colour", "M4R1", device="cpu").refiner_step == "midpoint"
    assert FlowTurbo.from_name("colour", "P4R1", refiner_step="single", device="cpu").refiner_step == "single"
    assert FlowTurbo.from_name("digits", device="cpu").refiner_step == "released"


def test_from_name_takes_what_flowturbo_takes():
    sampler = FlowTurbo.from_name("digits", "H1P2", Guidance(1.5, interval=(0.2, 1.0)), device="cpu", decode=len)
    assert str(sampler) == "H1P2"
    assert sampler.refiner is None  # not read where the schedule needs none
    assert sampler.sample(torch.randn(3, 1, 8, 8), torch.arange(3)) == 3
    assert isinstance(sampler, transport.FlowTurbo)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^no model 'color' comes with .* colour, digits; did you mean 'colour'\?$"):
        FlowTurbo.from_name("color")
