# SPDX-License-Identifier: Apache-2.0
"""What a person reads: tables in the terminal. The only layer that prints."""
