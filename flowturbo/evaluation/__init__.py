"""Statistics and metrics of generated images: FID, sFID, Inception Score, precision, recall, KID.

Imports neither the models, transport nor runtime. uint8 images -> features -> streaming statistics -> metrics.
"""

from flowturbo.evaluation.archive import Archive, atomic_write
from flowturbo.evaluation.comparison import METRICS, Measurement, check_comparable, evaluate
from flowturbo.evaluation.extractors import Extractor, Features, InceptionExtractor, make_extractor
from flowturbo.evaluation.feature_set import FeatureSet, extract
from flowturbo.evaluation.images import ImageArchive, ImageFolder
from flowturbo.evaluation.metrics import frechet_distance, inception_score, kid, precision_recall, resample_counts
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
    "atomic_write",
    "check_comparable",
    "evaluate",
    "extract",
    "frechet_distance",
    "inception_score",
    "kid",
    "make_extractor",
    "precision_recall",
    "resample_counts",
]
