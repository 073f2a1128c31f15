# SPDX-License-Identifier: Apache-2.0
"""`layer_table`: the record of errors of tensors in an evaluation."""

from __future__ import annotations

from calib.evaluation.layers import LARGEST_DIFFERENCE_DB, LayerErrors, TensorError
from calib.schema.evaluation import LayerTable, TensorRow

__all__ = ["layer_table"]

_WORST = 10


def layer_table(found: LayerErrors, label: str, blocks: int) -> LayerTable:
    """Errors as a record.

    Args:
        found: the errors.
        label: of the row that they are about.
        blocks: how many blocks were run.
    """
    return LayerTable(
        label=label,
        blocks=blocks,
        median_difference_db=found.median_difference_db,
        limit_db=LARGEST_DIFFERENCE_DB,
        beyond_limit=[tensor.name for tensor in found.disagreements()],
        worst=[tensor.name for tensor in found.worst(_WORST)],
        tensors=[_tensor(tensor) for tensor in found.tensors.values()],
    )


def _tensor(tensor: TensorError) -> TensorRow:
    running, isolated, expected = tensor.running, tensor.isolated, tensor.expected
    return TensorRow(
        name=tensor.name,
        running_sqnr_db=None if running is None else running.sqnr_db,
        running_rel_mae=None if running is None else running.rel_mae,
        isolated_sqnr_db=None if isolated is None else isolated.sqnr_db,
        isolated_rel_mae=None if isolated is None else isolated.rel_mae,
        isolated_zeroed=None if isolated is None else isolated.zeroed,
        expected_sqnr_db=None if expected is None else expected.sqnr_db,
        difference_db=tensor.difference_db,
    )
