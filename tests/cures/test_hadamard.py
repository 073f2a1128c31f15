# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from calib.cures.hadamard import hadamard, has_hadamard, power_of_two_in
from calib.errors import UsageError


@pytest.mark.parametrize("order", [1, 2, 8, 512, 12, 20, 28, 36, 60, 96, 192])
def test_all_entries_are_equally_large_and_rows_orthonormal(order: int) -> None:
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), rtol=0, atol=1e-5)
    assert bool((matrix.abs() == matrix[0, 0].abs()).all())


def test_powers_of_two_are_their_own_inverse() -> None:
    assert torch.equal(hadamard(64), hadamard(64).T)


@pytest.mark.parametrize("order", [0, 3, 6, 18, -4])
def test_other_orders_are_refused(order: int) -> None:
    assert not has_hadamard(order)
    with pytest.raises(UsageError, match="none is known here"):
        hadamard(order)


def test_the_power_of_two_in_a_width() -> None:
    assert [power_of_two_in(n) for n in (1536, 576, 96, 7)] == [512, 64, 32, 1]
