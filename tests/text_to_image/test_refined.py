from __future__ import annotations

import diffusers
import pytest
import torch
from tiny import TRANSFORMERS, new_transformer, new_unet, random_weights

from flowturbo.text_to_image import FlowRefiner, refiner_from
from flowturbo.text_to_image.families import family_of

NAMES = list(TRANSFORMERS)
PUBLISHED = {  # millions of parameters: the network's, its refiner's
    "SD3Transformer2DModel": (2028.3, 73.9, {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
        "caption_projection_dim": 1536, "pos_embed_max_size": 192}),
    "FluxTransformer2DModel": (11901.4, 404.0, {"guidance_embeds": True}),
    "Lumina2Transformer2DModel": (2609.7, 96.7, {"hidden_size": 2304, "num_layers": 26, "cap_feat_dim": 2304}),
    "SanaTransformer2DModel": (1604.5, 124.0, {}),
    "QwenImageTransformer2DModel": (20430.4, 380.6, {}),
    "AuraFlowTransformer2DModel": (6833.4, 378.5, {}),
    "ChromaTransformer2DModel": (8900.0, 518.0, {}),
    "Flux2Transformer2DModel": (32223.3, 1798.6, {}),
    "UNet2DConditionModel": (859.5, 43.50, {"sample_size": 64, "cross_attention_dim": 768}),
}  # fmt: skip


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_networks(name):
    whole, refined, config = PUBLISHED[name]
    with torch.device("meta"):
        network = getattr(diffusers, name)(**config)
        refiner = refiner_from(network)
    assert millions(network) == pytest.approx(whole, rel=1e-3)
    assert millions(refiner) == pytest.approx(refined, rel=2e-3)


def network_named(name):
    return new_unet() if name == "UNet" else new_transformer(name)


@pytest.mark.parametrize("name", [*NAMES, "UNet"])
def test_a_new_refiner_changes_nothing_and_begins_as_the_network(name):
    network = network_named(name)
    refiner = refiner_from(network)
    family = family_of(network)
    assert refiner.fits(network)
    output = refiner.network.get_submodule(family.output)
    assert all(not parameter.any() for parameter in output.parameters())
    if name == "UNet":
        return
    seen = {}

    def keep(which):
        return lambda module, inputs, result: seen.update({which: result})

    network.get_submodule(family.input).register_forward_hook(keep("network"))
    refiner.network.get_submodule(family.input).register_forward_hook(keep("refiner"))
    x = torch.randn(2, 16, 16) if family.packed else torch.randn(2, network.config.in_channels, 8, 8)
    v = torch.randn_like(x)
    call = arguments_for(name)
    network(x, **call)
    assert not refiner(v, x, **call).any()
    torch.testing.assert_close(seen["refiner"], seen["network"])


def arguments_for(name):
    """What a transformer of the name is called with besides the states, for two rows."""
    call = {"encoder_hidden_states": torch.randn(2, 5, 16), "timestep": torch.full((2,), 0.5), "return_dict": False}
    if name in ("SD3", "Flux"):
        call["pooled_projections"] = torch.randn(2, 16)
    if name in ("Lumina2", "Sana"):
        call["encoder_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    if name in ("Flux", "Chroma", "Flux2"):
        width = 4 if name == "Flux2" else 3
        call |= {"img_ids": torch.zeros(16, width), "txt_ids": torch.zeros(5, width)}
    if name in ("Flux", "Flux2"):
        call["guidance"] = torch.ones(2)
    if name == "QwenImage":
        call["img_shapes"] = [[(1, 4, 4)]] * 2
    if name == "Chroma":
        call["attention_mask"] = torch.ones(2, 21, dtype=torch.bool)
    return call


def test_save_and_load(tmp_path):
    refiner = refiner_from(new_transformer("SD3"))
    random_weights(refiner.network, seed=3)
    refiner.save_pretrained(tmp_path, {"steps": 7})
    assert {"config.json", "diffusion_pytorch_model.safetensors", "refiner.json", "README.md"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "steps: 7" in (tmp_path / "README.md").read_text()
    loaded = FlowRefiner.from_pretrained(tmp_path)
    assert loaded.fits(new_transformer("SD3"))
    v, x, call = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), arguments_for("SD3")
    assert torch.equal(loaded(v, x, **call), refiner(v, x, **call))


def test_what_is_no_refiner_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no refiner"):
        FlowRefiner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a Linear is not one of the networks that are known"):
        refiner_from(torch.nn.Linear(2, 2))
    assert not refiner_from(new_transformer("SD3")).fits(new_transformer("Sana"))
