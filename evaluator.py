"""Evaluate generated images against a reference: FID, sFID, Inception Score, precision, recall, KID and MIND."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowturbo.data.options import BACKGROUND_HELP, parse_background
from flowturbo.system import cli
from flowturbo.system.files import atomic_write, check_writable
from flowturbo.system.options import option, seed
from flowturbo.system.values import plain
from flowturbo.text_to_image.options import read_lines

USUAL_COUNT = 50_000
PARTS = ("frechet", "kid", "kid-subsets", "precision-recall", "images")
LABELS = ("random", "balanced")
SOURCES = """\
  an ADM .npz      arr_0 (uint8, N×H×W×3); stored mu and sigma are used where the extractor is inception
  a folder         of images, also in subfolders, in the order of their paths
  packed images    a zip, tar or parquet file, a folder of such, or a pattern with *
  a feature file   made by `python evaluator.py stats`, or by sample_ddp_feature.py --features
"""

COMPARE_EPILOG = f"""\
REFERENCE and SAMPLES are each one of
{SOURCES}
examples:
  python evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz --json metrics.json
  python evaluator.py reference-stats.npz samples/ --bootstrap 20
  python evaluator.py digits/ samples/ --extractor pixels

other commands (each has its own --help):
  python evaluator.py clip SAMPLES --prompts FILE --clip DIR   how well images fit their captions
  python evaluator.py stats SOURCE -o FILE   statistics of images, once, for many comparisons
  python evaluator.py benchmark              time and memory of the metrics on this machine, beside torch-fidelity's

FID, sFID, KID and MIND: smaller is better; the others: larger. Values at different N are not comparable. The
Inception Score takes splits of 5000 in file order, so samples sorted by class ruin it. Each metric that lacks
its input prints "-" and the reason.
"""

STATS_EPILOG = f"""\
SOURCE is one of
{SOURCES}
FID and sFID need no more than statistics; precision, recall, KID and MIND need --features.

examples:
  python evaluator.py stats my_images/ -o my-stats.npz --features
  python evaluator.py stats VIRTUAL_imagenet256_labeled.npz -o imagenet256-stats.npz     (2 GB -> 64 MB)
"""


@dataclass(frozen=True)
class Extraction:
    """How features are made. Raises ValueError for impossible values."""

    extractor: str | None = option(
        None,
        "inception, pixels, dinov2 or a TorchScript file, which is a program, mapping uint8 (N, 3, H, W) to (N, D); "
        "default: that of the feature file given, else inception",
        metavar="NAME",
    )
    weights: str | None = option(
        None, "weights of inception (else $FLOWTURBO_INCEPTION_WEIGHTS, or downloaded) or dinov2", metavar="FILE"
    )
    batch_size: int = option(50, "images at once")
    image_size: int | None = option(None, "crop the images of folders to squares, as train.py does")
    background: str = option("white", BACKGROUND_HELP, metavar="COLOUR")
    device: str = option("auto", "auto, cuda, cuda:K or cpu")
    labels: str | None = option(None, "how the classes were drawn, where no file says it", choices=LABELS)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "image_size")
        parse_background(self.background)


@dataclass(frozen=True)
class Comparison:
    """What is compared. Raises ValueError for impossible values."""

    reference: str = option(positional=True, metavar="REFERENCE")
    samples: str = option(positional=True, metavar="SAMPLES")
    json: str | None = option(None, "also write the result here", metavar="FILE")
    bootstrap: int = option(0, "standard errors from K resamples; 0: none", metavar="K")
    seed: int = option(0, "of the resamples", type=seed)
    kid_subsets: int = option(
        0,
        "KID as torch-fidelity computes it, over K random subsets of 1000 (its default is 100); 0: over all pairs",
        metavar="K",
    )
    half_precision: bool = option(
        False, "precision and recall with distances in half precision, as the ADM suite computes them"
    )

    def __post_init__(self) -> None:
        at_least(self, 0, "bootstrap", "kid_subsets")
        if self.bootstrap == 1:
            raise ValueError("bootstrap 1: a standard error needs at least 2 resamples")


@dataclass(frozen=True)
class Statistics:
    """What statistics are written of."""

    source: str = option(positional=True, metavar="SOURCE")
    output: str = option(help="the .npz to write", metavar="FILE", flags=("-o",))
    features: bool = option(False, "keep the features and logits of every image too")


@dataclass(frozen=True)
class Clip:
    """What captions images are held against. Raises ValueError for impossible values."""

    samples: str = option(positional=True, metavar="SAMPLES")
    prompts: str = option(help="one caption a line; image i has line i, and again from the first", metavar="FILE")
    clip: str = option(help="a CLIP as transformers saves it: weights, tokenizer, image processor", metavar="DIR")
    batch_size: int = option(50, "images at once")
    device: str = option("auto", "auto, cuda, cuda:K or cpu")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


@dataclass(frozen=True)
class Benchmark:
    """How large a benchmark is. Raises ValueError for impossible values."""

    parts: tuple[str, ...] = option(PARTS, "what to measure; default: all", nargs="+", choices=PARTS)
    count: int = option(USUAL_COUNT, "feature vectors on each side")
    references: int = option(10_000, "of the reference side, for KID, precision and recall")
    dimensions: int = option(2048, "of each")
    images: int = option(100, "of 256x256 pixels, for the extraction")
    repeats: int = option(3, "runs, of which the median counts")

    def __post_init__(self) -> None:
        at_least(self, 1, "dimensions", "repeats")
        at_least(self, 2, "images")
        at_least(self, 4, "count", "references")


def at_least(options: object, least: int, *names: str) -> None:
    """Raises ValueError for numbers below the least that makes sense."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} {value} must be at least {least}")


def compare(argv: Sequence[str]) -> None:
    """REFERENCE SAMPLES: print, and write, every metric."""
    kinds = {"what to compare": Comparison, "features": Extraction}
    options, extraction = cli.parse(cli.new_parser(__doc__, COMPARE_EPILOG), argv, kinds)
    if options.json:
        check_writable(options.json)

    import torch
    from tqdm import tqdm

    from flowturbo.evaluation import METRICS, evaluate
    from flowturbo.evaluation.report import record, table
    from flowturbo.evaluation.sides import Side, pick_extractor, recorded_labels, with_labels
    from flowturbo.system.distributed import pick_device

    device = pick_device(extraction.device)
    sides = [
        Side.open(path, extraction.image_size, extraction.background) for path in (options.reference, options.samples)
    ]
    extractor = pick_extractor(sides, extraction.extractor, device, extraction.weights)
    keep = ["pool", "logits", *(["spatial"] if options.bootstrap else [])]
    reference = sides[0].features(extractor, ["pool"], extraction.batch_size, device)
    samples = sides[1].features(extractor, keep, extraction.batch_size, device)
    samples = with_labels(samples, extraction.labels or recorded_labels(options.samples))
    notes = [note for side in sides for note in side.notes(extractor)]
    warnings = []
    if samples.count is not None and samples.count < USUAL_COUNT:
        warnings.append(
            f"{samples.count} samples: below {USUAL_COUNT}, FID and sFID are biased upwards and not comparable "
            f"with values at {USUAL_COUNT}"
        )
    tell(notes, warnings)
    settings = {name: getattr(options, name) for name in ("bootstrap", "seed", "half_precision", "kid_subsets")}
    metrics = evaluate(reference, samples, **settings, device=device)
    measured = dict(tqdm(metrics, total=len(METRICS), desc="metrics", leave=False, disable=None))
    if options.json:
        report = {
            **record(reference, samples, measured),
            "settings": {**settings, "torch": torch.__version__},
            "warnings": warnings,
            "notes": notes,
        }
        with atomic_write(options.json) as file:
            file.write((json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    print(table(reference, samples, measured))


def stats(argv: Sequence[str]) -> None:
    """SOURCE -o FILE: write statistics, and features if asked, for later comparisons."""
    parser = cli.new_parser("Write the statistics of images to a file that can stand for them.", STATS_EPILOG)
    parser.prog += " stats"
    options, extraction = cli.parse(parser, argv, {"what to measure": Statistics, "features": Extraction})
    check_writable(options.output)

    from flowturbo.evaluation.sides import Side, pick_extractor, with_labels
    from flowturbo.system.distributed import pick_device

    device = pick_device(extraction.device)
    side = Side.open(options.source, extraction.image_size, extraction.background)
    if side.stored and not options.features and extraction.extractor in (None, side.stored.extractor.split()[0]):
        side = side._replace(images=None)  # what is asked for is there already
    extractor = pick_extractor([side], extraction.extractor, device, extraction.weights)
    keep = ["pool", "logits"] if options.features else []
    features = with_labels(side.features(extractor, keep, extraction.batch_size, device), extraction.labels)
    tell(side.notes(extractor), [])
    if options.features and features.pool is None:
        raise ValueError(f"{options.source} holds statistics only: features cannot be kept")
    if not options.features:
        features = dataclasses.replace(features, pool=None, logits=None)
    features.save(options.output)
    print(f"{options.output}: {features.extractor}, N = {features.count or 'not recorded'}")


def clip(argv: Sequence[str]) -> None:
    """SAMPLES --prompts FILE --clip DIR: print the CLIP score of images and their captions."""
    parser = cli.new_parser(clip.__doc__)
    parser.prog += " clip"
    (options,) = cli.parse(parser, argv, {"what to score": Clip})
    captions = read_lines(options.prompts)
    if not captions:
        raise ValueError(f"{options.prompts!r} holds no captions: expected one a line")

    from flowturbo.evaluation.clip import ClipScorer, clip_scores
    from flowturbo.evaluation.sides import Side
    from flowturbo.system.distributed import pick_device

    images = Side.open(options.samples).images
    if images is None:
        raise ValueError(f"{options.samples!r} holds features only: expected images")
    scores = clip_scores(images, captions, ClipScorer(options.clip, pick_device(options.device)), options.batch_size)
    error = float(scores.std()) / len(scores) ** 0.5
    print(f"CLIP score {float(scores.mean()):.3f} ± {error:.3f} (N = {len(scores)}, {len(captions)} captions)")


def benchmark(argv: Sequence[str]) -> None:
    """Print time, memory and values of features and metrics beside torch-fidelity's and scipy's, on random inputs.

    Without smaller sizes it takes most of an hour on one core.
    """
    parser = cli.new_parser(benchmark.__doc__)
    parser.prog += " benchmark"
    (options,) = cli.parse(parser, argv, {"size": Benchmark})

    import torch

    from benchmarks.evaluation import compare
    from benchmarks.measure import processor
    from benchmarks.metrics import Inputs

    print(
        f"{processor()}, {torch.get_num_threads()} threads; {options.count} samples, {options.references} references, "
        f"{options.dimensions} dimensions; medians of {options.repeats} interleaved runs"
    )
    inputs = Inputs(options.count, options.references, options.dimensions, options.images)
    for text in compare(inputs, options.repeats, options.parts):
        print(text, flush=True)


def tell(notes: Sequence[str], warnings: Sequence[str]) -> None:
    """Print what a user should know before the result, on stderr."""
    for text in [f"note: {note}" for note in notes] + [f"warning: {warning}" for warning in warnings]:
        print(plain(text), file=sys.stderr)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"stats": stats, "clip": clip, "benchmark": benchmark}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands; without its name, compare."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
    else:
        compare(arguments)


if __name__ == "__main__":
    cli.run_script(main, prints_result=True)
