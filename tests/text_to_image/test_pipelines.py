"""What pipelines make of images and prompts, as training takes it, against the pipelines' own code."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import new_pipeline, random_weights

from flowturbo.text_to_image.families import FAMILIES, pack
from flowturbo.text_to_image.pipelines import encode_images, latent_shape, shift_of

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_of_flux2():
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    vae = random_weights(
        diffusers.AutoencoderKLFlux2(**blocks, layers_per_block=1, latent_channels=4, norm_num_groups=2)
    )
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    pipe = new_pipeline("Flux2")
    pipe.register_modules(vae=vae)
    found = encode_images(pipe, IMAGES)
    torch.testing.assert_close(pack(found), pipe._pack_latents(pipe._encode_vae_image(IMAGES, None)))


def test_latents_of_qwen_image():
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    )  # fmt: skip
    pipe = new_pipeline("QwenImage")
    pipe.register_modules(vae=random_weights(vae))
    found = encode_images(pipe, IMAGES)
    assert found.shape == (2, 4, 8, 8)
    like = SimpleNamespace(vae=pipe.vae, latent_channels=4)  # the editing pipeline takes the mode too
    expected = diffusers.QwenImageEditPipeline._encode_vae_image(like, IMAGES[:, :, None], None)
    torch.testing.assert_close(found, expected[:, :, 0])


def test_prompts_of_qwen_image_have_one_length():
    family = FAMILIES["QwenImageTransformer2DModel"]
    for tokens, mask in ((7, None), (300, torch.ones(1, 300))):
        pipe = SimpleNamespace(encode_prompt=lambda prompts, n=tokens, mask=mask: (torch.ones(1, n, 4), mask))
        states, counts = family.encode(pipe, ["a"])
        assert states.shape == (1, 256, 4)
        assert counts.shape == (1, 256)
        assert int(counts.sum()) == int(states[..., 0].sum()) == min(tokens, 256)


@pytest.mark.parametrize("name", ["SD3", "Sana", "Flux"])
def test_shifts_are_the_schedulers(name):
    pipe = new_pipeline(name)
    size = (64, 64) if pipe.vae is None else (64 * pipe.vae_scale_factor, 64 * pipe.vae_scale_factor)
    assert latent_shape(pipe, size)[1:] == (64, 64)
    found = shift_of(pipe, size)
    # FLUX's mu lies on the line from 0.5 at 256 tokens to 1.15 at 4096: 1024 tokens here.
    expected = 3.0 if name != "Flux" else float(torch.tensor(0.5 + 0.65 * 768 / 3840).exp())
    assert found == pytest.approx(expected)
