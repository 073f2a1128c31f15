# SPDX-License-Identifier: Apache-2.0
"""Quantized models: fake quantization with exact integer semantics, and true INT8 execution."""
