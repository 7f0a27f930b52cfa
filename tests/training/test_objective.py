"""The objectives: what they draw, by number, and what they make of it."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowturbo.data.loader import Batch
from flowturbo.data.pictures import from_uint8
from flowturbo.data.randomness import keyed_generator
from flowturbo.models import SiT
from flowturbo.networks.autoencoder import NoAutoencoder, load_autoencoder
from flowturbo.networks.precision import cast
from flowturbo.refiner import VelocityRefiner
from flowturbo.training import objective as objectives
from flowturbo.training.build import FrozenNetworks
from flowturbo.training.objective import Draws, KeyedDraws, make_objective
from flowturbo.training.options import DataOptions, Optimisation, PredictorOptions, RefinerOptions, TrainingOptions
from flowturbo.transport import PATHS, flow_matching_loss, predictor_times, refiner_loss, refiner_times

CPU = torch.device("cpu")
DRAW = KeyedDraws(seed=3, shape=(2, 4, 4), posterior=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_draws_of_a_number_depend_on_seed_and_number_alone():
    whole = DRAW(range(30))
    assert [tuple(v.shape) for v in whole] == [(30, 2, 4, 4), (30, 2, 4, 4), (30,), (30,), (30,)]
    assert {v.dtype for v in whole} == {torch.float32}
    for number in (0, 13, 29):
        assert same(DRAW([number]), Draws(*(v[number : number + 1] for v in whole)))
    assert not torch.equal(KeyedDraws(4, (2, 4, 4), True)(range(30)).noise, whole.noise)
    assert same(pickle.loads(pickle.dumps(DRAW))([7]), DRAW([7]))


def test_the_draws_are_those_of_version_0_1():
    """After the flip's: three uniform numbers, then the noise, of one generator."""
    random = keyed_generator(3, 2**40)
    random.random()
    uniform = random.random(3, dtype=np.float32)
    noise = random.standard_normal((2, 2, 4, 4), dtype=np.float32)
    drawn = DRAW([2**40])
    assert [drawn.u_t.item(), drawn.u_dt.item(), drawn.u_drop.item()] == uniform.tolist()
    assert np.array_equal(drawn.noise[0], noise[0])
    assert np.array_equal(drawn.posterior_noise[0], noise[1])


def test_the_draws_of_a_sample_are_unlike():
    drawn = DRAW(range(3000))
    uniform = [drawn.u_t, drawn.u_dt, drawn.u_drop]
    for u in uniform:
        assert abs(u.mean() - 0.5) < 0.03
        assert 0 <= u.min() < u.max() < 1
    correlations = torch.corrcoef(torch.stack(uniform)) - torch.eye(3)
    assert correlations.abs().max() < 0.1
    for noise in (drawn.noise, drawn.posterior_noise):
        assert abs(noise.mean()) < 0.02
        assert abs(noise.var() - 1) < 0.03
    assert abs((drawn.noise * drawn.posterior_noise).mean()) < 0.02


def test_models_of_pixels_draw_no_posterior_noise():
    drawn = KeyedDraws(3, (2, 4, 4), posterior=False)(range(5))
    assert drawn.posterior_noise.shape == (0,)
    assert same(drawn._replace(posterior_noise=DRAW(range(5)).posterior_noise), DRAW(range(5)))


# ---- losses


SIZE = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 4, "num_classes": 10}


@pytest.fixture
def networks(randomise):
    """A predictor, a teacher and a refiner for images of one channel."""
    kinds = (SiT, SiT, VelocityRefiner)
    return SimpleNamespace(
        **{
            name: randomise(kind(**SIZE, in_channels=1), seed)
            for seed, (name, kind) in enumerate(zip(("model", "teacher", "refiner"), kinds))
        }
    )


def batch_of(images, draw, n=12):
    return Batch(images, torch.arange(n) % 10, torch.arange(n), draw(range(n)))


def pixels(n=12, channels=1, side=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator).byte()


def options(target, **groups):
    refiner = groups.pop("refiner", RefinerOptions("t")) if target == "refiner" else RefinerOptions()
    return TrainingOptions(target, DataOptions("d"), refiner, **groups)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_the_predictors_loss_is_velocity_matching(networks, path_type, distribution):
    chosen = PredictorOptions(path_type=path_type, time_distribution=distribution)
    given = options("predictor", predictor=chosen, optimisation=Optimisation(class_dropout=0.5, seed=9))
    objective = make_objective(given, FrozenNetworks(None, NoAutoencoder(), CPU, torch.float32), networks.model)
    assert objective.draw == KeyedDraws(9, (1, 8, 8), posterior=False)
    batch = batch_of(pixels(), objective.draw)
    low, high = PATHS[path_type].interval
    t = low + (high - low) * predictor_times(batch.draws.u_t, distribution)
    expected = flow_matching_loss(
        networks.model,
        from_uint8(batch.images),
        batch.labels,
        x0=batch.draws.noise,
        t=t,
        drop=batch.draws.u_drop < 0.5,
        path=PATHS[path_type],
    )
    assert torch.equal(objective(batch), expected)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_refiners_loss_is_the_recipes(networks, recipe):
    given = options("refiner", refiner=RefinerOptions("t", recipe=recipe, max_dt=0.3))
    frozen = FrozenNetworks(networks.teacher, NoAutoencoder(), CPU, torch.float32)
    objective = make_objective(given, frozen, networks.refiner)
    batch = batch_of(pixels(), objective.draw)
    t, dt = refiner_times(batch.draws.u_t, batch.draws.u_dt, 0.3, recipe)
    expected = refiner_loss(
        networks.refiner,
        networks.teacher,
        from_uint8(batch.images),
        batch.labels,
        x0=batch.draws.noise,
        t=t,
        dt=dt,
        drop=batch.draws.u_drop < 0.1,
        recipe=recipe,
    )
    assert torch.equal(objective(batch), expected)
    assert not torch.equal(objective(batch_of(pixels(), KeyedDraws(1, (1, 8, 8), False))), expected)


def test_latents_are_drawn_from_moments_which_may_be_cached(vae_folder, randomise):
    autoencoder = load_autoencoder(str(vae_folder))
    model = randomise(SiT(**SIZE), 0)
    objective = make_objective(options("predictor"), FrozenNetworks(None, autoencoder, CPU, torch.float32), model)
    assert objective.draw == KeyedDraws(0, (4, 8, 8), posterior=True)
    online = batch_of(pixels(channels=3, side=16), objective.draw)
    moments = autoencoder.moments(from_uint8(online.images))
    expected = autoencoder.sample(moments, online.draws.posterior_noise)
    assert torch.equal(objective.latents(online), expected)
    cached = online._replace(images=moments.half())
    torch.testing.assert_close(objective.latents(cached), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(objective(cached), objective(online), atol=1e-2, rtol=1e-2)


def test_without_a_null_class_no_label_is_dropped(randomise):
    model = randomise(SiT(**SIZE, in_channels=1, class_dropout_prob=0.0), 0)
    objective = make_objective(options("predictor"), FrozenNetworks(None, NoAutoencoder(), CPU, torch.float32), model)
    assert objective.drop(batch_of(pixels(), objective.draw)) is None
    assert objective(batch_of(pixels(), objective.draw)).isfinite().all()


def test_the_distribution_of_times_changes_nothing_else_that_is_drawn(networks, monkeypatch):
    seen, loss = [], objectives.flow_matching_loss
    monkeypatch.setattr(
        objectives, "flow_matching_loss", lambda *args, **more: seen.append(more) or loss(*args, **more)
    )
    for name in ("uniform", "logit-normal"):
        given = options("predictor", predictor=PredictorOptions(time_distribution=name))
        frozen = FrozenNetworks(None, NoAutoencoder(), CPU, torch.float32)
        objective = make_objective(given, frozen, networks.model)
        objective(batch_of(pixels(), objective.draw))
    uniform, normal = seen
    assert torch.equal(uniform["x0"], normal["x0"])
    assert torch.equal(uniform["drop"], normal["drop"])
    torch.testing.assert_close(torch.special.ndtr(torch.logit(normal["t"])), uniform["t"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_trained_is_under_autocast(networks, dtype, monkeypatch):
    """The teacher's blocks are held in half precision: autocast would cast all weights anew in every evaluation."""
    seen = []

    def noted(name, network):
        network.register_forward_hook(lambda module, inputs, output: seen.append((name, output.dtype)))
        return network

    frozen = FrozenNetworks(noted("teacher", cast(networks.teacher, dtype)), NoAutoencoder(), CPU, dtype)
    objective = make_objective(options("refiner"), frozen, noted("refiner", networks.refiner))
    loss = objective(batch_of(pixels(), objective.draw))
    assert seen == [("teacher", torch.float32), ("teacher", torch.float32), ("refiner", dtype)]
    assert loss.dtype == torch.float32
