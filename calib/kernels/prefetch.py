# SPDX-License-Identifier: Apache-2.0
"""`prefetch`: asks the processor for memory that compiled code will read soon.

Counting into a histogram keeps a core busy without reading ahead, so the next row would be waited for.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["prefetch"]

_READ, _KEEP_CLOSE, _DATA = 0, 3, 1


@intrinsic
def prefetch(typing_context: Any, array: Any, row: Any, column: Any) -> Any:
    """``prefetch(array, row, column)`` in compiled code: the cache line of ``array[row, column]``, a hint only."""
    signature = types.void(array, row, column)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        held = context.make_array(kind)(context, builder, arguments[0])
        place = [context.cast(builder, arguments[i], signature.args[i], types.intp) for i in (1, 2)]
        shape, strides = (cgutils.unpack_tuple(builder, part) for part in (held.shape, held.strides))
        element = cgutils.get_item_pointer2(
            context, builder, held.data, shape, strides, kind.layout, place, wraparound=False
        )
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind_of_call = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        call = cgutils.get_or_insert_function(builder.module, kind_of_call, "llvm.prefetch.p0i8")
        builder.call(call, [builder.bitcast(element, byte), word(_READ), word(_KEEP_CLOSE), word(_DATA)])
        return context.get_dummy_value()

    return signature, generate
