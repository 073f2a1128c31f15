# SPDX-License-Identifier: Apache-2.0
"""Evaluation: what quantization costs, against the float model on the same data."""
