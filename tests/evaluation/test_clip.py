"""The CLIP score, with a tiny random CLIP saved on the spot."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluator
from flowturbo.evaluation.clip import ClipScorer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Characters are tokens: no merges."""
    place = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(place).save_pretrained(place)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(tokens), "max_position_embeddings": 12},
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(place)
    square = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square).save_pretrained(place)
    return place


def test_scores_are_cosines_of_embeddings(folder):
    scorer = ClipScorer(folder)
    images = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    captions = ["a cat", "dogs", "a caption that is cut where the network ends"]
    found = scorer(images, captions)
    assert found.shape == (3,)
    assert 0 <= float(found.min()) <= float(found.max()) <= 100
    for k in range(3):  # neither the batch nor its padding matters
        torch.testing.assert_close(
            scorer(images[k : k + 1], captions[k : k + 1]), found[k : k + 1], rtol=1e-3, atol=1e-3
        )
    other = scorer(images, captions[1:] + captions[:1])
    assert not torch.allclose(other, found, atol=1e-2)


def test_evaluator_prints_the_score_of_an_archive(folder, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    (tmp_path / "prompts.txt").write_text("a cat\n\ndogs\n")
    command = ["clip", str(tmp_path / "samples.npz"), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    evaluator.main([*command, "--clip", str(folder)])
    said = capsys.readouterr().out
    rows = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    expected = ClipScorer(folder)(rows, ["a cat", "dogs", "a cat", "dogs", "a cat"])
    assert f"CLIP score {float(expected.mean()):.3f} ± " in said
    assert "(N = 5, 2 captions)" in said
    with pytest.raises(ValueError, match=r"holds no CLIP: expected config\.json"):
        evaluator.main([*command, "--clip", str(tmp_path)])
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no captions: expected one a line"):
        evaluator.main([*command, "--clip", str(folder)])
