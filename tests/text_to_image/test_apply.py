from __future__ import annotations

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny import (
    BRANCHES,
    NAMES,
    assert_equal,
    new_pipeline,
    new_transformer,
    noise_for,
    prompt_for,
    random_weights,
    run,
    velocity_of,
)

from flowturbo import Schedule
from flowturbo.networks.calls import CallCounter
from flowturbo.text_to_image import apply_flowturbo, refiner_from, remove_flowturbo
from flowturbo.text_to_image.families import network_of
from flowturbo.transport.blocks import REFINER_STEPS, integrate


def settings_for(name):
    return {"velocity": "data-noise"} if name == "StableDiffusion" else {}


def new_refiner(pipe):
    refiner = refiner_from(network_of(pipe))
    random_weights(refiner.network, seed=9)
    return refiner


def expected(name, pipe, refiner, steps, latents, **more):
    """What transport makes of the pipeline's guided velocity, its branches refined one by one, not guided."""
    network, told, alive = network_of(pipe), {}, []
    original = network.forward
    sign = -1 if name == "StableDiffusion" else 1

    def guided(x, sigma, answer):
        calls = []

        def forward(*args, **kwargs):
            args, states = (args[1:], args[0]) if args else (args, kwargs.pop("hidden_states"))
            calls.append(answer(len(calls), states, args, kwargs))
            return (calls[-1],)

        network.forward = forward
        v = velocity_of(name, pipe, sign, **more)(x, sigma)
        network.forward = original
        alive.append(v)
        told[id(v)] = calls
        return v

    def velocity(x, sigma):
        return guided(x, sigma, lambda k, states, args, kwargs: original(states, *args, **kwargs)[0])

    def refine(x, sigma, seen, base):
        def answer(k, states, args, kwargs):
            return told[id(base)][k] + refiner(told[id(seen)][k], states, *args, **kwargs)

        return guided(x, sigma, answer)

    x = latents
    for state in integrate(steps, x, velocity, refine):
        x = state.x
    return x


@pytest.mark.parametrize(
    ("name", "schedule", "refiner_step", "more"),
    [
        *((name, "H1P3R2", "single", {}) for name in NAMES),
        ("SD3", "H1P1R1P1R2", "single", {}),
        *(("SD3", "H1P2R2", form, {}) for form in REFINER_STEPS if form != "single"),
        ("SD3", "H1P3R2", "single", {"guidance_scale": 1.0}),
        ("Flux", "H1P3R2", "single", {"true_cfg_scale": 2.0}),
    ],
)
def test_refiner_blocks_equal_transport(name, schedule, refiner_step, more):
    pipe, latents = new_pipeline(name), noise_for(name)
    refiner = new_refiner(pipe)
    scheduler = apply_flowturbo(pipe, refiner, schedule, refiner_step, **settings_for(name))
    with CallCounter(refiner) as of_refiner:
        found = run(name, pipe, latents, scheduler.evaluations, **more)
    again = run(name, pipe, latents, scheduler.evaluations, **more)
    calls = 2 if "true_cfg_scale" in more else BRANCHES.get(name, 1)
    assert of_refiner.count == calls * Schedule.parse(schedule).evaluations(refiner_step)[1]
    assert torch.equal(found, again)  # nothing of a call is left for the next one
    remove_flowturbo(pipe)
    steps = Schedule.parse(schedule).plan(refiner_step, scheduler._grid)
    reference = expected(name, pipe, refiner, steps, latents, **more)
    assert_equal(found, reference)
    assert not torch.allclose(found, run_without_refinement(name, schedule, refiner_step, more), atol=1e-3)


def run_without_refinement(name, schedule, refiner_step, more):
    """With a refiner that answers zero, as new ones do."""
    pipe = new_pipeline(name)
    scheduler = apply_flowturbo(pipe, refiner_from(network_of(pipe)), schedule, refiner_step, **settings_for(name))
    return run(name, pipe, noise_for(name), scheduler.evaluations, **more)


def test_predictor_and_refiner_share_the_evaluations():
    pipe = new_pipeline("SD3")
    refiner = new_refiner(pipe)
    calls = []
    original = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    with CallCounter(refiner) as of_refiner:
        run("SD3", pipe, noise_for("SD3"), scheduler.evaluations)
    assert (len(calls), of_refiner.count) == (5, 2)


def test_remove_leaves_the_pipeline_as_it_was():
    pipe, latents = new_pipeline("SD3"), noise_for("SD3")
    before, scheduler = run("SD3", pipe, latents, 4), pipe.scheduler
    for _ in range(2):  # the second takes the place of the first
        apply_flowturbo(pipe, new_refiner(pipe), "H1P3R2")
    assert pipe.scheduler is not scheduler
    remove_flowturbo(pipe)
    remove_flowturbo(pipe)
    assert pipe.scheduler is scheduler
    assert torch.equal(run("SD3", pipe, latents, 4), before)


def test_image_to_image_may_begin_among_the_refiner_blocks():
    pipe = new_pipeline("SD3", kind="Img2Img")
    refiner = new_refiner(pipe)
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R3")
    for strength, of_refiner in ((1.0, 3), (0.6, 3), (0.3, 2)):
        with CallCounter(refiner) as calls:
            pipe(
                image=torch.zeros(1, 3, 16, 16), strength=strength, num_inference_steps=scheduler.evaluations,
                output_type="latent", **prompt_for("SD3"),
            )  # fmt: skip
        assert calls.count == of_refiner


@pytest.mark.slow
def test_compiled_networks_stay_compiled():
    """One graph of the transformer, whatever the evaluation; the hook itself is not traced."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    pipe, latents = new_pipeline("SD3"), noise_for("SD3")
    refiner = new_refiner(pipe)
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    eager = run("SD3", pipe, latents, scheduler.evaluations)
    torch.compiler.reset()
    pipe.transformer.compile(backend=backend)
    with torch.no_grad():
        compiled = run("SD3", pipe, latents, scheduler.evaluations)
        first = len(graphs)
        run("SD3", pipe, latents, scheduler.evaluations)
    assert 1 <= first == len(graphs) <= 4
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_what_does_not_go_together_is_refused():
    pipe = new_pipeline("SD3")
    refiner = new_refiner(pipe)
    with pytest.raises(ValueError, match="has R blocks: they need a refiner"):
        apply_flowturbo(pipe, None, "H1P3R2")
    with pytest.raises(ValueError, match="is not one of this SD3Transformer2DModel"):
        apply_flowturbo(pipe, refiner_from(new_transformer("Sana")), "H1P3R2")
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    with pytest.raises(ValueError, match="skip_layers"):
        run(
            "SD3", pipe, noise_for("SD3"), scheduler.evaluations, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0
        )
    run("SD3", pipe, noise_for("SD3"), scheduler.evaluations)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)  # the hook follows the one before
    with pytest.raises(ValueError, match="another scheduler"):
        run("SD3", pipe, noise_for("SD3"), scheduler.evaluations)


def test_a_distilled_model_is_warned_of():
    pipe = new_pipeline("Flux")
    pipe.transformer.register_to_config(_name_or_path="org/flux-schnell")
    with pytest.warns(UserWarning, match="few steps of its own"):
        apply_flowturbo(pipe, schedule="H1P3")


def test_lora_goes_on_working(tmp_path):
    """Loaded before or after, through the pipeline's own files; its refiner begins as the network without it."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe, latents = new_pipeline("SD3"), noise_for("SD3")
    refiner = new_refiner(pipe)
    torch.manual_seed(0)
    begun = refiner_from(network_of(pipe)).state_dict()
    pipe.transformer.add_adapter(settings)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer))
    torch.manual_seed(0)
    assert all(torch.equal(value, begun[name]) for name, value in refiner_from(network_of(pipe)).state_dict().items())
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    before = run("SD3", pipe, latents, scheduler.evaluations)

    pipe = new_pipeline("SD3")
    apply_flowturbo(pipe, refiner, "H1P3R2")
    plain = run("SD3", pipe, latents, scheduler.evaluations)
    pipe.load_lora_weights(tmp_path)
    after = run("SD3", pipe, latents, scheduler.evaluations)
    pipe.unload_lora_weights()
    torch.testing.assert_close(after, before)
    assert not torch.allclose(after, plain, atol=1e-3)
    torch.testing.assert_close(run("SD3", pipe, latents, scheduler.evaluations), plain)


@pytest.mark.parametrize("first", ["offload", "refiner"])
def test_offloaded_networks_are_refined(first):
    """accelerate's hooks, which hold the weights of a network elsewhere until it is called."""
    import accelerate

    pipe, latents = new_pipeline("SD3"), noise_for("SD3")
    refiner = new_refiner(pipe)
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    expected = run("SD3", pipe, latents, scheduler.evaluations)
    remove_flowturbo(pipe)
    if first == "refiner":
        apply_flowturbo(pipe, refiner, "H1P3R2")
    for network in (pipe.vae, pipe.transformer):  # as the pipeline's enable_sequential_cpu_offload does it
        accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in pipe.transformer.parameters())
    if first == "offload":
        apply_flowturbo(pipe, refiner, "H1P3R2")
    with CallCounter(refiner) as calls:
        found = run("SD3", pipe, latents, scheduler.evaluations)
    assert calls.count == 2
    torch.testing.assert_close(found, expected)


def test_caches_of_diffusers_are_refused():
    pipe = new_pipeline("Flux")
    refiner, cache = new_refiner(pipe), FirstBlockCacheConfig(threshold=0.1)
    scheduler = apply_flowturbo(pipe, refiner, "H1P3R2")
    pipe.transformer.enable_cache(cache)
    with pytest.raises(ValueError, match="a cache of diffusers is enabled on the network"):
        run("Flux", pipe, noise_for("Flux"), scheduler.evaluations)
    remove_flowturbo(pipe)
    with pytest.raises(ValueError, match="a cache of diffusers is enabled on the network"):
        apply_flowturbo(pipe, refiner, "H1P3R2")
    apply_flowturbo(pipe, schedule="A4")  # without R a cache may stay
    pipe.transformer.disable_cache()
    apply_flowturbo(pipe, refiner, "H1P3R2")
