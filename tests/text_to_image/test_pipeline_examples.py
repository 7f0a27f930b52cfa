"""The examples, each as a user would run it, on tiny pipelines saved on the spot; prompts become fixed embeddings."""

from __future__ import annotations

import runpy
from pathlib import Path

import diffusers
import pytest
from PIL import Image
from tiny import new_pipeline, prompt_for

from flowturbo.text_to_image import refiner_from
from flowturbo.text_to_image.families import network_of
from flowturbo.text_to_image.pipelines import load_pipeline

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def embeddings(name):
    """What the pipeline's encode_prompt returns, in its order."""
    found = prompt_for(name)
    order = {
        "SD3": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        "Flux": ("prompt_embeds", "pooled_prompt_embeds"),
        "StableDiffusion": ("prompt_embeds", "negative_prompt_embeds"),
    }[name]
    more = [found["prompt_embeds"].new_zeros(5, 3)] if name == "Flux" else []
    return (*(found[key] for key in order), *more)


@pytest.mark.parametrize(
    ("example", "name", "with_refiner", "arguments"),
    [
        ("sd3", "SD3", False, []),
        ("sd3", "SD3", True, []),
        ("flux", "Flux", False, ["--steps", "3", "--solver", "M"]),
        ("instaflow", "StableDiffusion", False, []),
        ("instaflow", "StableDiffusion", True, []),
    ],
)
def test_example(example, name, with_refiner, arguments, tmp_path, monkeypatch):
    pipe = new_pipeline(name)
    pipe.save_pretrained(tmp_path / "pipeline")
    if with_refiner:
        refiner_from(network_of(pipe)).save_pretrained(tmp_path / "refiner")
        arguments = [*arguments, "--refiner", str(tmp_path / "refiner")]

    loaded = load_pipeline(str(tmp_path / "pipeline"))

    def load(folder, **_):
        assert folder == str(tmp_path / "pipeline")
        loaded.encode_prompt = lambda *args, **kwargs: embeddings(name)
        loaded.set_progress_bar_config(disable=True)
        if name == "Flux":
            loaded.default_sample_size = 8
        return loaded

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", load)
    main = runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]
    main(["a fox", "--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out.png"), *arguments])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (16, 16)
