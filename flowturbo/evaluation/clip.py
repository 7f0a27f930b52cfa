"""The CLIP score: how well images fit their captions.

Source: Hessel et al., "CLIPScore", 2021; without its factor of 2.5, as most tables have it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from flowturbo.evaluation.sources import ImageArchive, ImageFolder


class ClipScorer:
    """100·max(cos, 0) between CLIP's embeddings of an image and of a caption.

    `folder` holds a CLIP as transformers saves it: weights, tokenizer and image processor. Nothing is downloaded.
    Raises ValueError for a folder that holds none, and without transformers.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device | str = "cpu"):
        if find_spec("transformers") is None:
            raise ValueError("the CLIP score needs transformers, which is not installed")
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"folder {os.fspath(folder)!r} holds no CLIP: expected config.json, as transformers saves it"
            )
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.network = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        except (OSError, TypeError) as error:  # what transformers raises where files are missing
            raise ValueError(f"folder {os.fspath(folder)!r} holds no whole CLIP: {error}") from None
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The scores (N,), 0 to 100, of uint8 images (N, 3, H, W) and their captions; long captions are cut."""
        pixels = self.processor(list(images.cpu()), return_tensors="pt")
        length = self.network.config.text_config.max_position_embeddings
        texts = self.tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        found = self.network(**{name: value.to(self.device) for name, value in {**pixels, **texts}.items()})
        embeddings = [torch.nn.functional.normalize(e.float(), dim=-1) for e in (found.image_embeds, found.text_embeds)]
        return 100 * (embeddings[0] * embeddings[1]).sum(-1).clamp(min=0).cpu()


def clip_scores(
    images: ImageArchive | ImageFolder, captions: Sequence[str], scorer: ClipScorer, batch_size: int = 50
) -> Tensor:
    """The scores (N,) of a set of samples; image i has caption i, and again from the first where there are fewer."""
    found: list[Tensor] = []
    first = 0
    for block in images.batches(batch_size):
        texts = [captions[(first + k) % len(captions)] for k in range(len(block))]
        found.append(scorer(torch.from_numpy(block).permute(0, 3, 1, 2), texts))
        first += len(block)
    return torch.cat(found)
