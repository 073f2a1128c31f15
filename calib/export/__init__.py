# SPDX-License-Identifier: Apache-2.0
"""Writes scales in the formats that deployment stacks read, one file each."""

from __future__ import annotations

from calib.export.compressed_tensors import CheckpointSummary, write_checkpoint

__all__ = ["CheckpointSummary", "write_checkpoint"]
