# SPDX-License-Identifier: Apache-2.0
"""Writes scales in the formats that deployment stacks read."""
