from __future__ import annotations

import numpy as np
import pytest
import torch

from flowturbo.data.classes import ClassNames
from flowturbo.data.pictures import from_uint8
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder, load_autoencoder
from flowturbo.sampling import EditOptions, edit
from flowturbo.sampling.editing import Editor
from flowturbo.sampling.generate import Networks
from flowturbo.sampling.options import SamplingOptions
from flowturbo.sampling.solvers import LearnedSolver, write_solver
from flowturbo.transport.solver import Solver

PLAIN = SamplingOptions(cfg_scale=1.0)


def picture(height, width, channels=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=random)


@pytest.fixture
def networks(randomise):
    """Of RGB pixels, 8x8 in 10 classes."""
    config = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10}
    predictor = randomise(SiT(**config, in_channels=3), 1)
    return Networks(predictor, None, NoAutoencoder(), torch.device("cpu"), class_names=None)


@pytest.fixture
def latent_networks(predictor, vae_folder):
    """Of 8x8 latents with an autoencoder, 16x16 pixels."""
    return Networks(predictor, None, load_autoencoder(str(vae_folder)), torch.device("cpu"))


# What is kept


@pytest.mark.parametrize("seed", range(6))
def test_bytes_outside_the_mask_are_the_originals(seed, networks, latent_networks):
    """Over random masks, schedules, sizes, methods, strengths and feathers."""
    random = np.random.default_rng(seed)
    schedule = str(random.choice(["E2", "H1P1", "P3@shift2", "M2", "A3", "F1L1"]))
    keep_size = bool(seed % 2)
    model = latent_networks if seed % 3 == 0 else networks
    side = model.image_size
    height, width = (side + int(n) for n in random.integers(0, 9, 2)) if keep_size else (side, side)
    image = picture(height, width, seed=seed)
    mask = torch.from_numpy((random.random((height, width)) < 0.4) * random.integers(1, 256, (height, width)))
    mask = mask.to(torch.uint8)
    mask[height // 2, width // 2] = 255
    results = int(random.integers(1, 3)) if seed % 4 < 3 else 1
    change = {"from_class": 2, "method": ["flowedit", "invert"][seed % 4 == 3]} if seed >= 3 else {"resample": 2}
    options = EditOptions(
        schedule,
        to_class=7,
        strength=float(random.uniform(0.2, 1)),
        feather=int(random.integers(0, 3)),
        keep_size=keep_size,
        num_images=results,
        **change,
    )
    made = edit(model, image, options, PLAIN, mask)
    assert made.images.shape == (results, *image.shape)
    outside = (mask == 0).expand(results, 3, -1, -1)
    assert int((made.images != image)[outside].sum()) == 0
    assert bool((made.images != image)[~outside].any())


def test_without_composing_latents_change_the_bytes_around_too(latent_networks):
    image, mask = picture(16, 16), torch.zeros(16, 16, dtype=torch.uint8)
    mask[4:8, 4:8] = 255
    raw = edit(latent_networks, image, EditOptions("E2", 1, composite=False), PLAIN, mask).images
    assert bool((raw != image)[0, :, 12:].any())


def test_the_result_is_put_back_into_the_whole_image(networks):
    image = picture(40, 30)
    options = EditOptions("E2", 3, keep_size=True)
    made = edit(networks, image, options, PLAIN)
    assert made.images.shape == (1, 3, 40, 30)
    assert made.images[0, :, :5].equal(image[:, :5])  # above the centre square
    assert not made.images[0, :, 5:35].equal(image[:, 5:35])
    assert edit(networks, image, EditOptions("E2", 3), PLAIN).images.shape == (1, 3, 8, 8)


# What is generated


def test_result_k_depends_on_the_seed_and_k_alone(networks):
    image = picture(8, 8)
    three = edit(networks, image, EditOptions("H1P1", 3, num_images=3, resample=2), PLAIN).images
    one = edit(networks, image, EditOptions("H1P1", 3, resample=2), PLAIN).images
    other = edit(networks, image, EditOptions("H1P1", 3), SamplingOptions(cfg_scale=1.0, seed=1)).images
    assert (three[:1].int() - one.int()).abs().max() <= 1
    assert not three[1].equal(three[0])
    assert not other.equal(one)


def test_a_weak_edit_stays_near_the_image_and_a_strong_one_does_not(networks):
    image = picture(8, 8)
    changes = [
        (edit(networks, image, EditOptions("H4", 3, strength=s), PLAIN).images - image.float()).abs().mean()
        for s in (0.01, 0.3, 1.0)
    ]
    assert changes[0] < 3 < changes[1] < changes[2]


def test_evaluations_of_every_method(networks):
    def count(**options):
        editor = Editor(networks, EditOptions("H1P2", 3, **options), PLAIN)
        calls = []
        handle = networks.predictor.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        editor.edit(picture(8, 8))
        handle.remove()
        assert sum(calls) == editor.evaluations[0]
        return editor.evaluations

    assert count() == (4, 0)
    assert count(resample=3) == (12, 0)
    assert count(from_class=1) == (8, 0)
    assert count(from_class=1, method="invert") == (8, 0)


@pytest.fixture
def asked(networks):
    """What the predictor was asked, in order: (x, t, y), and what it gave."""
    calls = []
    networks.predictor.register_forward_hook(lambda _, given, v: calls.append((*given[:3], v)))
    return calls


def test_inversion_goes_back_without_guidance_as_far_as_the_edit_starts(networks, asked):
    """And on from there: also what a mask keeps is on the way that it came."""
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[2:6, 2:6] = 255
    options = EditOptions("E2", 3, from_class=1, method="invert", strength=0.6)
    edit(networks, picture(8, 8), options, SamplingOptions(cfg_scale=4.0), mask)
    assert [len(x) for x, *_ in asked] == [1, 1, 2, 2]  # the last two with their null rows
    assert [int(y[0]) for _, _, y, _ in asked] == [1, 1, 3, 3]
    torch.testing.assert_close(torch.stack([t[0] for _, t, _, _ in asked]), torch.tensor([1.0, 0.7, 0.4, 0.7]))
    came_to = asked[1][0] - 0.3 * asked[1][3]
    torch.testing.assert_close(asked[2][0][:1], came_to, atol=1e-5, rtol=1e-5)


def test_further_passes_start_from_the_result_and_less_noise(networks, asked):
    """Of a grey part the first image keeps its share."""
    image, mask = picture(8, 8), torch.full((8, 8), 179, dtype=torch.uint8)
    mask[2:6, 2:6] = 255
    editor = Editor(networks, EditOptions("E2", 3, strength=0.8, resample=2, composite=False), PLAIN, keep_steps=True)
    steps = editor.edit(image, mask).steps
    torch.testing.assert_close(torch.stack([t[0] for _, t, _, _ in asked]), torch.tensor([0.2, 0.6, 0.6, 0.8]))
    share, first = mask / 255, from_uint8(image[None])
    kept = share * steps[2] + (1 - share) * first
    torch.testing.assert_close(steps[3], 0.6 * kept + 0.4 * editor._noise(1), atol=1e-5, rtol=1e-5)
    assert float((kept - steps[2]).abs().max()) > 0.05


def test_removal_generates_without_a_class(networks):
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[2:6, 2:6] = 255
    labels = []
    networks.predictor.register_forward_hook(lambda _, inputs, __: labels.append((inputs[2].tolist(), inputs[3])))
    edit(networks, picture(8, 8), EditOptions("E2", remove=True), SamplingOptions(cfg_scale=4.0), mask)
    assert labels == [([10], None)] * 2  # the null class; guidance has nothing to tell apart
    labels.clear()
    edit(networks, picture(8, 8), EditOptions("E2", 4, remove=True), PLAIN, mask)
    assert labels == [([4], None)] * 2


def test_the_noise_of_an_image_makes_it_again(networks):
    editor = Editor(networks, EditOptions("H40", 3), SamplingOptions(cfg_scale=1.5))
    image = picture(8, 8)
    noise = editor.invert(image)
    assert not torch.allclose(noise, from_uint8(image[None]), atol=0.1)
    assert (editor.restore(noise).int() - image.int()).abs().max() <= 2
    with pytest.raises(ValueError, match="noise of shape"):
        editor.restore(noise[..., :4])


def test_steps_are_kept_on_demand(networks):
    editor = Editor(networks, EditOptions("H1P2", 3), PLAIN, keep_steps=True)
    kept = editor.edit(picture(8, 8))
    assert [step.shape for step in kept.steps] == [(1, 3, 8, 8)] * 4
    assert editor.decode(kept.steps[-1]).equal(kept.images)
    assert kept.images.equal(edit(networks, picture(8, 8), EditOptions("H1P2", 3), PLAIN).images)
    assert edit(networks, picture(8, 8), EditOptions("H1P2", 3), PLAIN).steps == []


def test_classes_go_by_the_models_names(networks):
    names = ClassNames(tuple(f"kind {k}" for k in range(10)), (1,) * 10)
    named = Networks(networks.predictor, None, networks.autoencoder, networks.device, class_names=names)
    by_name = edit(named, picture(8, 8), EditOptions("E2", "kind 6"), PLAIN).images
    assert by_name.equal(edit(networks, picture(8, 8), EditOptions("E2", 6), PLAIN).images)
    with pytest.raises(ValueError, match="'kind 11' is no class"):
        edit(named, picture(8, 8), EditOptions("E2", "kind 11"), PLAIN)


@pytest.mark.slow
def test_sit_xl_with_its_autoencoder(randomise):
    from benchmarks.variants import stable_diffusion_autoencoder
    from flowturbo.models import SIT_CONFIGS
    from flowturbo.networks.autoencoder import Autoencoder

    predictor = randomise(SiT(**SIT_CONFIGS["SiT-XL/2"]), 1, 0.02)
    networks = Networks(predictor, None, Autoencoder(stable_diffusion_autoencoder()), torch.device("cpu"))
    image, mask = picture(256, 256), torch.zeros(256, 256, dtype=torch.uint8)
    mask[100:171, 90:200] = 255
    made = edit(networks, image, EditOptions("E1", "golden retriever", feather=4), PLAIN, mask).images[0]
    assert made[:, mask == 0].equal(image[:, mask == 0])
    assert not made[:, mask == 255].equal(image[:, mask == 255])


def test_a_solver_edits_as_the_blocks_do_that_it_was_made_of(networks, tmp_path):
    solver = Solver.of("M3")
    write_solver(tmp_path / "of-m3.json", LearnedSolver("any", solver.grid, solver.coefficients))
    for how in ({}, {"resample": 2}, {"from_class": 2}, {"from_class": 2, "method": "invert"}):
        wanted = {"to_class": 7, "strength": 0.6, **how}
        by_blocks, by_solver = (
            edit(networks, picture(8, 8), EditOptions(text, **wanted), PLAIN)
            for text in ("M3", str(tmp_path / "of-m3.json"))
        )
        assert (by_solver.images.int() - by_blocks.images.int()).abs().max() <= 1
        assert by_solver.evaluations == by_blocks.evaluations
