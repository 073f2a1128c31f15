# SPDX-License-Identifier: Apache-2.0
"""pydantic models of every file that leaves the program: versioned, strict, published as JSON Schema."""
