"""Sets of a pipeline's images of captions, for evaluation, on any number of ranks: as sets of classes are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowturbo.evaluation import load_extractor
from flowturbo.networks.precision import pick_precision
from flowturbo.sampling.options import SetOptions
from flowturbo.sampling.sample_folder import SampleFolder
from flowturbo.sampling.sample_set import SampleSet, Summary, carry_out, threads
from flowturbo.system.distributed import World
from flowturbo.text_to_image.options import TextSamplingOptions
from flowturbo.text_to_image.pipelines import fingerprint
from flowturbo.text_to_image.refined import FlowRefiner
from flowturbo.text_to_image.sampling import Row, TextSampler, open_pipeline


@dataclass(frozen=True)
class CaptionSet(SampleSet):
    """A set in the making; a sample's label is the number of its caption."""

    captions: tuple[str, ...] = ()

    def _classes(self, k: int) -> list[int]:
        return [number % len(self.captions) for number in self.folder.numbers(k)]

    def _conditions(self, k: int) -> list[str]:
        return [self.captions[label] for label in self._classes(k)]


@torch.no_grad()
def make_caption_set(
    options: SetOptions,
    captions: tuple[str, ...],
    sampling: TextSamplingOptions,
    ranks: World,
    say: Callable[[str], object] = print,
) -> Summary:
    """Sample a set, or go on with one; rank 0 writes archive, features and preview.

    Raises OtherSettings where the folder was made otherwise, and ValueError as the pipeline's loading does.
    """
    say = say if ranks.is_main else lambda _: None
    row = Row.parse(options.schedule)
    with threads(options.threads):
        dtype = pick_precision(sampling.precision, ranks.device)
        pipe = open_pipeline(sampling, ranks.device, dtype)
        refiner = FlowRefiner.from_pretrained(sampling.refiner) if sampling.refiner else None
        sampler = TextSampler(pipe, row, sampling, refiner)
        extractor = (
            load_extractor(options.features, ranks.device, options.features_weights) if options.features else None
        )
        name = options.tag or f"{Path(sampling.pipeline).name}-{row.name}-seed{sampling.seed}"
        folder = SampleFolder(Path(options.sample_dir) / name, options.num_fid_samples, options.per_proc_batch_size)
        made = CaptionSet(options, sampling.seed, sampler, extractor, folder, ranks, captions)
        shaping = {
            key: value for key, value in asdict(sampling).items() if key not in ("batch_size", "device", "offload")
        }
        record: dict[str, Any] = {
            **shaping,
            "schedule": row.name,
            "num_fid_samples": options.num_fid_samples,
            "per_proc_batch_size": options.per_proc_batch_size,
            "png": options.png,
            "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
            "network": fingerprint(pipe, network=True),
            "refiner_network": None if refiner is None else fingerprint(refiner),
            "device": ranks.device.type,
            "threads": options.threads if ranks.device.type == "cpu" else None,
            "precision": str(dtype),
            "features": extractor.identity if extractor is not None else None,
        }
        return carry_out(made, record, say)
