import math

import pytest
import torch

from flowturbo.data.randomness import keyed_noise
from flowturbo.networks.autoencoder import load_autoencoder
from flowturbo.sampling.fidelity import Draws, Fidelity, end_points, fine_end_points, pixels
from flowturbo.sampling.generate import ImageSampler, Networks
from flowturbo.transport import FlowTurbo, Guidance, SamplerSettings


def test_rmse_and_psnr_of_known_errors():
    reference = torch.zeros(400, 3, 4, 4)
    off = torch.randn(400, 3, 4, 4) * 0.1
    measured = Fidelity.of(reference + off, reference)
    assert measured.rmse.value == pytest.approx(float(off.square().mean().sqrt()), rel=1e-6)
    assert measured.psnr.value == pytest.approx(20 * math.log10(2 / measured.rmse.value))
    # Of 400 · 48 independent normal errors: σ / √(2 n).
    assert measured.rmse.standard_error == pytest.approx(0.1 / math.sqrt(2 * 400 * 48), rel=0.15)
    assert measured.psnr.standard_error == pytest.approx(
        20 / math.log(10) * measured.rmse.standard_error / measured.rmse.value
    )


def test_paired_ratios_know_what_both_share():
    difficulty = torch.rand(256, 1) ** 4  # a heavy tail: some samples are hard for every solver
    reference, noise = torch.zeros(256, 8), torch.randn(256, 8)
    one, two = (Fidelity.of(scale * difficulty * noise, reference) for scale in (0.1, 0.2))
    ratio = one.ratio(two)
    assert ratio.value == pytest.approx(0.5)
    assert ratio.standard_error < 1e-6
    assert one.rmse.standard_error / one.rmse.value > 0.02


def test_the_standard_error_of_a_ratio_is_that_of_repetitions():
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(200):
        shared, own = torch.randn(2, 100, 16, generator=generator)
        one, two = Fidelity.of(shared + own, 0 * own), Fidelity.of(2 * shared, 0 * own)
        ratios.append(one.ratio(two))
    values = torch.tensor([ratio.value for ratio in ratios])
    told = sum(ratio.standard_error for ratio in ratios) / len(ratios)
    assert told == pytest.approx(float(values.std()), rel=0.2)


def test_no_error_at_all():
    same = torch.ones(4, 2)
    assert Fidelity.of(same, same).rmse == (0.0, 0.0)
    assert Fidelity.of(same, same).psnr == (math.inf, 0.0)


@pytest.mark.parametrize(("shape", "other"), [((4, 2), (4, 3)), ((1, 2), (1, 2))])
def test_what_cannot_be_compared_is_refused(shape, other):
    with pytest.raises(ValueError, match="expected one shape, of at least 2 samples"):
        Fidelity.of(torch.zeros(shape), torch.zeros(other))
    with pytest.raises(ValueError, match="paired"):
        Fidelity(torch.ones(3)).ratio(Fidelity(torch.ones(4)))


@pytest.fixture
def networks(predictor, vae_folder):
    return Networks(predictor, None, load_autoencoder(str(vae_folder)), torch.device("cpu"))


def test_end_points_are_the_samplers(networks, predictor):
    settings = SamplerSettings(Guidance(2.0))
    draws = Draws.random(3, range(5), 10)
    found = end_points(networks, "A3", settings, *draws, batch_size=2)
    z, y = keyed_noise(3, range(5), predictor.input_shape), torch.tensor(draws.classes)
    torch.testing.assert_close(found, FlowTurbo(predictor, None, "A3", 2.0).sample(z, y), atol=1e-5, rtol=0)
    assert pixels(networks, found, 2).shape == (5, 3, 16, 16)
    images = ImageSampler(networks, "A3", settings)(3, range(5), draws.classes)
    shown = ((pixels(networks, found) + 1) * 127.5).clamp(0, 255).round()
    assert (shown - images).abs().max() <= 1


def test_the_fine_solution_is_guided_at_every_evaluation_and_the_limit(networks):
    draws = Draws(0, range(4), (0, 1, 2, 3))
    some = SamplerSettings(Guidance(2.0, every=2))
    fine = fine_end_points(networks, some, *draws)
    torch.testing.assert_close(fine, fine_end_points(networks, SamplerSettings(Guidance(2.0)), *draws))
    errors = [Fidelity.of(end_points(networks, f"A{n}", SamplerSettings(Guidance(2.0)), *draws), fine) for n in (8, 32)]
    assert errors[1].ratio(errors[0]).value < 0.2


def test_a_class_for_each_number(networks):
    with pytest.raises(ValueError, match="2 classes for 3 samples"):
        end_points(networks, "A3", SamplerSettings(), 0, range(3), (0, 1))
