"""The result of a comparison: a table for people, and the same as JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowturbo.evaluation.comparison import Measurement
from flowturbo.evaluation.features import FeatureSet
from flowturbo.system.values import plain


def table(reference: FeatureSet, samples: FeatureSet, measured: Mapping[str, Measurement]) -> str:
    """Both sides, the extractor, and one line per metric."""
    lines = []
    for side, features in (("reference", reference), ("samples", samples)):
        parts = [plain(features.source), f"N = {features.count or 'not recorded'}"]
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


def record(reference: FeatureSet, samples: FeatureSet, measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """What a reader of the numbers must know, as JSON types."""
    return {
        "reference": _side(reference),
        "samples": _side(samples),
        "extractor": samples.extractor,
        "metrics": {name: measurement._asdict() for name, measurement in measured.items()},
    }


def _side(features: FeatureSet) -> dict[str, Any]:
    images = None if features.pool is None else len(features.pool)
    return {"name": features.source, "N": features.count, "N_features": images, "labels": features.labels}
