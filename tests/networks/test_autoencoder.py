import json
import os
from types import SimpleNamespace

import pytest
import torch

from flowturbo.models import SiT
from flowturbo.networks.autoencoder import ALIASES, Autoencoder, NoAutoencoder, load_autoencoder
from flowturbo.sampling.generate import check_match
from flowturbo.system import cli
from flowturbo.system.advice import advice_for
from flowturbo.weights.cache import MissingWeights


@pytest.fixture(scope="module")
def network(vae_folder):
    """diffusers' own, for comparison."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(vae_folder).eval()


@pytest.fixture(scope="module")
def autoencoder(vae_folder):
    return load_autoencoder(str(vae_folder))


IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_config_says_scale_shift_channels_and_factor(autoencoder):
    assert (autoencoder.scale, autoencoder.shift, autoencoder.channels, autoencoder.factor) == (0.7, 0.3, 4, 2)
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert not autoencoder.network.training


@torch.no_grad()
def test_latents_are_diffusers_posterior_scaled(autoencoder, network):
    posterior = network.encode(IMAGES).latent_dist
    moments = autoencoder.moments(IMAGES)
    assert moments.shape == (3, 8, 8, 8)
    noise = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(autoencoder.sample(moments, torch.zeros_like(noise)), (posterior.mean - 0.3) * 0.7)
    latents = autoencoder.sample(moments, noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - 0.3) * 0.7)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(autoencoder.sample(moments.double(), noise), latents)


def test_extreme_variances_are_clamped_as_in_diffusers(autoencoder):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.tensor([-1000.0, -31, 19, 1000]).reshape(1, 4, 1, 1)], 1)
    std = DiagonalGaussianDistribution(moments).std
    drawn = autoencoder.sample(moments, torch.ones(1, 4, 1, 1)) / 0.7 + 0.3
    torch.testing.assert_close(drawn, std, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_decoding_takes_the_scale_back(autoencoder, network):
    latents = torch.randn(2, 4, 8, 8)
    images = autoencoder.decode(latents)
    torch.testing.assert_close(images, network.decode(latents / 0.7 + 0.3).sample)
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.float32)


def test_half_precision_stays_inside(vae_folder, autoencoder):
    half = load_autoencoder(str(vae_folder), dtype=torch.bfloat16)
    latents = half.sample(half.moments(IMAGES), torch.zeros(3, 4, 8, 8))
    assert (latents.dtype, half.decode(latents).dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(
        latents, autoencoder.sample(autoencoder.moments(IMAGES), torch.zeros(3, 4, 8, 8)), atol=0.1, rtol=0.1
    )


def test_stable_diffusions_has_its_well_known_numbers():
    """From the class's defaults: neither shift nor another scale."""
    from diffusers import AutoencoderKL

    wide = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    autoencoder = Autoencoder(AutoencoderKL(**wide, **blocks))
    assert (autoencoder.scale, autoencoder.shift, autoencoder.channels, autoencoder.factor) == (0.18215, 0, 4, 8)


def test_none_is_the_identity_in_every_call():
    none = load_autoencoder("none")
    assert isinstance(none, NoAutoencoder)
    assert (none.channels, none.factor) == (None, 1)
    for call in (none.moments, none.decode, lambda x: none.sample(x, None)):
        assert call(IMAGES) is IMAGES


def test_names_lead_to_their_sources(monkeypatch):
    import diffusers

    asked = []
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "from_pretrained", lambda source, **_: asked.append(source) or exec("raise OSError")
    )
    for name in ("vae-ema", "vae-mse", "someone/something"):
        with pytest.raises(MissingWeights, match="a local one is the folder of an AutoencoderKL") as caught:
            load_autoencoder(name)
        assert "pass a local path with --vae-ckpt" in advice_for(caught.value)
    assert asked == ["stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse", "someone/something"]
    assert set(ALIASES) == {"vae-ema", "vae-mse"}


@pytest.mark.parametrize("name", ["vae", "", "./missing", "/missing/folder", "~/vae", "a/b/c", "vae_ema"])
def test_an_unknown_name_is_refused_without_asking_the_network(name):
    with pytest.raises(ValueError, match=r"is neither a folder, an alias \(vae-ema, vae-mse\)") as caught:
        load_autoencoder(name)
    assert "\n" not in str(caught.value)


def damage(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"_class_name": "AutoencoderKL", "block_out_channels": [6], "norm_num_groups": 4}'),
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.safetensors", b""),
        ("diffusion_pytorch_model.safetensors", b"\x08" + bytes(7) + b"garbage!" * 4),
    ],
)
def test_a_damaged_folder_is_named_on_one_line(vae_folder, tmp_path, name, content):
    for file in vae_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path, name, content)
    with pytest.raises(ValueError, match=f"cannot load autoencoder {tmp_path}") as caught:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "hub" not in str(caught.value).split(":", 1)[0]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layers_per_block", 2000, "its layers_per_block is 2000, expected 1 to 64"),
        ("layers_per_block", [2], "its layers_per_block is .*, expected a whole number"),
        ("block_out_channels", None, "NoneType"),
        ("block_out_channels", "abc", ""),
        ("scaling_factor", "x", "could not convert"),
        ("scaling_factor", 0, "scaling_factor 0.0 and shift_factor 0.3: expected numbers"),
        ("shift_factor", 1e999, "shift_factor inf"),
    ],
)
def test_an_odd_config_is_named(vae_folder, tmp_path, setting, value, message):
    for file in vae_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(ValueError, match=f"^cannot load autoencoder {tmp_path}: .*{message}"):
        load_autoencoder(str(tmp_path))


def test_pipes_and_pickles_in_a_folder_are_refused(vae_folder, tmp_path):
    for file in vae_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bad = tmp_path / "diffusion_pytorch_model.bin"
    bad.write_bytes(b"\x80\2c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R.")
    with pytest.raises(ValueError, match=r"cannot load autoencoder .*: __builtin__\.bytearray, expected tensors"):
        load_autoencoder(str(tmp_path))
    bad.unlink()
    os.mkfifo(bad)
    with pytest.raises(ValueError, match=r"cannot load autoencoder .*: '.*\.bin' is no file"):
        load_autoencoder(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_offline_says_what_to_pass(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FLOWTURBO_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights) as caught:
        load_autoencoder("vae-ema")
    text = cli.one_line(caught.value) + advice_for(caught.value)
    assert text.startswith("autoencoder stabilityai/sd-vae-ft-ema is not in the hub's local cache")
    assert "get it with `python download.py vae-ema` (from huggingface.co)" in text
    assert text.endswith("with --vae-ckpt")
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("channels", "wrong"), [(4, None), (3, "the autoencoder has 4 latent channels")])
def test_autoencoder_and_predictor_must_fit(autoencoder, channels, wrong):
    predictor = SiT(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=2, in_channels=channels)
    if wrong:
        with pytest.raises(ValueError, match=wrong):
            check_match(predictor, None, autoencoder)
    else:
        check_match(predictor, None, autoencoder)
        with pytest.raises(ValueError, match="vae_ckpt 'none' is for models of 1 or 3 channels"):
            check_match(predictor, None, NoAutoencoder())


def test_convolutions_have_their_channels_last(autoencoder, network):
    """The faster format; diffusers' own holds the weights as the file does."""
    weights = [m.weight for m in autoencoder.network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not network.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("is_cuda", [False, True])
def test_the_decoder_is_compiled_on_cuda_alone(is_cuda):
    options = []
    network = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(is_cuda=is_cuda)]),
        decoder=SimpleNamespace(compile=lambda **given: options.append(given)),
    )
    Autoencoder.compile(SimpleNamespace(network=network))
    assert options == ([{"dynamic": False}] if is_cuda else [])
    load_autoencoder("none").compile()
