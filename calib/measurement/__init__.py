# SPDX-License-Identifier: Apache-2.0
"""Runs a model over a corpus and keeps what was seen."""
