# SPDX-License-Identifier: Apache-2.0
"""What to say when a model's own code fails while it is measured: memory first, then anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from calib.errors import CalibError, ModelError
from calib.models import OpenedModel
from calib.models.takes import takes

__all__ = ["explained"]

# how the allocators of torch's CPU and CUDA back ends say it in an ordinary RuntimeError
_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")


@contextmanager
def explained(opened: OpenedModel, shape: tuple[int, ...] | None = None, *, measuring: bool = True) -> Iterator[None]:
    """Within the block an error of the model becomes one line that says what helps; the chain keeps the rest.

    Args:
        opened: the model.
        shape: of the token ids that it runs on, ``(rows, tokens)``, or of pictures or sound; None while its weights
            are measured.
        measuring: whether fewer statistics would help.

    Raises:
        ModelError: memory did not suffice, or the model cannot run on such token ids.
    """
    try:
        yield
    except CalibError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(opened, shape, measuring=measuring) from error
    except Exception as error:  # of any model class, also of code that a checkpoint brings
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY):
            raise _out_of_memory(opened, shape, measuring=measuring) from error
        if shape is None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        ids = len(shape) == 2
        more = takes(opened.model) > {"text"}
        needs = "that -d has all that it needs: it takes more than text" if more else "that the model takes token ids"
        helps = f"check --max-length against the model's context, and {needs}"
        raise ModelError(
            f"{opened.provenance.name}: its forward pass failed on {'token ids' if ids else 'inputs'} "
            f"{' x '.join(map(str, shape))} ({reason}); "
            + (helps if ids else "check that the processor beside the weights belongs to this model")
        ) from error


def _out_of_memory(opened: OpenedModel, shape: tuple[int, ...] | None, *, measuring: bool) -> ModelError:
    weights = sum(parameter.nbytes for parameter in opened.model.parameters())
    wide = any(parameter.dtype == torch.float32 for parameter in opened.model.parameters())
    helps = ["--dtype bfloat16"] if wide else []
    if shape is None:
        where = "while its weights were measured"
        helps.append("--device with more memory")
    else:
        where = f"in a batch of {' x '.join(map(str, shape))}" + (" tokens" if len(shape) == 2 else "")
        if shape[0] > 1:
            helps.insert(0, f"--batch-size {shape[0] // 2}")
        elif len(shape) == 2:
            helps.insert(0, f"--max-length {max(2, shape[1] // 2)}")
        helps += ["--statistics ranges"] if measuring else []
    return ModelError(
        f"{opened.provenance.name}: out of memory {where}, beside {weights / 1e9:.1f} GB of weights; "
        f"pass {' or '.join(helps) or '--device with more memory'}"
    )
