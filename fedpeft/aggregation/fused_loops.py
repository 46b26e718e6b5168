"""The compiled loops behind :mod:`fedpeft.aggregation.fused`; importing this needs numba.

One pass reads a value, checks it, rounds it and adds it: memory is touched once, where the numpy path makes five passes
over a block in the cache. Arithmetic is the same operation by operation, and compiled without reassociation or
contraction, so the bits are those of the numpy path.

The loops go by lines of 64 elements. A line is checked before any of it is added, so that the sum never holds NaN or
infinity. The lines to come are asked for early (``prefetch``): three streams are more than the processor follows by
itself, and this is worth a third to a half on data in memory. Distances were the best of a sweep (64 to 1024 elements)
on one Xeon; they are hints, and never change a result. Slices instead of index arithmetic, because numba's support of
negative indices would keep LLVM from using vector instructions.

The functions are at module level because only then can numba store them on disk between processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # elements between two checks
AHEAD_VALUES = 1024  # elements that values are prefetched ahead, 4 KiB of float32
AHEAD_SUM = 512  # elements that the sum is prefetched ahead, 4 KiB of int64


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, kept beside the source or, where that is read-only, in the user's cache folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither can be written: compile in every process
        return njit(nogil=True)(function)


@intrinsic
def _prefetch(typing: Any, array: Any, index: Any) -> Any:  # pragma: no cover - runs inside the compiler
    """Ask for the cache line of ``array[index]``. The index may lie outside: a prefetch never faults."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.gep(context.make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read_or_write, keep, data = word(0), word(3), word(1)
        builder.call(function, [builder.bitcast(pointer, byte), read_or_write, keep, data])
        return context.get_dummy_value()

    return types.void(array, index), emit


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:  # pragma: no cover - runs inside the compiler
    """``a * b + c`` in float32, rounded once, as torch's ``add_(x, alpha=w)`` has it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def _widen(typing: Any, value: Any) -> Any:  # pragma: no cover - runs inside the compiler
    """A float32 as it is; bfloat16, given as the uint16 of its bits, as float32: they are its upper half."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(value), emit


@_compiled
def fold_fixed(values: Any, total: Any, bound: Any, magic: Any, weight: Any) -> Any:  # pragma: no cover
    """``total += weight * bits(values + magic)`` line by line, up to the first line with an entry beyond ``bound``.

    Args:
        values: (n,) float32, or uint16 with the bits of bfloat16.
        total: (n,) int64, added to modulo 2^64.
        bound: float32, the largest magnitude allowed.
        magic: float64, see :mod:`fedpeft.aggregation.fixed_point`.
        weight: int64.

    Returns:
        How many entries were added: n, or the start of the refused line.
    """
    for begin in range(0, values.size, LINE):
        line, part = values[begin : begin + LINE], total[begin : begin + LINE]
        for k in range(0, LINE, 8):  # 8 int64 fill a cache line
            _prefetch(total, begin + AHEAD_SUM + k)
        for k in range(0, LINE, 16):
            _prefetch(values, begin + AHEAD_VALUES + k)
        good = True
        for i in range(line.size):
            good &= abs(_widen(line[i])) <= bound  # false for NaN
        if not good:
            return begin
        for i in range(line.size):
            part[i] += weight * np.float64(np.float64(_widen(line[i])) + magic).view(np.int64)
    return values.size


@_compiled
def fold_float(values: Any, total: Any, bound: Any, weight: Any) -> Any:  # pragma: no cover
    """``total += weight * values`` in float32, one rounding each; otherwise as :func:`fold_fixed`."""
    for begin in range(0, values.size, LINE):
        line, part = values[begin : begin + LINE], total[begin : begin + LINE]
        for k in range(0, LINE, 16):
            _prefetch(total, begin + AHEAD_SUM + k)
            _prefetch(values, begin + AHEAD_SUM + k)
        good = True
        for i in range(line.size):
            good &= abs(_widen(line[i])) <= bound
        if not good:
            return begin
        for i in range(line.size):
            part[i] = _fma(weight, _widen(line[i]), part[i])
    return values.size


@_compiled
def commit_fixed(
    total: Any, magic_sum: Any, weight: Any, unit: Any, start: Any, new: Any
) -> None:  # pragma: no cover - machine code
    """``new = float32(start + float64(total - magic_sum) / weight * unit)``, rounded after each step in this order."""
    for i in range(total.size):
        new[i] = np.float32(np.float64(start[i]) + np.float64(total[i] - magic_sum) / weight * unit)


@_compiled
def commit_float(total: Any, weight: Any, start: Any, new: Any) -> None:  # pragma: no cover - machine code
    """``new = float32(start + float64(total) / weight)``, rounded after each step."""
    for i in range(total.size):
        new[i] = np.float32(np.float64(start[i]) + np.float64(total[i]) / weight)


_VALUES = {"float32": types.float32, "bfloat16": types.uint16}


def compile_fold(kind: str, dtype: str) -> Any:
    """One fold for ``kind`` "fixed" or "float" and values of ``dtype``, compiled now (or read from the cache)."""
    values = types.Array(_VALUES[dtype], 1, "C")
    if kind == "fixed":
        total = types.Array(types.int64, 1, "C")
        fold_fixed.compile((values, total, types.float32, types.float64, types.int64))
        return fold_fixed
    fold_float.compile((values, types.Array(types.float32, 1, "C"), types.float32, types.float32))
    return fold_float


def compile_commit(kind: str) -> Any:
    """The last step for a sum of ``kind`` "fixed" or "float", compiled now."""
    state = types.Array(types.float32, 1, "C")
    if kind == "fixed":
        total = types.Array(types.int64, 1, "C")
        commit_fixed.compile((total, types.int64, types.float64, types.float64, state, state))
        return commit_fixed
    commit_float.compile((state, types.float64, state, state))
    return commit_float
