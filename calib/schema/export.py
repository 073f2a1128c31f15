# SPDX-License-Identifier: Apache-2.0
"""`calib_export.json`: what an exported folder holds, so that it can be checked later."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calib.schema.provenance import Producer, Strict

__all__ = ["ExportManifest"]


class ExportManifest(Strict):
    """The whole of `calib_export.json`."""

    format: Literal["calib.export"] = "calib.export"
    version: str = "1.0"
    producer: Producer
    to: str = Field(description="Name of the format")
    variant: str = ""
    model_name: str
    model_fingerprint: str = Field(description="Of the checkpoint that was measured and exported")
    tokenizer_sha256: str | None = None
    dtype: str = Field(description="Of the weights while measured, and of what stays in float here")
    quantized: list[str] = Field(description="Modules, or tensors, with a scale")
    in_float: dict[str, str] = Field(default_factory=dict, description="Modules without one -> the reason")
    kv_cache: list[str] = Field(default_factory=list, description="Attention modules with key and value scales")
    notes: list[str] = Field(default_factory=list)
    files: dict[str, str] = Field(description="File name -> sha256 of every other file of the folder")
