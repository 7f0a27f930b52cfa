from __future__ import annotations

import pytest
import torch

from flowturbo.models import SIT_CONFIGS, Attention, SiT, sincos_positions
from flowturbo.networks.load import config_from_state
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport.branches import guide

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
PUBLIC = [(SiT, "sit_xl_2_256", {}), (VelocityRefiner, "refiner_xl_2_256", {"depth": 1})]


def shapes(network):
    return {k: tuple(v.shape) for k, v in network.state_dict().items()}


def on_meta(cls, **kwargs):
    with torch.device("meta"):
        return cls(**kwargs)


# Against the original implementation


@pytest.fixture(params=[0, 1])
def golden_case(request, golden):
    arrays, configs = golden("sit_forward")
    prefix = f"{request.param}/"
    case = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    state = {k.removeprefix("state/"): v for k, v in case.items() if k.startswith("state/")}
    return case, state, configs[request.param]


def test_golden_weights_load_strictly_and_the_forward_pass_matches(golden_case):
    case, state, config = golden_case
    model = SiT(**config)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        out = model.eval()(case["x"], case["t"], case["y"])
    torch.testing.assert_close(out, case["out"], atol=1e-4, rtol=0)


def test_golden_guided_forward_pass_matches(golden_case):
    case, state, config = golden_case
    model = SiT(**config)
    model.load_state_dict(state)
    half = len(case["x"]) // 2
    x = torch.cat([case["x"][:half]] * 2)
    with torch.no_grad():
        out = guide(model.eval()(x, case["t"], case["y"]), 3.0, 3)
    torch.testing.assert_close(out, case["out_cfg3"], atol=1e-4, rtol=0)
    assert not torch.allclose(out, case["out"], atol=1e-2)


def test_fixed_positions_equal_those_in_the_golden_weights(golden_case):
    _, state, config = golden_case
    model = SiT(**config)
    torch.testing.assert_close(model.pos_embed.data, state["pos_embed"], atol=1e-6, rtol=0)
    assert not model.pos_embed.requires_grad


# The public checkpoints: their manifests are written from the published architecture, not by this code


@pytest.mark.parametrize(("cls", "name", "kwargs"), PUBLIC)
def test_keys_and_shapes_are_those_of_the_public_checkpoint(cls, name, kwargs, manifest):
    assert shapes(on_meta(cls, **SIT_CONFIGS["SiT-XL/2"] | kwargs)) == manifest(name)


@pytest.mark.parametrize(("cls", "name", "kwargs"), PUBLIC)
def test_public_checkpoint_loads_strictly(cls, name, kwargs, manifest):
    state = {k: torch.empty(shape, device="meta") for k, shape in manifest(name).items()}
    model = on_meta(cls, **SIT_CONFIGS["SiT-XL/2"] | kwargs)
    model.load_state_dict(state, strict=True, assign=True)
    state.pop("final_layer.linear.bias")
    with pytest.raises(RuntimeError, match=r"final_layer\.linear\.bias"):
        model.load_state_dict(state, strict=True, assign=True)


def test_parameter_counts_are_the_published_ones():
    predictor = on_meta(SiT, **SIT_CONFIGS["SiT-XL/2"])
    refiner = on_meta(VelocityRefiner, **SIT_CONFIGS["SiT-XL/2"] | {"depth": 1})
    assert sum(p.numel() for p in predictor.parameters()) == 675_129_632
    assert sum(p.numel() for p in refiner.parameters() if p.requires_grad) == 29_414_048  # 29.4 M


# Configurations


def test_the_config_table_holds_the_published_family():
    published = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    expected = {
        f"SiT-{name}/{p}": {"patch_size": p, "hidden_size": width, "depth": depth, "num_heads": heads}
        for name, (width, depth, heads) in published.items()
        for p in (2, 4, 8)
    }
    assert expected == SIT_CONFIGS


def test_a_model_without_keywords_is_sit_xl_2_and_a_refiner_has_one_block():
    assert on_meta(SiT).config.items() >= SIT_CONFIGS["SiT-XL/2"].items()
    refiner = on_meta(VelocityRefiner)
    assert refiner.config == {**on_meta(SiT).config, "depth": 1}


@pytest.mark.parametrize("name", SIT_CONFIGS)
def test_config_is_recovered_from_the_weights(name):
    model = on_meta(SiT, **SIT_CONFIGS[name])
    assert config_from_state(model.state_dict()) == model.config


@pytest.mark.parametrize(
    ("cls", "images_in", "kwargs"),
    [
        (VelocityRefiner, 2, {}),
        (SiT, 1, {"learn_sigma": False, "in_channels": 3, "num_classes": 7, "input_size": 16, "mlp_ratio": 2.0}),
        (VelocityRefiner, 2, {"learn_sigma": False, "in_channels": 1, "depth": 3}),
    ],
)
def test_config_is_recovered_from_other_weights(cls, images_in, kwargs):
    model = on_meta(cls, **{"hidden_size": 384, "num_heads": 6, "depth": 2, **kwargs})
    config = config_from_state(model.state_dict(), images_in)
    assert config == model.config
    assert shapes(on_meta(cls, **config)) == shapes(model)


def test_the_stored_config_rebuilds_the_model():
    model = on_meta(SiT, **SMALL | {"input_size": (8, 16), "class_dropout_prob": 0.0})
    rebuilt = on_meta(SiT, **model.config)
    assert rebuilt.config == model.config
    assert shapes(rebuilt) == shapes(model)


def test_config_of_foreign_weights_is_refused():
    with pytest.raises(ValueError, match=r"x_embedder\.proj\.weight"):
        config_from_state({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"width 32 .*1152"):
        config_from_state(on_meta(SiT, **SMALL).state_dict())
    with pytest.raises(ValueError, match="square"):
        config_from_state(on_meta(SiT, **SIT_CONFIGS["SiT-S/2"] | {"depth": 1, "input_size": (8, 16)}).state_dict())


# Behaviour


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": 3}, "8x8 .* patch_size 3"),
        ({"input_size": (8, 15)}, "8x15 .* patch_size 2"),
        ({"num_heads": 5}, "hidden_size 32 .* num_heads 5"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size 30"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SiT(**SMALL | kwargs)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8, 10), (2, 4, 16, 16), (4, 8, 8)])
def test_images_of_another_shape_are_refused(shape, predictor, refiner, batch):
    x, y = batch(2)
    wrong, t = torch.zeros(shape), torch.zeros(2)
    expected = r"expected \(N, 4, 8, 8\)"
    with pytest.raises(ValueError, match=rf"x has shape .*{expected}"):
        predictor(wrong, t, y)
    with pytest.raises(ValueError, match=rf"x has shape .*{expected}"):
        refiner(wrong, t, x, y)
    with pytest.raises(ValueError, match=rf"v has shape .*{expected}"):
        refiner(x, t, wrong, y)


def test_drop_puts_the_null_label_and_nothing_else(predictor, refiner, batch):
    x, y = batch(4)
    t = torch.rand(4)
    drop = torch.tensor([True, False, True, False])
    null = torch.where(drop, 10, y)
    with torch.no_grad():
        for network in (lambda *labels: predictor(x, t, *labels), lambda *labels: refiner(x, t, 2 * x, *labels)):
            dropped = network(y, drop)
            assert torch.equal(dropped, network(null))
            kept = (dropped == network(y)).flatten(1).all(1)
            assert torch.equal(kept, ~drop)


def test_dropping_labels_without_a_null_class_is_refused(batch):
    x, y = batch(2)
    model = SiT(**SMALL | {"class_dropout_prob": 0.0})
    assert model.y_embedder.embedding_table.weight.shape[0] == 10
    with pytest.raises(ValueError, match="no null class"):
        model(x, torch.zeros(2), y, torch.tensor([True, False]))


def test_new_networks_return_zero(batch):
    x, y = batch(2)
    t = torch.rand(2)
    assert torch.equal(SiT(**SMALL)(x, t, y), torch.zeros_like(x))
    assert torch.equal(VelocityRefiner(**SMALL | {"depth": 1})(x, t, x, y), torch.zeros_like(x))


def test_every_argument_matters(predictor, refiner, batch):
    x, y = batch(2)
    t, v = torch.full((2,), 0.3), torch.ones_like(x)
    with torch.no_grad():
        for network, args in ((predictor, (x, t, y)), (refiner, (x, t, v, y))):
            out = network(*args)
            for i, arg in enumerate(args):
                other = (arg + 1) % 10 if arg is y else arg + 0.1
                assert not torch.allclose(network(*args[:i], other, *args[i + 1 :]), out, atol=1e-4)


def test_the_refiner_sees_the_state_before_the_velocity(refiner, batch):
    x, y = batch(2)
    t, v = torch.rand(2), torch.randn_like(x)
    with torch.no_grad():
        tied = refiner.x_embedder.proj.weight[:, 4:].clone()
        refiner.x_embedder.proj.weight[:, 4:] = 0
        assert torch.equal(refiner(x, t, v, y), refiner(x, t, -v, y))
        refiner.x_embedder.proj.weight[:, 4:] = tied
        refiner.x_embedder.proj.weight[:, :4] = 0
        assert torch.equal(refiner(x, t, v, y), refiner(-x, t, v, y))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5), (3, 7)])
def test_non_square_patches_come_out_where_they_went_in(row, column, randomise):
    """Without blocks every token stands alone."""
    model = randomise(SiT(**SMALL | {"input_size": (8, 16), "depth": 0}), 3)
    x = torch.randn(1, 4, 8, 16)
    patch = (slice(None), slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
    changed = x.clone()
    changed[patch] += 1
    with torch.no_grad():
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        difference = model(changed, t, y) - model(x, t, y)
    assert difference.shape == x.shape
    assert difference[patch].abs().min() > 0
    difference[patch] = 0
    assert torch.equal(difference, torch.zeros_like(x))


def test_non_square_positions_encode_the_column_then_the_row():
    positions = sincos_positions(8, 3, 5)
    rates = torch.tensor([1.0, 10000**-0.5])
    for row, column in [(0, 0), (2, 1), (1, 4)]:
        c, r = column * rates, row * rates
        expected = torch.cat([c.sin(), c.cos(), r.sin(), r.cos()])
        torch.testing.assert_close(positions[row * 5 + column], expected, atol=1e-6, rtol=0)


def test_a_non_square_model_attends_over_all_of_its_input(randomise):
    model = randomise(SiT(**SMALL | {"input_size": (8, 16)}), 3)
    x = torch.randn(1, 4, 8, 16)
    changed = x.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        difference = model(changed, t, y) - model(x, t, y)
    assert (difference != 0).float().mean() > 0.99


def test_bf16_weights_take_float32_states(predictor, refiner, batch):
    x, y = batch(3)
    t, v = torch.tensor([0.0, 0.4, 0.99]), torch.randn_like(x)
    for network, args in ((predictor, (x, t, y)), (refiner, (x, t, v, y))):
        with torch.no_grad():
            expected = network(*args)
            out = network.bfloat16()(*args)
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_rows_of_a_batch_are_independent(predictor, batch):
    x, y = batch(3)
    t = torch.tensor([0.0, 0.4, 0.99])
    with torch.no_grad():
        together = predictor(x, t, y)
        alone = torch.cat([predictor(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# The pieces of the forward pass that a compiled sampler calls


def test_patches_are_cut_row_by_row_and_put_back(randomise):
    model = SiT(**SMALL | {"input_size": (6, 12), "patch_size": 3, "in_channels": 2})
    images = torch.randn(2, 2, 6, 12)
    patches = model.to_patches(images)
    assert patches.shape == (2, 8, 9, 2)
    for row, column in ((0, 0), (0, 3), (1, 2)):
        cut = images[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert torch.equal(patches[:, 4 * row + column], cut.flatten(2).transpose(1, 2))
    assert torch.equal(model.to_images(patches), images)


def test_images_of_another_shape_make_no_patches(predictor):
    with pytest.raises(ValueError, match=r"noise has shape \(2, 4, 4, 16\), expected \(N, 4, 8, 8\)"):
        predictor.to_patches(torch.zeros(2, 4, 4, 16))


@torch.no_grad()
def test_the_parts_of_an_evaluation_equal_the_whole(predictor, refiner, batch):
    (x, y), v = batch(3), torch.randn(3, 4, 8, 8)
    t, drop = torch.full((3,), 0.3), torch.tensor([False, True, False])
    labels = torch.where(drop, 10, y)
    for network, images in ((predictor, (x,)), (refiner, (x, v))):
        modulations = network.modulations(t, labels)
        assert modulations.shape == (3, 6 * network.config["depth"] + 2, 32)
        patches = network.transform(network.embed(*map(network.to_patches, images)), modulations)
        assert patches.shape == (3, 16, 4, 4)
        expected = network(x, t, *images[1:], y, drop)
        assert torch.equal(network.to_images(patches), expected)
        assert torch.equal(network.evaluate(images, t, y, drop), expected)


@torch.no_grad()
def test_how_a_block_is_run_can_be_chosen(predictor, batch):
    x, y = batch(2)
    seen = []

    def run(block, tokens, modulation):
        seen.append(block)
        return block(tokens, modulation)

    t = torch.full((2,), 0.3)
    assert torch.equal(predictor.evaluate((x,), t, y, run=run), predictor(x, t, y))
    assert seen == list(predictor.blocks)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 16, 32), (1, 7, 32)])
def test_attention_as_two_products_equals_the_fused_one(shape):
    attention = Attention(32, 4).double()
    tokens = torch.randn(shape, dtype=torch.float64)
    fused = attention(tokens)
    attention.fused = False
    torch.testing.assert_close(attention(tokens), fused, atol=1e-12, rtol=0)


def test_the_null_class_is_the_last_row(predictor):
    assert predictor.null_class == 10 == len(predictor.y_embedder.embedding_table.weight) - 1
    with pytest.raises(ValueError, match="no null class"):
        _ = SiT(**SMALL | {"class_dropout_prob": 0.0}).null_class
