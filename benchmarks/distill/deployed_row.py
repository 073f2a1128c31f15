# SPDX-License-Identifier: Apache-2.0
"""What result files keep of a deployed student."""

from __future__ import annotations

from typing import Any

from calib.schema.distill import Deployment


def deployed_row(record: Deployment, seconds: float) -> dict[str, Any]:
    """Accuracy in float and by bits, the worst peak, sizes, and the CPU seconds of the training."""
    return {
        "float": record.accuracy,
        **{f"w{q.weight_bits}a{q.activation_bits} {q.scales}": q.accuracy for q in record.quantized},
        "worst_peak": round(record.peaks[0].peak_over_rms, 3),
        "worst_site": record.peaks[0].site,
        "mean_peak": round(record.mean_peak, 3),
        "bytes": {"float": record.float_bytes, **record.bytes_by_weight_bits},
        "cpu_seconds": round(seconds, 1),
    }
