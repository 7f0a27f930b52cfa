"""Evaluate generated images against a reference: FID, sFID, Inception Score, precision, recall and KID."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from flowturbo.data.folders import centre_crop
from flowturbo.evaluation import (
    METRICS,
    Extractor,
    FeatureSet,
    ImageArchive,
    ImageFolder,
    Measurement,
    atomic_write,
    evaluate,
    extract,
)
from flowturbo.evaluation.archive import Archive, check_writable
from flowturbo.system.cli import hyphenate, new_parser, run_script
from flowturbo.weights.fetch import hint, locate
from pipeline import load_extractor

USUAL_COUNT = 50_000

COMPARE_EPILOG = """\
REFERENCE and SAMPLES are each one of
  an ADM .npz      arr_0 (uint8, N×H×W×3); stored mu and sigma are used where the extractor is inception
  a folder         of images, also in subfolders, in the order of their paths
  a feature file   made by `python evaluator.py stats`, or by sample_ddp_feature.py --features

examples:
  python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz --json metrics.json
  python evaluator.py reference-stats.npz samples/ --bootstrap 20
  python evaluator.py digits/ samples/ --extractor pixels

other commands (each has its own --help):
  python evaluator.py stats SOURCE -o FILE   statistics of images, once, for many comparisons
  python evaluator.py benchmark              time and memory of the Fréchet distance on this machine

FID, sFID and KID: smaller is better; the others: larger. Values at different N are not comparable. The
Inception Score takes splits of 5000 in file order, so samples sorted by class ruin it. Each metric that lacks
its input prints "-" and the reason.
"""

STATS_EPILOG = """\
SOURCE is an ADM .npz, a folder of images or a feature file. FID and sFID need no more than statistics;
precision, recall and KID need --features.

examples:
  python evaluator.py stats my_images/ -o my-stats.npz --features
  python evaluator.py stats VIRTUAL_imagenet256_labeled.npz -o imagenet256-stats.npz     (2 GB -> 64 MB)
"""


class Source(NamedTuple):
    """One side as it lies on disk: images, stored statistics or features, or both."""

    images: ImageFolder | ImageArchive | None
    stored: FeatureSet | None


def open_source(path: str, image_size: int | None = None) -> Source:
    """Look at a folder or an .npz without reading the images; ValueError for anything else.

    With an image_size the images of a folder are cropped as for training.
    """
    found = locate(path)
    if found is None and hint(path):
        raise ValueError(f"{path}: no such file; get it with {hint(path)}")
    path = str(found or path)
    if Path(path).is_dir():
        crop = partial(centre_crop, size=image_size) if image_size is not None else None
        return Source(ImageFolder(path, crop), None)
    archive = Archive(path)
    stored = FeatureSet.load(path) if "mu" in archive else None
    images = ImageArchive(path) if "arr_0" in archive or stored is None else None
    return Source(images, stored)


def extractor_for(sources: Sequence[Source], args: argparse.Namespace) -> Extractor | None:
    """The extractor asked for, else that of a feature file, else inception; None with nothing to extract.

    ValueError, before any work, when a feature file was made with another.
    """
    fixed = [source.stored for source in sources if source.images is None]
    name = args.extractor or (fixed[0].extractor.split()[0] if fixed else "inception")
    extractor = load_extractor(name, args.device, args.weights) if len(fixed) < len(sources) else None
    if extractor:
        identity = extractor.identity
    elif args.extractor:
        identity = "torchscript" if Path(name).is_file() else name
    else:
        identity = fixed[0].extractor
    for stored in fixed:
        if stored.extractor != identity and stored.extractor.split()[0] != identity:
            raise ValueError(
                f"unlike extractors: {stored.source} was made with '{stored.extractor}', not '{identity}'"
            )
    return extractor


def features_of(
    source: Source, extractor: Extractor | None, keep: Sequence[str], args: argparse.Namespace
) -> FeatureSet:
    """Features and statistics of one side, computed from its images if it has any.

    As in the ADM suite, statistics stored beside the images take the place of the images' own.
    """
    stored = source.stored
    if source.images is None:
        return stored
    computed = extract(extractor, source.images, batch_size=args.batch_size, keep=keep, device=args.device)
    if args.image_size is not None and isinstance(source.images, ImageFolder):
        computed = dataclasses.replace(computed, source=f"{computed.source} at {args.image_size} px")
    if stored is None:
        return computed
    if stored.extractor != extractor.identity:
        print(
            f"note: {source.images.path} stores statistics of '{stored.extractor}', not used with "
            f"'{extractor.identity}'",
            file=sys.stderr,
        )
        return computed
    return dataclasses.replace(stored, pool=computed.pool, spatial=computed.spatial, logits=computed.logits)


def with_labels(features: FeatureSet, labels: str | None) -> FeatureSet:
    """The features with the label mode the user states; ValueError when the file says otherwise."""
    if labels and features.labels not in (None, labels):
        raise ValueError(f"{features.source} was made with {features.labels} labels, not {labels}")
    return dataclasses.replace(features, labels=labels or features.labels)


def recorded_labels(path: str) -> str | None:
    """The label mode of an archive that sample_ddp_feature.py has written, from the settings beside it, if any."""
    try:
        record = json.loads((Path(path).with_suffix("") / "settings.json").read_text())
        return record["settings"]["labels"] if Path(path).name in record["outputs"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare(args: argparse.Namespace) -> None:
    """REFERENCE SAMPLES: print, and write, every metric."""
    if args.json:
        check_writable(args.json)
    sources = [open_source(path, args.image_size) for path in (args.reference, args.samples)]
    extractor = extractor_for(sources, args)
    reference = features_of(sources[0], extractor, ["pool"], args)
    keep = ["pool", "logits", "spatial"] if args.bootstrap else ["pool", "logits"]
    samples = with_labels(
        features_of(sources[1], extractor, keep, args), args.labels or recorded_labels(args.samples)
    )
    warnings = []
    if samples.count is not None and samples.count < USUAL_COUNT:
        warnings.append(
            f"{samples.count} samples: below {USUAL_COUNT}, FID and sFID are biased upwards and not comparable "
            f"with values at {USUAL_COUNT}"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    metrics = evaluate(
        reference,
        samples,
        bootstrap=args.bootstrap,
        half_precision=args.half_precision,
        seed=args.seed,
        device=args.device,
    )
    measured = dict(tqdm(metrics, total=len(METRICS), desc="metrics", leave=False, disable=None))
    print(table(reference, samples, measured))
    if args.json:
        report = {
            "reference": side_report(reference),
            "samples": side_report(samples),
            "extractor": samples.extractor,
            "metrics": {name: measurement._asdict() for name, measurement in measured.items()},
            "settings": {
                "bootstrap": args.bootstrap,
                "seed": args.seed,
                "half_precision": args.half_precision,
                "torch": torch.__version__,
            },
            "warnings": warnings,
        }
        with atomic_write(args.json) as file:
            file.write((json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def side_report(features: FeatureSet) -> dict[str, object]:
    """What a reader of the numbers must know about one side."""
    images = None if features.pool is None else len(features.pool)
    return {"name": features.source, "N": features.count, "N_features": images, "labels": features.labels}


def table(reference: FeatureSet, samples: FeatureSet, measured: dict[str, Measurement]) -> str:
    """The result for people: both sides, the extractor, and one line per metric."""
    lines = []
    for side, features in (("reference", reference), ("samples", samples)):
        parts = [features.source, f"N = {features.count or 'not recorded'}"]
        if features.pool is not None and len(features.pool) != features.count:
            parts.append(f"{len(features.pool)} images for precision, recall and KID")
        if features is samples:
            parts.append(f"labels {features.labels or 'not recorded'}")
        lines.append(f"{side:16}{', '.join(parts)}")
    lines.append(f"{'extractor':16}{samples.extractor}\n")
    for name, (value, error, reason) in measured.items():
        number = "-" if value is None else f"{value:.6g}"
        spread = "" if error is None else f"± {error:.2g}"
        lines.append(f"{name:16}{number:14}{spread:12}{reason or ''}".rstrip())
    return "\n".join(lines)


def stats(args: argparse.Namespace) -> None:
    """SOURCE -o FILE: write statistics, and features if asked, for later comparisons."""
    check_writable(args.output)
    source = open_source(args.source, args.image_size)
    if source.stored and not args.features and args.extractor in (None, source.stored.extractor.split()[0]):
        source = source._replace(images=None)  # what is asked for is there already
    extractor = extractor_for([source], args)
    keep = ["pool", "logits"] if args.features else []
    features = with_labels(features_of(source, extractor, keep, args), args.labels)
    if args.features and features.pool is None:
        raise ValueError(f"{args.source} holds statistics only: features cannot be kept")
    if not args.features:
        features = dataclasses.replace(features, pool=None, logits=None)
    features.save(args.output)
    print(f"{args.output}: {features.extractor}, N = {features.count or 'not recorded'}")


def benchmark(args: argparse.Namespace) -> None:
    """Print the time and memory of the Fréchet distance beside torch-fidelity's and scipy.linalg.sqrtm's."""
    from benchmarks.evaluation import compare_frechet, summary

    print(
        f"two sets of {args.count} × {args.dimensions} features, median of {args.repeats} interleaved runs, "
        f"{torch.get_num_threads()} threads"
    )
    print(summary(compare_frechet(args.count, args.dimensions, args.repeats)))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `evaluator.py REFERENCE SAMPLES`."""
    parser = new_parser(__doc__, COMPARE_EPILOG)
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("samples", metavar="SAMPLES")
    add_extraction(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    parser.add_argument(
        "--bootstrap", type=resamples, default=0, metavar="K", help="standard errors from K resamples; 0: none"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the resamples")
    parser.add_argument(
        "--half-precision",
        action="store_true",
        help="precision and recall with distances in half precision, as the ADM suite computes them",
    )
    return parser


def build_stats_parser() -> argparse.ArgumentParser:
    """The parser of `evaluator.py stats`."""
    parser = new_parser("Write the statistics of images to a file that can stand for them.", STATS_EPILOG)
    parser.prog += " stats"
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .npz to write")
    parser.add_argument("--features", action="store_true", help="keep the features and logits of every image too")
    add_extraction(parser)
    return parser


def build_benchmark_parser() -> argparse.ArgumentParser:
    """The parser of `evaluator.py benchmark`."""
    parser = new_parser(benchmark.__doc__)
    parser.prog += " benchmark"
    parser.add_argument("--count", type=positive, default=USUAL_COUNT, help="feature vectors on each side")
    parser.add_argument("--dimensions", type=positive, default=2048)
    parser.add_argument("--repeats", type=positive, default=3)
    return parser


def add_extraction(parser: argparse.ArgumentParser) -> None:
    """The flags that say how features are made."""
    parser.add_argument(
        "--extractor",
        metavar="NAME",
        help="inception, pixels, dinov2 or a TorchScript file mapping uint8 (N, 3, H, W) to (N, D); "
        "default: that of the feature file given, else inception",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of inception (else $FLOWTURBO_INCEPTION_WEIGHTS, torch.hub's cache or a download) or dinov2",
    )
    parser.add_argument("--batch-size", type=positive, default=50)
    parser.add_argument("--image-size", type=positive, help="crop the images of folders to squares, as train.py does")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--labels", choices=("random", "balanced"), help="how the classes were drawn, where no file says it"
    )


def natural(text: str) -> int:
    """A whole number, not negative."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if (number := natural(text)) == 0:
        raise ValueError(text)
    return number


def resamples(text: str) -> int:
    """A whole number, 0 or at least 2."""
    if (number := natural(text)) == 1:
        raise argparse.ArgumentTypeError("a standard error needs at least 2 resamples")
    return number


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: expected cpu, cuda or cuda:INDEX") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text}: there is no CUDA device here; use cpu")
    return found


COMMANDS = {"stats": (build_stats_parser, stats), "benchmark": (build_benchmark_parser, benchmark)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands; without its name, compare."""
    arguments = hyphenate(argv)
    if arguments and arguments[0] in COMMANDS:
        build, command = COMMANDS[arguments[0]]
        command(build().parse_args(arguments[1:]))
    else:
        compare(build_parser().parse_args(arguments))


if __name__ == "__main__":
    run_script(main)
