from __future__ import annotations

import copy

import pytest
import torch

import pipeline
from flowturbo.models import SIT_CONFIGS, SiT, config_from_state, sincos_positions
from flowturbo.refiner import VelocityRefiner
from flowturbo.transport import Guidance

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
        out = Guidance(3.0).combine(model.eval()(x, case["t"], case["y"]))
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
def test_both_branches_in_patches_equal_the_forward_pass_of_twice_the_batch(predictor, refiner, batch):
    """The state is given once, a velocity for each branch or once."""
    x, y = batch(3)
    t, v = torch.full((6,), 0.3), torch.randn(6, 4, 8, 8)
    drop = torch.arange(6) >= 3
    labels = torch.where(drop, 10, torch.cat([y, y]))
    twice = torch.cat([x, x])
    once = predictor.evaluate(predictor.modulations(t, labels), predictor.to_patches(x))
    assert once.shape == (6, 16, 4, 4)
    torch.testing.assert_close(predictor.to_images(once), predictor(twice, t, labels), atol=1e-5, rtol=1e-5)
    modulations = refiner.modulations(t, labels)
    assert modulations.shape == (6, 6 * 1 + 2, 32)
    for velocity in (v, v[:3]):
        out = refiner.evaluate(modulations, refiner.to_patches(x), refiner.to_patches(velocity))
        expected = refiner(twice, t, torch.cat([velocity] * (6 // len(velocity))), torch.cat([y, y]), drop)
        torch.testing.assert_close(refiner.to_images(out), expected, atol=1e-5, rtol=1e-5)


def test_the_null_class_is_the_last_row(predictor):
    assert predictor.null_class == 10 == len(predictor.y_embedder.embedding_table.weight) - 1
    with pytest.raises(ValueError, match="no null class"):
        _ = SiT(**SMALL | {"class_dropout_prob": 0.0}).null_class


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_changes_the_blocks_and_nothing_else(predictor, refiner, dtype):
    for network in (predictor, refiner):
        assert network.cast(dtype) is network
        dtypes = {name: value.dtype for name, value in network.named_parameters()}
        assert {d for name, d in dtypes.items() if name.startswith("blocks.")} == {dtype}
        assert {d for name, d in dtypes.items() if not name.startswith("blocks.")} == {torch.float32}
        assert not any(block.attn.fused_attn for block in network.blocks)  # slower on a CPU
        network.cast(torch.float32)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert all(block.attn.fused_attn for block in network.blocks)


def errors_in_half(network, arguments, dtype):
    """Relative errors of the output: of autocast over float32 weights, of `cast`, of all weights in half."""
    with torch.no_grad():
        exact = network(*arguments)
        with torch.autocast("cpu", dtype):
            outputs = [network(*arguments)]
        outputs.append(copy.deepcopy(network).cast(dtype)(*arguments))
        outputs.append(copy.deepcopy(network).to(dtype)(*arguments))
    assert outputs[1].dtype == torch.float32
    return [float((out.float() - exact).norm() / exact.norm()) for out in outputs]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
@pytest.mark.parametrize(("kind", "depth"), [(SiT, 4), (VelocityRefiner, 1)])
def test_cast_makes_several_times_less_error_than_autocast(kind, depth, dtype, bound, randomise, batch):
    """At weights of a network's usual size for its width."""
    network = randomise(kind(**SMALL | {"hidden_size": 128, "depth": depth}), 1, std=0.05)
    x, y = batch(16)
    arguments = (x, torch.rand(16), y) if kind is SiT else (x, torch.rand(16), torch.randn_like(x), y)
    of_autocast, of_cast, of_all = errors_in_half(network, arguments, dtype)
    assert 0 < of_cast < bound
    assert of_cast < of_autocast / 3
    assert of_cast < of_all / 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_makes_less_error_on_a_trained_network(dtype):
    """Its blocks do more than those of random networks, and make 0.6 times the error of all."""
    network = pipeline.load_network(SiT, "assets/digits-predictor.pt")
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(64, 1, 8, 8, generator=generator), torch.rand(64, generator=generator)
    of_autocast, of_cast, of_all = errors_in_half(network, (x, t, torch.arange(64) % 10), dtype)
    assert 0 < of_cast < 0.75 * of_autocast
    assert of_cast < 0.5 * of_all


def test_a_full_size_sampler_holds_at_most_1600_megabytes():
    """SiT-XL/2, its refiner and Stable Diffusion's decoder, as sampled with in bf16."""
    from diffusers import AutoencoderKL

    def held(*modules):
        return sum(p.nbytes for module in modules for p in (*module.parameters(), *module.buffers()))

    config = SIT_CONFIGS["SiT-XL/2"]
    predictor, refiner = on_meta(SiT, **config), on_meta(VelocityRefiner, **config | {"depth": 1})
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    autoencoder = on_meta(AutoencoderKL, **blocks, **widths)
    modules = predictor, refiner, autoencoder.decoder, autoencoder.post_quant_conv
    assert held(*modules) > 3e9
    for network in (predictor, refiner):
        network.cast(torch.bfloat16)
    autoencoder.to(torch.bfloat16)
    assert 1.5e9 < held(*modules) <= 1.6e9
