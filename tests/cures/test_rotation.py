# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from calib.cures.rotation import Rotation

WIDTHS = {64: True, 576: True, 896: True, 1536: True, 80: True, 2: True, 7: False, 44: True, 86: False}


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_goes_back(width: int) -> None:
    rotation = Rotation(width, seed=1)
    matrix = rotation.rotate(torch.eye(width))
    wide = matrix.double()  # so that the sums of this check add no error of their own
    torch.testing.assert_close(wide @ wide.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.rotate_back(matrix), torch.eye(width), rtol=0, atol=2e-6)
    x = torch.randn(3, 5, width)
    torch.testing.assert_close(rotation.rotate(x), x @ matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_channel_reaches_every_other_as_evenly_as_is_known(width: int) -> None:
    rotation = Rotation(width, seed=1)
    matrix = rotation.rotate(torch.eye(width)).abs()
    assert rotation.even is WIDTHS[width]
    largest = (1.0 if rotation.even else 2**0.5) * width**-0.5
    assert float(matrix.max()) <= largest * (1 + 1e-5)


@pytest.mark.parametrize("width", [2, 7, 64, 86, 576])
def test_one_that_keeps_the_mean_does_and_is_nearly_as_even(width: int) -> None:
    rotation = Rotation(width, seed=1, keeps_mean=True)
    matrix = rotation.rotate(torch.eye(width))
    wide = matrix.double()
    torch.testing.assert_close(wide @ wide.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=2e-6)
    torch.testing.assert_close(rotation.rotate_back(matrix), torch.eye(width), rtol=0, atol=2e-6)
    torch.testing.assert_close(rotation.rotate(torch.ones(width)), torch.ones(width), rtol=0, atol=1e-5)
    x = torch.randn(5, width)
    torch.testing.assert_close(rotation.rotate(x).mean(-1), x.mean(-1), rtol=0, atol=1e-5)
    if width >= 64:  # a single channel becomes the image of the ones
        largest = matrix.abs().amax(1) * width**0.5
        assert float(largest.median()) < 2
        assert float(largest.max()) < 5


def test_the_seed_decides() -> None:
    x = torch.randn(2, 64)
    assert torch.equal(Rotation(64, 1).rotate(x), Rotation(64, 1).rotate(x))
    assert not torch.equal(Rotation(64, 1).rotate(x), Rotation(64, 2).rotate(x))
