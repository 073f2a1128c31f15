# SPDX-License-Identifier: Apache-2.0
"""Open a model by hub id, folder or GGUF file, with the hashes that say exactly which model it was."""

from __future__ import annotations

from calib.models.checks import check_token_ids
from calib.models.gguf import convert_gguf
from calib.models.open import OpenedModel, open_model
from calib.models.provenance import module_provenance

__all__ = ["OpenedModel", "check_token_ids", "convert_gguf", "module_provenance", "open_model"]
