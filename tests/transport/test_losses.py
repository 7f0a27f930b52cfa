from __future__ import annotations

import pytest
import torch

from flowturbo.transport import PATHS, flow_matching_loss, predictor_times, refiner_loss, refiner_times

RECIPES = ("paper", "release")


@pytest.fixture
def data(batch):
    """Keyword arguments of refiner_loss, and the positional x1, y."""
    n = 6
    x1, y = batch(n, seed=1)
    x0, _ = batch(n, seed=2)
    t, dt = refiner_times(torch.rand(n), torch.rand(n))
    return (x1, y), {"x0": x0, "t": t, "dt": dt, "drop": torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool)}


def column(t):
    return t.reshape(-1, 1, 1, 1)


# Refiner loss


def test_release_recipe_matches_golden(golden, golden_networks):
    arrays, _ = golden("flowturbo")
    loss = {k.removeprefix("loss/"): v for k, v in arrays.items() if k.startswith("loss/")}
    predictor, refiner = golden_networks
    t, dt = refiner_times(loss["t"], loss["dt_u"], max_dt=0.12, recipe="release")
    given = {"x0": loss["x0"], "t": t, "drop": loss["drop_u"] < 0.1, "recipe": "release"}
    for form in (dt, dt[0], float(dt[0])):
        out = refiner_loss(refiner, predictor, loss["x1"], loss["y"], dt=form, **given)
        torch.testing.assert_close(out, loss["loss"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_recipes_are_what_they_say(recipe, name, predictor, refiner, data):
    (x1, y), given = data
    t, dt, x0 = given["t"] * 0.9, given["dt"], given["x0"]
    null = torch.where(given["drop"], 10, y)
    path = PATHS[name]
    x_t = column(path.alpha(t)) * x1 + column(path.sigma(t)) * x0
    with torch.no_grad():
        v_t = predictor(x_t, t, null if recipe == "paper" else y)
        x_next = x_t + column(dt) * v_t
        error = predictor(x_next, t + dt, null) - (refiner(x_next, t + dt, v_t, null) + v_t)
    loss = refiner_loss(refiner, predictor, x1, y, **given | {"t": t}, recipe=recipe, path=path)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, (error**2).mean((1, 2, 3)))


def test_the_paper_recipe_and_the_linear_path_are_the_default(predictor, refiner, data):
    (x1, y), given = data
    loss = refiner_loss(refiner, predictor, x1, y, **given)
    explicit = refiner_loss(refiner, predictor, x1, y, **given, recipe="paper", path=PATHS["linear"])
    assert torch.equal(loss, explicit)
    assert not torch.allclose(loss, refiner_loss(refiner, predictor, x1, y, **given, recipe="release"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_which_calls_drop_the_label(recipe, predictor, refiner, data, recorder):
    (x1, y), given = data
    networks = recorder(refiner), recorder(predictor)
    refiner_loss(*networks, x1, y, **given, recipe=recipe)
    drop = given["drop"]
    ((*_, refined_drop),) = networks[0].calls
    (*_, first_drop), (*_, second_drop) = networks[1].calls
    assert torch.equal(refined_drop, drop)
    assert torch.equal(second_drop, drop)
    if recipe == "paper":
        assert torch.equal(first_drop, drop)
    else:
        assert first_drop is None or not first_drop.any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_drop_the_recipes_agree_and_no_call_drops(recipe, predictor, refiner, data, recorder):
    (x1, y), given = data
    networks = recorder(refiner), recorder(predictor)
    loss = refiner_loss(*networks, x1, y, **given | {"drop": None}, recipe=recipe)
    assert [call[-1] for network in networks for call in network.calls] == [None] * 3
    torch.testing.assert_close(loss, refiner_loss(refiner, predictor, x1, y, **given | {"drop": None}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_reach_the_refiner_alone(recipe, predictor, refiner, data):
    (x1, y), given = data
    x1.requires_grad_()
    refiner_loss(refiner, predictor, x1, y, **given, recipe=recipe).sum().backward()
    assert all(p.grad is None for p in predictor.parameters())
    trained = {n: p.grad for n, p in refiner.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().max() > 0 for g in trained.values())
    assert refiner.pos_embed.grad is None


def test_the_gradient_is_that_of_the_mean_square(predictor, data):
    """d/db of mean (target − (b + v))² for a refiner that returns a constant b."""
    (x1, y), given = data
    b = torch.zeros((), requires_grad=True)
    seen = []

    def constant(x, t, v, y, drop):
        seen.append((x, t, v))
        return b.expand_as(x)

    refiner_loss(constant, predictor, x1, y, **given).mean().backward()
    ((x, t, v),) = seen
    with torch.no_grad():
        expected = -2 * (predictor(x, t, y, given["drop"]) - v).mean()
    torch.testing.assert_close(b.grad, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_teacher_is_evaluated_in_inference_mode_and_any_refiner_can_be_trained_on_it(
    dtype, tolerance, predictor, data
):
    """This one saves each of its inputs for the backward pass as it gets it, which no inference tensor can be."""
    (x1, y), given = data
    modes = []

    def teacher(*inputs):
        modes.append(torch.is_inference_mode_enabled())
        return predictor(*inputs)

    weights = [torch.ones((), requires_grad=True) for _ in range(3)]
    seen = []

    def product(x, t, v, y, drop):
        seen.append((x, t, v))
        return weights[0] * x + weights[1] * column(t) + weights[2] * v

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = refiner_loss(product, teacher, x1, y, **given).mean()
    loss.backward()
    assert modes == [True, True]
    ((x, t, v),) = seen
    for weight, slope in zip(weights, (x, column(t), v)):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            error = predictor(x, t, y, given["drop"]) - (product(x, t, v, y, None) + v)
            expected = -2 * (error * slope).mean()
        torch.testing.assert_close(weight.grad, expected, rtol=tolerance, atol=tolerance)


def test_the_loss_is_zero_for_a_refiner_that_knows(predictor, data):
    (x1, y), given = data

    def oracle(x, t, v, y, drop):
        return predictor(x, t, y, drop) - v

    for recipe in RECIPES:
        loss = refiner_loss(oracle, predictor, x1, y, **given, recipe=recipe)
        torch.testing.assert_close(loss, torch.zeros(6), atol=1e-10, rtol=0)


def test_a_scalar_step_is_that_step_for_every_sample(predictor, refiner, data):
    (x1, y), given = data
    each = refiner_loss(refiner, predictor, x1, y, **given | {"dt": torch.full((6,), 0.05)})
    for dt in (0.05, torch.tensor(0.05)):
        assert torch.equal(refiner_loss(refiner, predictor, x1, y, **given | {"dt": dt}), each)


def test_each_sample_has_its_own_loss(predictor, refiner, data):
    (x1, y), given = data
    loss = refiner_loss(refiner, predictor, x1, y, **given)
    row = {k: v[2:3] for k, v in given.items()}
    alone = refiner_loss(refiner, predictor, x1[2:3], y[2:3], **row)
    torch.testing.assert_close(loss[2:3], alone, atol=1e-5, rtol=1e-4)


def test_unknown_recipes_are_refused(predictor, refiner, data):
    (x1, y), given = data
    with pytest.raises(ValueError, match=r"'best' .*paper, release"):
        refiner_loss(refiner, predictor, x1, y, **given, recipe="best")
    with pytest.raises(ValueError, match=r"'best' .*paper, release"):
        refiner_times(torch.rand(2), torch.rand(2), recipe="best")


# Times


@pytest.mark.parametrize("max_dt", [0.12, 0.3])
def test_paper_times_stay_inside_the_trajectory(max_dt):
    n = 100_000
    t, dt = refiner_times(torch.rand(n), torch.rand(n), max_dt)
    assert t.shape == dt.shape == (n,)
    assert t.min() >= 0
    assert dt.min() > 0
    assert dt.max() <= max_dt
    assert (t + dt).max() <= 1
    uniform = max_dt * torch.linspace(0, 1, n)
    torch.testing.assert_close(dt.sort().values, uniform, atol=0.01 * max_dt, rtol=0)
    torch.testing.assert_close((t / (1 - dt)).sort().values, torch.linspace(0, 1, n), atol=0.01, rtol=0)
    assert abs(torch.corrcoef(torch.stack([t / (1 - dt), dt]))[0, 1]) < 0.02


def test_paper_times_at_the_ends_of_the_draws():
    ends = torch.tensor([0.0, 1 - 2**-24])
    t, dt = refiner_times(*torch.cartesian_prod(ends, ends).T)
    assert (t >= 0).all()
    assert (dt > 0).all()
    assert (t + dt <= 1).all()
    assert dt.max() == pytest.approx(0.12)


def test_release_times_share_one_step_and_may_pass_the_end():
    passed, steps = 0, []
    for _ in range(500):
        u_t = torch.rand(18)
        t, dt = refiner_times(u_t, torch.rand(18), 0.12, recipe="release")
        assert dt.shape == (18,)
        assert (dt == dt[0]).all()
        assert torch.equal(t, u_t)
        passed += int((t + dt > 1).sum())
        steps.append(float(dt[0]))
    assert passed > 0
    assert min(steps) >= 0
    assert max(steps) < 0.12
    torch.testing.assert_close(torch.tensor(steps).sort().values, torch.linspace(0, 0.12, 500), atol=0.01, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("max_dt", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_impossible_ranges_are_refused(recipe, max_dt):
    with pytest.raises(ValueError, match=f"max_dt {max_dt}"):
        refiner_times(torch.rand(2), torch.rand(2), max_dt, recipe=recipe)


# Flow matching


@pytest.mark.parametrize("name", PATHS)
def test_flow_matching_is_zero_for_the_exact_velocity(name, data):
    """The velocity of the pair, from x_t, t and x1 alone."""
    (x1, y), given = data
    path = PATHS[name]

    def exact(x, t, y, drop):
        t = column(t)
        noise = (x - path.alpha(t) * x1) / path.sigma(t)
        return path.alpha_dot(t) * x1 + path.sigma_dot(t) * noise

    t = 0.9 * given["t"]
    loss = flow_matching_loss(exact, x1, y, x0=given["x0"], t=t, path=path)
    torch.testing.assert_close(loss, torch.zeros(6), atol=1e-6, rtol=0)
    other = flow_matching_loss(lambda *a: exact(*a) + 0.5, x1, y, x0=given["x0"], t=t, path=path)
    torch.testing.assert_close(other, torch.full((6,), 0.25), atol=1e-3, rtol=0)


def test_flow_matching_trains_the_predictor_with_dropped_labels(predictor, data, recorder):
    (x1, y), given = data
    network = recorder(predictor)
    loss = flow_matching_loss(network, x1, y, x0=given["x0"], t=given["t"], drop=given["drop"])
    ((x_t, t, labels, drop),) = network.calls
    assert torch.equal(t, given["t"])
    assert torch.equal(labels, y)
    assert torch.equal(drop, given["drop"])
    with torch.no_grad():
        error = predictor(x_t, t, torch.where(drop, 10, y)) - (x1 - given["x0"])
    torch.testing.assert_close(loss, (error**2).mean((1, 2, 3)))
    loss.sum().backward()
    assert predictor.x_embedder.proj.weight.grad.abs().max() > 0


def test_losses_are_float32_where_the_networks_are_in_half_precision(data):
    (x1, y), given = data
    half = flow_matching_loss(
        lambda x, *_: x.bfloat16(), x1.bfloat16(), y, x0=given["x0"].bfloat16(), t=given["t"].bfloat16()
    )
    assert half.dtype == torch.float32
    assert refiner_loss(lambda x, *_: x.bfloat16(), lambda x, *_: x.bfloat16(), x1, y, **given).dtype == torch.float32


def test_the_predictors_times_have_the_distribution_that_is_asked_for():
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.equal(predictor_times(u), u)
    t = predictor_times(u, "logit-normal")
    assert (t.diff() > 0).all()  # the same draw, whatever the distribution
    logits = torch.logit(t.double())
    assert logits.mean().abs() < 1e-3
    assert logits.std() == pytest.approx(1, abs=1e-3)
    ends = predictor_times(torch.tensor([0.0, 1 - 2**-24]), "logit-normal")
    assert ends[0] == 0
    assert 0.99 < ends[1] < 1
    with pytest.raises(ValueError, match="'cosine' is not one of uniform, logit-normal"):
        predictor_times(u, "cosine")
