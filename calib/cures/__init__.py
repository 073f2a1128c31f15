# SPDX-License-Identifier: Apache-2.0
"""Cures: function-preserving changes that make a tensor quantizable."""
