"""Sets of samples for evaluation, on any number of ranks: image i depends on the seed and i alone.

Interrupted, the same call goes on; only what is missing is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowturbo.data.pictures import grid, save_png, to_pil
from flowturbo.data.randomness import Stream, keyed_generator
from flowturbo.evaluation import Extractor, FeatureSet, GaussianStatistics, load_extractor
from flowturbo.networks.precision import pick_precision
from flowturbo.sampling.generate import Files, ImageSampler, find_files, load_networks
from flowturbo.sampling.options import NetworkOptions, SamplingOptions, SetOptions
from flowturbo.sampling.sample_folder import SampleFolder, Stored
from flowturbo.sampling.solvers import LearnedSolver, check_made_for, parse_sampler
from flowturbo.system.cli import warn
from flowturbo.system.code import made_by
from flowturbo.system.distributed import World
from flowturbo.system.files import exclusive, sha256

PREVIEW = 64  # images in the preview grid


class Summary(NamedTuple):
    """What a run leaves: its files, and the sampling time of this process (0 where nothing was left to do)."""

    archive: Path
    features: Path
    ms_per_image: float


@torch.no_grad()
def make_sample_set(
    options: SetOptions,
    network_options: NetworkOptions,
    sampling: SamplingOptions,
    ranks: World,
    say: Callable[[str], object] = print,
) -> Summary:
    """Sample a set, or go on with one; rank 0 writes archive, features and preview. `say` is told what came of it.

    Raises OtherSettings where the folder was made otherwise, MissingWeights, and ValueError as ImageSampler does.
    """
    say = say if ranks.is_main else lambda _: None
    spec = parse_sampler(options.schedule)
    files = find_files(network_options, spec.needs_refiner)
    check_made_for(spec, files.predictor, sampling.guidance, sampling.strict, warn if ranks.is_main else lambda _: None)
    with threads(options.threads):
        networks = load_networks(network_options, files, ranks.device, say)
        extractor = (
            load_extractor(options.features, ranks.device, options.features_weights) if options.features else None
        )
        settings = sampling.settings(networks.path_type, networks.refiner_step)
        sampler = ImageSampler(networks, spec, settings, network_options.compile)
        folder = SampleFolder(options.folder(sampling), options.num_fid_samples, options.per_proc_batch_size)
        sample_set = SampleSet(options, sampling.seed, sampler, extractor, folder, ranks)
        record = ranks.agree(lambda: record_of(options, network_options, sampling, files, sample_set))
        complete = ranks.agree(lambda: folder.is_complete(record, made_by()))
        if network_options.compile and not complete:  # before the folder is there: it may not work on this machine
            sampler(0, range(options.per_proc_batch_size), [0] * options.per_proc_batch_size)
        return carry_out(sample_set, record, say)


def carry_out(sample_set: SampleSet, record: dict[str, Any], say: Callable[[str], object]) -> Summary:
    """Make what is missing of a set, and its outputs. Raises OtherSettings where its folder has another record."""
    folder, ranks = sample_set.folder, sample_set.ranks
    folder.folder.mkdir(parents=True, exist_ok=True)
    with ranks.hold(lambda: exclusive(folder.folder)):
        if ranks.is_main and sample_set.options.png:
            sample_set.warn_of_other_pictures()
        if ranks.agree(lambda: folder.claim(record, made_by())):
            say(f"already complete: {folder.archive}")
            return Summary(folder.archive, folder.features, 0.0)
        ms_per_image = sample_set.make(ranks.agree(folder.stored))
        ranks.barrier()
        say(ranks.agree(lambda: sample_set.finish(record)))
        return Summary(folder.archive, folder.features, ms_per_image)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it the CPU computes with so many threads: their number changes how sums are split, and so the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record_of(
    options: SetOptions,
    network_options: NetworkOptions,
    sampling: SamplingOptions,
    files: Files,
    sample_set: SampleSet,
) -> dict[str, Any]:
    """Everything that the bytes of the output depend on, as JSON types."""
    networks = sample_set.sampler.networks
    device, schedule = networks.device, sample_set.sampler.spec.schedule
    settings = sampling.settings(networks.path_type, networks.refiner_step)
    return {
        **{name: getattr(options, name) for name in ("num_fid_samples", "per_proc_batch_size", "labels", "png")},
        **{name: getattr(network_options, name) for name in ("quantize", "compile")},
        **{
            name: getattr(sampling, name) for name in ("cfg_scale", "cfg_channels", "atol", "rtol", "diffusion", "seed")
        },
        **{name: getattr(settings, name) for name in ("refiner_step", "path_type")},
        "schedule": str(sample_set.sampler),
        "solver": [*schedule.grid, *chain(*schedule.coefficients)] if isinstance(schedule, LearnedSolver) else None,
        "cfg_interval": list(sampling.cfg_interval),
        "cfg_every": sampling.cfg_every if sampling.cfg_every > 1 else None,  # 1 as in older sets
        "predictor_sha256": sha256(files.predictor),
        "refiner_sha256": None if files.refiner is None else sha256(files.refiner),
        "autoencoder_sha256": networks.autoencoder.fingerprint(),
        "device": device.type,
        "threads": options.threads if device.type == "cpu" else None,
        "precision": str(pick_precision(network_options.precision, device)),
        "features": sample_set.extractor.identity if sample_set.extractor is not None else None,
    }


def class_of(seed: int, number: int, num_classes: int, labels: str) -> int:
    """The class of sample `number`: "random", keyed by (seed, number), or "balanced", all classes in turn."""
    if labels == "balanced":
        return number % num_classes
    return int(keyed_generator(seed, number, Stream.LABEL).integers(num_classes))


@dataclass(frozen=True)
class SampleSet:
    """A set in the making."""

    options: SetOptions
    seed: int
    sampler: Any  # (seed, numbers, conditions) -> uint8 images: an ImageSampler, or one of prompts
    extractor: Extractor | None
    folder: SampleFolder
    ranks: World

    def make(self, stored: Stored) -> float:
        """Make the micro-batches of this rank that are not there yet; returns the median milliseconds per image.

        What `stored` has is not sampled again. Files are written by a second thread while the next micro-batch is made.
        """
        folder, ranks = self.folder, self.ranks
        bar = tqdm(total=folder.count, unit="img", disable=not ranks.is_main, dynamic_ncols=True, desc="sampling")
        with bar, ThreadPoolExecutor(1) as writer:
            written: Future | None = None
            seconds: list[float] = []
            for k in range(ranks.rank, folder.batches, ranks.size):
                arrays, begin = self._at_hand(k, stored), time.perf_counter()
                if arrays is None:
                    arrays = self._sample(k)
                    seconds.append(time.perf_counter() - begin)
                if not self._is_done(k):
                    if written is not None:
                        written.result()  # one batch behind at most; raises what the writing raised
                    written = writer.submit(self._write, k, arrays)
                bar.update(min(folder.count - bar.n, folder.batch * ranks.size))  # the others are about as far
            if written is not None:
                written.result()
        return 1000 * median(seconds or [0.0]) / folder.batch

    def _at_hand(self, k: int, stored: Stored) -> dict[str, np.ndarray] | None:
        """What `_sample` would make, where it was made before."""
        arrays = self.folder.read(k)
        if arrays is None and (images := stored.images(k)) is not None:
            return self._restore(k, images)
        return arrays

    def _sample(self, k: int) -> dict[str, np.ndarray]:
        """Images (n, H, W, C), labels and features of micro-batch k, on the host."""
        numbers = self.folder.numbers(k)
        return self._arrays(self.sampler(self.seed, numbers, self._conditions(k)), k)

    def _restore(self, k: int, images: np.ndarray) -> dict[str, np.ndarray]:
        """As `_sample`, from its images, padded: how many are computed at once changes the last bits of features."""
        rows = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.ranks.device)
        return self._arrays(torch.cat([rows, rows[-1:].expand(self.folder.batch - len(rows), -1, -1, -1)]), k)

    def _classes(self, k: int) -> list[int]:
        """The label of each sample of micro-batch k, as the archive has it."""
        num_classes = self.sampler.networks.predictor.num_classes
        return [class_of(self.seed, i, num_classes, self.options.labels) for i in self.folder.numbers(k)]

    def _conditions(self, k: int) -> Sequence[Any]:
        """What the sampler is given for them."""
        return self._classes(k)

    def _arrays(self, images: Tensor, k: int) -> dict[str, np.ndarray]:
        tensors: dict[str, Tensor] = {
            "images": images.permute(0, 2, 3, 1).contiguous(),
            "labels": torch.tensor(self._classes(k)),
        }
        if self.extractor is not None:  # grey images become three equal channels
            features = self.extractor(images.expand(-1, 3, -1, -1))
            tensors |= {name: value for name, value in features._asdict().items() if value is not None}
        return {name: value.cpu().numpy() for name, value in tensors.items()}

    def _is_done(self, k: int) -> bool:
        """Whether micro-batch k is there, and its pictures, if asked for, as they were written."""
        arrays = self.folder.read(k)
        if arrays is None or not self.options.png:
            return arrays is not None
        pictures = zip(self.folder.pictures(k), arrays["png_sha256"], strict=True)
        return all(path.is_file() and sha256(path) == digest for path, digest in pictures)

    def _write(self, k: int, arrays: dict[str, np.ndarray]) -> None:
        if self.options.png:
            paths = self.folder.pictures(k)
            for path, image in zip(paths, arrays["images"], strict=False):  # the last micro-batch is padded
                save_png(path, to_pil(torch.from_numpy(image).permute(2, 0, 1)))
            arrays = {**arrays, "png_sha256": np.array([sha256(path) for path in paths])}
        self.folder.write(k, arrays)

    def warn_of_other_pictures(self) -> None:
        """Tell of pictures beside those of this run: who measures the folder would count them."""
        own = {path for k in range(self.folder.batches) for path in self.folder.pictures(k)}
        if others := sorted(set((self.folder.folder / "png").glob("*.png")) - own):
            warn(f"{len(others)} pictures that are not of this run, such as {others[0]}")

    def finish(self, record: dict[str, Any]) -> str:
        """Write archive, preview and features from the micro-batches, then record that the run is complete.

        Returns what there is to say.
        """
        folder = self.folder
        shown = range(min(folder.batches, -(-PREVIEW // folder.batch)))
        first = np.concatenate([folder.expect(k)["images"] for k in shown])[:PREVIEW]
        preview = folder.folder.with_name(folder.folder.name + "-preview.png")
        save_png(preview, grid(list(torch.from_numpy(first).permute(0, 3, 1, 2).split(8))))
        folder.write_archive()
        outputs = [folder.archive]
        if self.extractor is not None:
            self._feature_set(self.extractor).save(folder.features)
            outputs.append(folder.features)
        pictures = [p for k in range(folder.batches) for p in self.folder.pictures(k)] if self.options.png else []
        folder.complete(record, [*outputs, *pictures], made_by())
        return f"{folder.count} images: {', '.join(map(str, outputs))}; preview: {preview}"

    def _feature_set(self, extractor: Extractor) -> FeatureSet:
        """Features of all micro-batches, and their statistics, summed in their order: the ranks change no bit."""
        folder, template = self.folder, self.folder.expect(0)
        width = {name: array.shape[1] for name, array in template.items() if name in ("pool", "logits", "spatial")}
        features = {name: torch.empty(folder.count, size) for name, size in width.items() if name != "spatial"}
        statistics = {
            name: GaussianStatistics(size, self.ranks.device) for name, size in width.items() if name != "logits"
        }
        for k, arrays in enumerate(folder):
            for name, rows in features.items():
                rows[k * folder.batch :][: folder.kept(k)] = torch.from_numpy(arrays[name])
            for name, sums in statistics.items():
                sums.update(torch.from_numpy(arrays[name]))
        return FeatureSet(
            source=folder.folder.name,
            extractor=extractor.identity,
            count=folder.count,
            labels=self.options.labels,
            pool_statistics=statistics["pool"].gaussian(),
            spatial_statistics=statistics["spatial"].gaussian() if "spatial" in statistics else None,
            **features,
        )
