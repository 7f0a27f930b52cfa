"""Statistics and metrics of generated images: FID, sFID, Inception Score, precision, recall, KID, MIND.

uint8 images -> features -> streaming statistics -> metrics.
"""

from flowturbo.evaluation.comparison import METRICS, Measurement, check_comparable, evaluate
from flowturbo.evaluation.extractors import Extractor, Features, InceptionExtractor, load_extractor
from flowturbo.evaluation.features import FeatureSet, extract
from flowturbo.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kid,
    kid_of_subsets,
    mind,
    precision_recall,
    resample_counts,
)
from flowturbo.evaluation.sources import Archive, ImageArchive, ImageFolder
from flowturbo.evaluation.statistics import Gaussian, GaussianStatistics

__all__ = [
    "METRICS",
    "Archive",
    "Extractor",
    "FeatureSet",
    "Features",
    "Gaussian",
    "GaussianStatistics",
    "ImageArchive",
    "ImageFolder",
    "InceptionExtractor",
    "Measurement",
    "check_comparable",
    "evaluate",
    "extract",
    "frechet_distance",
    "inception_score",
    "kid",
    "kid_of_subsets",
    "load_extractor",
    "mind",
    "precision_recall",
    "resample_counts",
]
