# SPDX-License-Identifier: Apache-2.0
"""Published protocols, followed exactly, beside their published numbers."""
