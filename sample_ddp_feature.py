"""Sample many images for evaluation, on any number of GPUs or CPU processes; 50 000 by default.

Usage:
  torchrun --nnodes=1 --nproc_per_node=N sample_ddp_feature.py --cfg-scale 1.5 --tag h1p5r3
  torchrun --nnodes=1 --nproc_per_node=N sample_ddp_feature.py --features inception --png --tag with-features
  python evaluator.py REFERENCE.npz samples/h1p5r3.npz

Image i depends on the seed and i alone: the number of ranks changes no byte. Interrupted? Run the same command
again; only what is missing is made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import pipeline
from flowturbo.data.pictures import grid, save_png, to_pil, to_uint8
from flowturbo.data.randomness import keyed_generator
from flowturbo.evaluation import Extractor, FeatureSet, GaussianStatistics
from flowturbo.sampling.sample_folder import SampleFolder
from flowturbo.system import cli
from flowturbo.system.distributed import World, world
from flowturbo.system.files import exclusive, sha256
from flowturbo.transport import Sampler

PREVIEW = 64  # images in the preview grid
LABEL_STREAM = 2**63  # of the keyed generator; stream 0 is the noise, those from 1 on the SDE's steps


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__.strip(), "Every flag may be spelled with - or _.")
    group = parser.add_argument_group("what to sample")
    group.add_argument("--schedule", default="H1P5R3", help="as in sample.py: blocks with counts, dopri5 or sdeN")
    group.add_argument("--num-fid-samples", type=int, default=50_000, help="how many images")
    group.add_argument("--per-proc-batch-size", type=int, default=32, help="images sampled at once by each rank")
    group.add_argument(
        "--labels",
        choices=("random", "balanced"),
        default="random",
        help="classes drawn at random, as the field reports FID, or all in turn (about 0.1 lower FID)",
    )
    pipeline.add_network_flags(parser)
    pipeline.add_sampling_flags(parser, cfg_scale=1.5)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of each rank on a CPU. Another number changes the last bits; more cores are better used by more ranks",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--sample-dir", default="samples", metavar="DIR", help="where everything is written")
    group.add_argument("--tag", metavar="NAME", help="name of this set (default: from schedule, scale and seed)")
    group.add_argument("--png", action=argparse.BooleanOptionalAction, default=False, help="also a folder of PNGs")
    group.add_argument(
        "--features",
        metavar="EXTRACTOR",
        help="also extract features on the fly: inception, pixels, dinov2 or a TorchScript file",
    )
    group.add_argument("--features-weights", metavar="FILE", help="local weights of inception or dinov2")
    return parser


class Summary(NamedTuple):
    """What a run leaves: its files, and the sampling time of this process (0 where nothing was left to do)."""

    archive: Path
    features: Path
    ms_per_image: float


@torch.no_grad()
def main(argv: list[str] | None = None) -> Summary:
    args = parse_args(argv)
    needs_refiner = pipeline.needs_refiner(args.schedule)
    pipeline.check_files(args, needs_refiner)
    # Nobody waits for another rank while sampling; at the end the slowest may be far behind.
    with world(args.device, timeout=timedelta(days=7)) as ranks, threads(args.threads):
        say = print if ranks.is_main else lambda _: None
        networks = pipeline.load_networks(args, needs_refiner, ranks.device, say)
        extractor = (
            pipeline.load_extractor(args.features, ranks.device, args.features_weights) if args.features else None
        )
        sampler = pipeline.sampler_of(args, args.schedule, networks)
        samples = SampleFolder(output_folder(args), args.num_fid_samples, args.per_proc_batch_size)
        settings = settings_of(args, ranks, networks, extractor)
        samples.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(samples.folder) if ranks.is_main else nullcontext():
            if ranks.is_main and args.png:
                warn_of_strangers(samples)
            if ranks.agree(lambda: samples.claim(settings)):
                if ranks.is_main:
                    print(f"already complete: {samples.archive}")
                return Summary(samples.archive, samples.features, 0.0)
            ms_per_image = generate(args, ranks, networks, sampler, extractor, samples)
            ranks.barrier()
            statistics = merge_statistics(ranks, samples) if extractor is not None else {}
            ranks.agree(lambda: finish(args, samples, settings, extractor, statistics))
            return Summary(samples.archive, samples.features, ms_per_image)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it the CPU computes with so many threads: their number changes how sums are split, and so the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(cli.hyphenate(argv))
    if args.num_fid_samples < 1 or args.per_proc_batch_size < 1 or args.threads < 1:
        parser.error("--num-fid-samples, --per-proc-batch-size and --threads must be at least 1")
    if args.features not in (None, "inception", "pixels", "dinov2") and not Path(args.features).is_file():
        parser.error(f"--features {args.features!r}: expected inception, pixels, dinov2 or a TorchScript file")
    if args.features and args.num_fid_samples < 2:
        parser.error("--features needs at least 2 images")
    if args.tag is not None and (not args.tag or "/" in args.tag or args.tag.startswith(".")):
        parser.error(f"--tag {args.tag!r} must be a word for a folder name")
    if args.tag is not None and args.tag.endswith("-features"):
        parser.error(f"--tag {args.tag!r} would write where another tag's features go")
    pipeline.guidance_of(args)
    return args


def output_folder(args: argparse.Namespace) -> Path:
    name = args.tag or f"{pipeline.file_name(args.schedule)}-cfg{args.cfg_scale:g}-seed{args.seed}"
    return Path(args.sample_dir) / name


def settings_of(
    args: argparse.Namespace, ranks: World, networks: pipeline.Networks, extractor: Extractor | None
) -> dict:
    """Everything that the bytes of the output depend on, as JSON types."""

    def describe() -> dict:
        names = ("num_fid_samples", "per_proc_batch_size", "labels", "cfg_scale", "cfg_channels", "refiner_step")
        names += ("path_type", "atol", "rtol", "diffusion", "seed", "quantize", "compile")
        refiner = sha256(args.refiner_ckpt) if pipeline.needs_refiner(args.schedule) else None
        return {
            **{name: getattr(args, name) for name in names},
            "schedule": str(pipeline.parse_sampler(args.schedule)),
            "cfg_interval": list(args.cfg_interval),
            "predictor_sha256": sha256(args.predictor_ckpt),
            "refiner_sha256": refiner,
            "autoencoder_sha256": networks.autoencoder.fingerprint(),
            "device": ranks.device.type,
            "threads": args.threads if ranks.device.type == "cpu" else None,
            "precision": str(pipeline.pick_precision(args.precision, ranks.device)),
            "png": args.png,
            "features": extractor.identity if extractor is not None else None,
        }

    return ranks.agree(describe)


def label_of(seed: int, number: int, num_classes: int, mode: str) -> int:
    """The class of sample `number`: keyed by (seed, number), or all classes in turn."""
    if mode == "balanced":
        return number % num_classes
    return int(keyed_generator(seed, number, LABEL_STREAM).integers(num_classes))


def generate(
    args: argparse.Namespace,
    ranks: World,
    networks: pipeline.Networks,
    sampler: Sampler,
    extractor: Extractor | None,
    samples: SampleFolder,
) -> float:
    """Make the micro-batches of this rank that are not there yet; returns the median milliseconds per image.

    Files are written by a second thread while the next micro-batch is sampled.
    """
    mine = range(ranks.rank, samples.batches, ranks.size)
    bar = tqdm(total=samples.count, unit="img", disable=not ranks.is_main, dynamic_ncols=True, desc="sampling")
    with bar, ThreadPoolExecutor(1) as writer:
        written: Future | None = None
        seconds: list[float] = []
        for k in mine:
            numbers = samples.numbers(k)
            if not is_done(args, samples, k):
                classes = [label_of(args.seed, i, networks.predictor.num_classes, args.labels) for i in numbers]
                begin = time.perf_counter()
                images = sample_batch(args, networks, sampler, numbers, torch.tensor(classes))
                seconds.append(time.perf_counter() - begin)
                arrays = {"images": images.permute(0, 2, 3, 1).contiguous(), "labels": torch.tensor(classes)}
                if extractor is not None:
                    arrays |= features_of(extractor, images.to(ranks.device))
                if written is not None:
                    written.result()  # one batch behind at most; raises what the writing raised
                written = writer.submit(
                    write_batch, args, samples, k, {n: a.cpu().numpy() for n, a in arrays.items()}
                )
            bar.update(min(samples.count - bar.n, len(numbers) * ranks.size))  # the other ranks are about as far
        if written is not None:
            written.result()
    return 1000 * median(seconds or [0.0]) / samples.batch


def is_done(args: argparse.Namespace, samples: SampleFolder, k: int) -> bool:
    """Whether micro-batch k is there, and with --png its pictures as they were written."""
    arrays = samples.read(k)
    if arrays is None or not args.png:
        return arrays is not None
    pictures = zip(png_paths(samples, k), arrays["png_sha256"], strict=True)
    return all(path.is_file() and sha256(path) == digest for path, digest in pictures)


def png_paths(samples: SampleFolder, k: int) -> list[Path]:
    """Where the pictures of micro-batch k lie."""
    return [samples.folder / "png" / f"{number:06d}.png" for number in samples.numbers(k)[: samples.kept(k)]]


def warn_of_strangers(samples: SampleFolder) -> None:
    """Tell of pictures beside those of this run: who measures the folder would count them."""
    own = {path for k in range(samples.batches) for path in png_paths(samples, k)}
    if strangers := sorted(set((samples.folder / "png").glob("*.png")) - own):
        print(f"warning: {len(strangers)} pictures that are not of this run, such as {strangers[0]}", file=sys.stderr)


def write_batch(args: argparse.Namespace, samples: SampleFolder, k: int, arrays: dict[str, np.ndarray]) -> None:
    if args.png:
        paths = png_paths(samples, k)
        for path, image in zip(paths, arrays["images"], strict=False):  # the last micro-batch is padded
            save_png(path, to_pil(torch.from_numpy(image).permute(2, 0, 1)))
        arrays = {**arrays, "png_sha256": np.array([sha256(path) for path in paths])}
    samples.write(k, arrays)


def sample_batch(
    args: argparse.Namespace, networks: pipeline.Networks, sampler: Sampler, numbers: range, classes: Tensor
) -> Tensor:
    """uint8 images (N, C, H, W), on the host, of the samples with these numbers and classes."""
    latents = pipeline.sample_numbers(sampler, networks, args.seed, numbers, classes)
    return to_uint8(networks.autoencoder.decode(latents)).cpu()


def features_of(extractor: Extractor, images: Tensor) -> dict[str, Tensor]:
    """The features that the extractor has, by name. Grey images become three equal channels."""
    features = extractor(images.expand(-1, 3, -1, -1))
    return {name: value for name, value in features._asdict().items() if value is not None}


def merge_statistics(ranks: World, samples: SampleFolder) -> dict[str, GaussianStatistics]:
    """Float64 statistics of "pool" and "spatial" features: each rank sums its own micro-batches, then all."""
    statistics: dict[str, GaussianStatistics] = {}
    template = samples.read(0) or {}
    for name in ("pool", "spatial"):
        if name in template:
            statistics[name] = GaussianStatistics(template[name].shape[1], ranks.device)
    for k in range(ranks.rank, samples.batches, ranks.size):
        arrays = samples.expect(k)
        for name, sums in statistics.items():
            sums.update(torch.from_numpy(arrays[name]))
    for sums in statistics.values():
        ranks.sum(sums.sums)
    return statistics


def finish(
    args: argparse.Namespace,
    samples: SampleFolder,
    settings: dict,
    extractor: Extractor | None,
    statistics: dict[str, GaussianStatistics],
) -> None:
    """Write archive, preview and features from the micro-batches, then record that the run is complete."""
    shown = range(min(samples.batches, -(-PREVIEW // samples.batch)))
    first = np.concatenate([samples.expect(k)["images"] for k in shown])[:PREVIEW]
    preview = samples.folder.with_name(samples.folder.name + "-preview.png")
    save_png(preview, grid(list(torch.from_numpy(first).permute(0, 3, 1, 2).split(8))))
    samples.write_archive()
    outputs = [samples.archive]
    if extractor is not None:
        features = {
            name: torch.empty(samples.count, array.shape[1])
            for name, array in samples.expect(0).items()
            if name in ("pool", "logits")
        }
        for k, arrays in enumerate(samples):
            for name, rows in features.items():
                rows[k * samples.batch :][: samples.kept(k)] = torch.from_numpy(arrays[name])
        FeatureSet(
            source=samples.folder.name,
            extractor=extractor.identity,
            count=samples.count,
            labels=args.labels,
            pool_statistics=statistics["pool"].gaussian(),
            spatial_statistics=statistics["spatial"].gaussian() if "spatial" in statistics else None,
            **features,
        ).save(samples.features)
        outputs.append(samples.features)
    pictures = [path for k in range(samples.batches) for path in png_paths(samples, k)] if args.png else []
    samples.complete(settings, [*outputs, *pictures])
    print(f"{samples.count} images: {', '.join(map(str, outputs))}; preview: {preview}")


if __name__ == "__main__":
    cli.run_script(main)
