"""Folding in one compiled pass where numba is installed (the extra ``fast``), with the same bits as without it.

numpy and torch have no fused operation for *check, widen, round, multiply, add*. With numba these become one loop over
memory (:mod:`fedpeft.aggregation.fused_loops`), not quite twice as fast in fixed point (benchmarks/aggregate.py).
Nothing else depends on it: every function here answers ``None`` where numba is missing or cannot compile on this
machine (one line in the log says so), and the callers then take their numpy path.

numba is imported at the first fold, not with this module: it costs about 0.7 seconds and 120 MiB, which a process that
folds nothing should not pay. The first fold ever compiles for half a second more; numba keeps the result on disk.

    pip install "fedpeft[fast]"

``NUMBA_CACHE_DIR`` moves the stored code, ``NUMBA_DISABLE_JIT=1`` selects the numpy path.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_log = logging.getLogger(__name__)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def _loops() -> Any:
    """The module of compiled loops, or ``None``; decided once in a process."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            _log.info("sums are folded by numpy: NUMBA_DISABLE_JIT is set")
            return None
        from fedpeft.aggregation import fused_loops
    except ModuleNotFoundError as error:
        if error.name != "numba":
            _log.warning("sums are folded by numpy: numba cannot be imported: %s", error)
        else:
            _log.info("sums are folded by numpy; the extra fedpeft[fast] makes this faster")
        return None
    except Exception as error:  # a numba that does not fit this numpy raises ImportError, SystemError, ...
        _log.warning("sums are folded by numpy: numba cannot be used: %s", _first_line(error))
        return None
    return fused_loops


@functools.cache
def _compiled(step: str, kind: str, dtype: str = "float32") -> Any:
    loops = _loops()
    if loops is None:
        return None
    try:
        return loops.compile_commit(kind) if step == "commit" else loops.compile_fold(kind, dtype)
    except Exception as error:  # whatever LLVM or the cache folder raise here, numpy can still fold
        _log.warning("%s of %s %s goes through numpy: numba cannot compile: %s", step, kind, dtype, _first_line(error))
        return None


def fixed_fold(dtype: torch.dtype) -> Callable[..., int] | None:
    """:func:`fused_loops.fold_fixed` for values of ``dtype``, or ``None``."""
    return _compiled("fold", "fixed", _NAMES[dtype]) if dtype in _NAMES else None


def float_fold(dtype: torch.dtype) -> Callable[..., int] | None:
    """:func:`fused_loops.fold_float` for values of ``dtype``, or ``None``."""
    return _compiled("fold", "float", _NAMES[dtype]) if dtype in _NAMES else None


def fixed_commit() -> Callable[..., None] | None:
    """:func:`fused_loops.commit_fixed`, or ``None``."""
    return _compiled("commit", "fixed")


def float_commit() -> Callable[..., None] | None:
    """:func:`fused_loops.commit_float`, or ``None``."""
    return _compiled("commit", "float")


def as_array(values: torch.Tensor) -> np.ndarray:
    """1-D float32 as it is, bfloat16 as the uint16 of its bits; contiguous.

    >>> as_array(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    array([16256, 49152], dtype=uint16)
    """
    values = values.detach().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.numpy()


def float32_bound(max_abs: float) -> np.float32:
    """The largest float32 that is no larger: a float32 is within one bound exactly if it is within the other."""
    bound = np.float32(max_abs)
    return np.nextafter(bound, np.float32(0)) if float(bound) > max_abs else bound


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
