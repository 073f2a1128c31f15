# SPDX-License-Identifier: Apache-2.0
"""`python -m calib`."""

from __future__ import annotations

from calib.cli import main

main()
