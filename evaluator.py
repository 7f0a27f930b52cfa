"""Evaluate generated images against a reference: FID, sFID, Inception Score, precision, recall and KID."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation import (
    METRICS,
    Extractor,
    FeatureSet,
    ImageArchive,
    ImageFolder,
    Measurement,
    atomic_write,
    check_comparable,
    evaluate,
    extract,
    make_extractor,
)
from evaluation.archive import Archive, check_writable
from runtime.cli import hyphenate, new_parser, run_script

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


def open_source(path: str) -> Source:
    """Look at a folder or an .npz without reading the images; ValueError for anything else."""
    if Path(path).is_dir():
        return Source(ImageFolder(path), None)
    archive = Archive(path)
    stored = FeatureSet.load(path) if "mu" in archive else None
    images = ImageArchive(path) if "arr_0" in archive or stored is None else None
    return Source(images, stored)


def extractor_for(sources: Sequence[Source], args: argparse.Namespace) -> Extractor | None:
    """The extractor asked for, or that of the feature files; None when there is nothing to extract.

    ValueError when a feature file was made with another.
    """
    fixed = [source.stored for source in sources if source.images is None and source.stored is not None]
    kind = args.extractor or (fixed[0].extractor.split()[0] if fixed else "inception")
    for stored in fixed:
        if args.extractor and Path(args.extractor).is_file():
            continue  # known by its digest, once loaded
        if stored.extractor.split()[0] != kind:
            raise ValueError(
                f"unlike extractors: {stored.source} was made with '{stored.extractor}', not with {kind}"
            )
    if len(fixed) == len(sources):
        return None
    return make_extractor(kind, args.device, args.weights)


def features_of(
    source: Source, extractor: Extractor | None, keep: Sequence[str], args: argparse.Namespace
) -> FeatureSet:
    """Features and statistics of one side, computed where they are not stored.

    Statistics stored beside images take precedence over the images' own, as in the ADM suite.
    """
    stored = source.stored
    like = stored is not None and (extractor is None or stored.extractor == extractor.identity)
    if source.images is None or extractor is None:
        assert stored is not None
        return stored
    computed = extract(extractor, source.images, batch_size=args.batch_size, keep=keep, device=args.device)
    if stored is None or not like:
        return computed
    return dataclasses.replace(
        computed,
        count=stored.count,
        pool_statistics=stored.pool_statistics,
        spatial_statistics=stored.spatial_statistics,
    )
