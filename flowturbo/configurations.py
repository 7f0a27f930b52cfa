"""Names that options offer: SiT's sizes, precisions. No torch is imported."""

from __future__ import annotations

WIDTHS = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
SIT_CONFIGS: dict[str, dict[str, int]] = {
    f"SiT-{name}/{patch_size}": {"patch_size": patch_size, **width}
    for name, width in WIDTHS.items()
    for patch_size in (2, 4, 8)
}

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTIZATIONS = ("int8", "float8")
