"""Pipelines of diffusers with tiny random components, and closed-form velocities in a transformer's place."""

from __future__ import annotations

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from flowturbo import FlowTurboScheduler

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "shift_factor": 0.0,
    "scaling_factor": 1.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TRANSFORMERS = {
    "SD3": dict(
        **HEADS, sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ),
    "Flux": dict(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    ),
    "Lumina2": dict(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=16,
    ),
    "Sana": dict(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8,
    ),
    "AuraFlow": dict(
        **HEADS, sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16,
        caption_projection_dim=16, pos_embed_max_size=64,
    ),
    "Chroma": dict(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    ),
    "Flux2": dict(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=16,
    ),
    "QwenImage": dict(
        **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
    ),
}  # fmt: skip
SCHEDULERS = {
    "SD3": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Flux": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "Lumina2": FlowMatchEulerDiscreteScheduler(shift=6.0),
    "Sana": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "AuraFlow": FlowMatchEulerDiscreteScheduler(shift=1.73),
    "Chroma": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "Flux2": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "QwenImage": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    "StableDiffusion": diffusers.PNDMScheduler(steps_offset=1),
}
PARTS = {
    "SD3": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
    "Flux": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    **dict.fromkeys(("Lumina2", "Sana", "AuraFlow", "Flux2", "QwenImage"), ("text_encoder", "tokenizer")),
    "Chroma": ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"),
    "StableDiffusion": ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
}
MASKS = {  # what a pipeline calls the mask of its prompts
    **dict.fromkeys(("Lumina2", "Sana", "AuraFlow", "Chroma"), "prompt_attention_mask"),
    "QwenImage": "prompt_embeds_mask",
}


def random_weights(network, seed=0):
    """The network with every weight drawn anew: some layers begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.25, generator=generator)
    return network.eval()


def new_transformer(name, **changes):
    return random_weights(getattr(diffusers, f"{name}Transformer2DModel")(**{**TRANSFORMERS[name], **changes}))


def new_unet(**changes):
    """Shaped as Stable Diffusion's, which InstaFlow's is."""
    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 2, "cross_attention_dim": 16,
        "attention_head_dim": 2, "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return random_weights(diffusers.UNet2DConditionModel(**{**config, **changes}))


def new_vae(channels=4, seed=0):
    return random_weights(AutoencoderKL(latent_channels=channels, **VAE), seed)


def new_pipeline(name, network=None, kind="", scheduler=None):
    """A pipeline without text encoders: the call is given embeddings. `kind` is such as "Img2Img"."""
    family = name.removesuffix("Control")
    if network is None:
        network = new_unet() if family == "StableDiffusion" else new_transformer(family)
    parts = dict.fromkeys(PARTS[family])
    parts["unet" if family == "StableDiffusion" else "transformer"] = network
    with_vae = family in ("SD3", "Flux", "Lumina2", "StableDiffusion")
    parts["vae"] = new_vae(16 if family == "SD3" else 4) if with_vae else None
    parts["scheduler"] = scheduler or SCHEDULERS[family]
    more = {"requires_safety_checker": False} if family == "StableDiffusion" else {}
    names = {"SD3": "StableDiffusion3"}
    pipe = getattr(diffusers, f"{names.get(family, family)}{kind}Pipeline")(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_for(name, rows=1, negative=True):
    """Embeddings in place of prompts, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(rows, *shape, generator=generator)

    wanted = {"prompt_embeds": (5, 16)}
    if name in ("SD3", "Flux"):
        wanted["pooled_prompt_embeds"] = (16,)
    found = {key: draw(*shape) for key, shape in wanted.items()}
    if negative:
        found |= {f"negative_{key}": draw(*shape) for key, shape in wanted.items()}
    if name == "Sana":
        found["negative_prompt"] = None  # its default is a text
    if mask := MASKS.get(name):
        for key in [key for key in found if key.endswith("prompt_embeds")]:
            found[key.replace("prompt_embeds", mask)] = torch.ones(rows, 5, dtype=torch.bool)
    return found


class ClosedForm(nn.Module):
    """The exact velocity of Gaussian data, whose pixels are correlated, behind the signature of SD3's transformer.

    `first` is the state that it was evaluated at first, with its sigma.
    """

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.config = new_transformer("SD3").config
        generator = torch.Generator().manual_seed(5)
        self.basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
        self.s = torch.linspace(0.4, 1.3, 64, dtype=torch.float64)
        self.first = None

    def forward(self, hidden_states, timestep, return_dict=False, **_):
        sigma = float(timestep[0]) / 1000
        if self.first is None:
            self.first = hidden_states, sigma
        slope = (sigma - (1 - sigma) * self.s**2) / ((1 - sigma) ** 2 * self.s**2 + sigma**2)
        return (self._scaled(hidden_states, slope),)

    def flow(self, x, sigma=1.0):
        """Where the state x at sigma ends."""
        return self._scaled(x, self.s / ((1 - sigma) ** 2 * self.s**2 + sigma**2) ** 0.5)

    def _scaled(self, x, factor):
        return (((x.flatten(2) @ self.basis) * factor) @ self.basis.T).reshape(x.shape)


# What each pipeline is called with for latents of 8x8, and the latents' own shape.
CALLS = {
    "SD3": ({"height": 16, "width": 16, "guidance_scale": 3.0}, (16, 8, 8)),
    "Flux": ({"height": 16, "width": 16, "guidance_scale": 3.0}, (16, 16)),
    "Lumina2": ({"height": 64, "width": 64, "guidance_scale": 3.0}, (4, 8, 8)),
    "Sana": ({"height": 256, "width": 256, "guidance_scale": 3.0, "use_resolution_binning": False}, (4, 8, 8)),
    "AuraFlow": ({"height": 64, "width": 64, "guidance_scale": 3.0}, (4, 8, 8)),
    "Chroma": ({"height": 64, "width": 64, "guidance_scale": 3.0}, (16, 16)),
    "Flux2": ({"height": 64, "width": 64, "guidance_scale": 3.0}, (16, 16)),
    "QwenImage": ({"height": 64, "width": 64, "true_cfg_scale": 3.0}, (16, 16)),
    "StableDiffusion": ({"height": 16, "width": 16, "guidance_scale": 3.0}, (4, 8, 8)),
}
NAMES = list(CALLS)
BRANCHES = dict.fromkeys(("Lumina2", "Chroma", "QwenImage"), 2)  # calls of the network at an evaluation, if not one


def noise_for(name, rows=1, dtype=torch.float32):
    return torch.randn(rows, *CALLS[name][1], generator=torch.Generator().manual_seed(3), dtype=dtype)


def run(name, pipe, latents, steps, **more):
    """The latents at the end of a text-to-image call."""
    prompt = prompt_for(name, len(latents), negative=name not in ("Flux", "Flux2") or "true_cfg_scale" in more)
    prompt = {key: value.to(latents) if "embeds" in key else value for key, value in prompt.items()}
    if name == "Flux2":  # it packs latents that it is given
        latents = latents.mT.unflatten(2, (4, 4))
    settings = {**CALLS[name][0], **prompt, "latents": latents, "num_inference_steps": steps, **more}
    return pipe(output_type="latent", **settings).images


class Probe(FlowMatchEulerDiscreteScheduler):
    """One evaluation at `sigma`; the pipeline's "latents" are then its velocity, guided as that pipeline does it."""

    sigma, init_noise_sigma = 1.0, 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.timesteps = 1000 * torch.tensor([self.sigma])  # rounded as FlowTurboScheduler's
        self.sigmas = torch.tensor([self.sigma, 0.0])
        self._step_index = self._begin_index = None

    def step(self, model_output, timestep, sample, return_dict=False, **_):
        return (model_output,)

    def scale_model_input(self, sample, timestep):
        return sample


def velocity_of(name, pipe, sign=1, **more):
    """The velocity dx/dsigma (x, sigma) that a pipeline computes."""
    probe = Probe()

    def velocity(x, sigma):
        before, pipe.scheduler, probe.sigma = pipe.scheduler, probe, sigma
        try:
            return sign * run(name, pipe, x, 1, **more)
        finally:
            pipe.scheduler = before

    return velocity


def turbo(pipe, schedule=None, **settings):
    """The pipeline with FlowTurbo's scheduler."""
    pipe.scheduler = FlowTurboScheduler.from_config(pipe.scheduler.config, schedule=schedule, **settings)
    return pipe


def assert_equal(found, reference):
    """To 1e-5 of the largest value: the tiny networks' answers are not all of size 1."""
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max().clamp(min=1)))
