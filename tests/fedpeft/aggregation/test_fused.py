"""The compiled fold: the bits of the numpy path, its refusals in the same words, and numpy where numba is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aggregation_deltas import MemoryDelta, random_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.aggregation import fused
from fedpeft.aggregation.fixed_point import CHUNK, FixedPointAccumulator, plan
from fedpeft.aggregation.linear_mean import FloatAccumulator, LinearMean
from fedpeft.errors import DeltaRefused

DTYPES = [torch.float32, torch.bfloat16]
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
EXAMPLES = settings(max_examples=60, deadline=None)


def both(spec, kind=FixedPointAccumulator):
    return kind(spec, compiled=True), kind(spec, compiled=False)


def refusal_of(accumulator, delta, weight) -> tuple[str, str]:
    with pytest.raises(DeltaRefused) as refusal:
        accumulator.fold(delta, weight)
    return refusal.value.code, str(refusal.value)


@st.composite
def values_within(draw, bound: float):
    """A 1-D tensor that mixes ordinary values, ties, subnormals, zeros of both signs and entries at the bound."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.one_of(st.integers(0, 200), st.sampled_from([4095, 4096, 4097, 32_769])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = (torch.rand(size, generator=generator) * 2 - 1) * bound * 2.0 ** draw(st.integers(-50, 0))
    edge = float(fused.float32_bound(bound))
    unit = 2.0 ** -plan({"x": ()}, bound, 1)["x"].fraction_bits
    for special in (edge, -edge, 0.0, -0.0, 1e-45, 0.5 * unit, 1.5 * unit, -2.5 * unit):
        if size and draw(st.booleans()):
            values[draw(st.integers(0, size - 1))] = special
    rounded = values.to(dtype)  # rounding to 16 bits can pass the bound
    return torch.where(rounded.abs() <= edge, rounded, torch.zeros((), dtype=dtype))


@needs_numba
def test_every_loop_compiles_with_vector_instructions(tmp_path):
    """In a process with an empty cache: code that numba read from its cache cannot be inspected."""
    code = """
import torch
from fedpeft.aggregation import fused
for dtype in (torch.float32, torch.bfloat16):
    for loop in (fused.fixed_fold(dtype), fused.float_fold(dtype)):
        assert loop is not None
        assert all("x float>" in ir or "x double>" in ir for ir in loop.inspect_llvm().values())
assert fused.fixed_commit() is not None
assert fused.float_commit() is not None
"""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_numba
@EXAMPLES
@given(data=st.data(), bound=st.sampled_from([2.0**-40, 0.7, 1.0, 64.0, 3e4, 2.0**60]))
def test_the_bits_are_those_of_the_numpy_path(data, bound):
    limit = data.draw(st.sampled_from([1 << 10, 1 << 24, 1 << 40]))
    deltas = []
    first = data.draw(values_within(bound))
    spec = plan({"x": tuple(first.shape)}, bound, limit)
    fast, slow = both(spec)
    for k in range(3):
        sign = -1 if k == 1 else 1
        deltas.append((MemoryDelta({"x": first.roll(k) * sign}), data.draw(st.integers(0, limit // 3))))
    for delta, weight in deltas:
        fast.fold(delta, weight)
        slow.fold(delta, weight)
    assert fast.to_bytes() == slow.to_bytes()
    assert np.array_equal(fast._sums["x"], slow._sums["x"])  # with the magic in it
    if fast.total_weight:
        assert torch.equal(fast.mean("x"), slow.mean("x"))
    fast.remove(*deltas[1])
    slow.remove(*deltas[1])
    assert fast.to_bytes() == slow.to_bytes()


@needs_numba
def test_a_sum_may_change_between_the_two_paths():
    shapes = {"a": (70_001,), "b": (3, 5), "empty": (0,)}
    deltas = [random_delta(shapes, k, dtype=DTYPES[k % 2]) for k in range(4)]
    mixed, plain = FixedPointAccumulator(plan(shapes, 1.0, 100)), FixedPointAccumulator(plan(shapes, 1.0, 100), False)
    for k, delta in enumerate(deltas):
        mixed.compiled = k % 2 == 0
        mixed.fold(delta, k + 1)
        plain.fold(delta, k + 1)
    mixed.remove(deltas[0], 1)
    plain.remove(deltas[0], 1)
    assert mixed.to_bytes() == plain.to_bytes()


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 63, 64, 40_000, CHUNK + 70, -1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.01, -3e38])
def test_a_bad_entry_is_refused_in_the_same_words_and_leaves_no_trace(dtype, position, bad):
    shapes = {"first": (100,), "x": (CHUNK + 100,)}
    for kind in (FixedPointAccumulator, FloatAccumulator):
        fast, slow = both(plan(shapes, 1.0, 100), kind)
        good, delta = random_delta(shapes, 1, dtype=dtype), random_delta(shapes, 2, dtype=dtype)
        delta.tensors["x"][position] = bad
        for accumulator in (fast, slow):
            accumulator.fold(good, 3)
        before = fast._sums["x"].copy() if kind is FixedPointAccumulator else fast._sums["x"].clone()
        assert refusal_of(fast, delta, 7) == refusal_of(slow, delta, 7)
        assert (fast.total_weight, fast.clients) == (3, 1)
        if kind is FixedPointAccumulator:
            assert np.array_equal(fast._sums["x"], before)
            assert fast.to_bytes() == slow.to_bytes()
        else:
            torch.testing.assert_close(fast._sums["x"], before, rtol=0, atol=1e-7)


@needs_numba
def test_an_entry_at_the_bound_passes_and_its_neighbour_does_not():
    for bound in (0.7, 1.0, 64.0):  # 0.7 is no float32: the largest float32 below it is the last that passes
        edge = torch.tensor([float(fused.float32_bound(bound))])
        beyond = torch.nextafter(edge, torch.tensor([float("inf")]))
        accumulator = FixedPointAccumulator(plan({"x": (1,)}, bound, 100))
        accumulator.fold(MemoryDelta({"x": -edge}), 1)
        assert refusal_of(accumulator, MemoryDelta({"x": -beyond}), 1)[0] == "out-of-bounds"


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_mode_has_the_arithmetic_of_torch(dtype):
    """Correctly rounded ``sum + w x``, computed here in float64, where product and sum of float32 are exact enough."""
    shapes = {"x": (10_007,)}
    accumulator, expected = FloatAccumulator(plan(shapes, 1.0, 1000)), torch.zeros(10_007)
    for k in range(4):
        delta = random_delta(shapes, k, dtype=dtype)
        accumulator.fold(delta, 117 + k)
        expected = (expected.double() + (117 + k) * delta.tensor("x").double()).float()
    assert torch.equal(accumulator._sums["x"], expected)


@needs_numba
def test_strided_pieces_are_folded_too():
    class Strided(MemoryDelta):
        def chunks(self, name, elements):
            yield self.tensors[name].repeat_interleave(2)[::2]

    delta = random_delta({"x": (999,)}, 1)
    fast, slow = both(plan({"x": (999,)}, 1.0, 10))
    fast.fold(Strided(delta.tensors), 3)
    slow.fold(delta, 3)
    assert fast.to_bytes() == slow.to_bytes()


@needs_numba
@pytest.mark.parametrize("precision", ["fixed", "float32"])
def test_a_new_state_has_the_same_bytes(precision):
    shapes = {"a": (300, 401), "b": (7,), "empty": (0,)}
    start, spec = random_delta(shapes, 9, 1.0).tensors, plan(shapes, 1.0, 1 << 20)
    start["a"] = start["a"].t().contiguous().t()
    mean = LinearMean(start, spec, precision)
    for k in range(3):
        mean.fold(random_delta(shapes, k), 1000 + k)
    fast = mean.commit()
    mean.accumulator.compiled = False
    slow = mean.commit()
    assert all(torch.equal(fast[name], slow[name]) for name in shapes)


FOLD = """
import hashlib, logging, sys, types
logging.basicConfig(format="%(message)s", level=logging.INFO)
{before}
import torch
from aggregation_deltas import random_delta
from fedpeft.aggregation import fused
from fedpeft.aggregation.fixed_point import FixedPointAccumulator, plan
shapes = {{"x": (70001,), "y": (9,)}}
accumulator = FixedPointAccumulator(plan(shapes, 1.0, 100))
early = "llvmlite" in sys.modules
for k in range(3):
    accumulator.fold(random_delta(shapes, k), k + 1)
print(hashlib.sha256(accumulator.to_bytes()).hexdigest(), fused.fixed_fold(torch.float32) is not None, early)
"""


def fold_in_new_process(before: str = "") -> tuple[str, bool, bool, list[str]]:
    """Digest of a sum, whether it was folded by a compiled loop, whether the compiler came early, log lines."""
    done = subprocess.run(
        [sys.executable, "-c", FOLD.format(before=before)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    digest, compiled, early = done.stdout.split()
    return digest, compiled == "True", early == "True", [s for s in done.stderr.splitlines() if "numpy" in s]


@pytest.fixture(scope="module")
def numpy_digest() -> str:
    shapes = {"x": (70_001,), "y": (9,)}
    accumulator = FixedPointAccumulator(plan(shapes, 1.0, 100), compiled=False)
    for k in range(3):
        accumulator.fold(random_delta(shapes, k), k + 1)
    return hashlib.sha256(accumulator.to_bytes()).hexdigest()


@pytest.mark.parametrize(
    "hindrance",
    ["sys.modules['numba'] = None", "sys.modules['numba'] = types.ModuleType('numba')"],
    ids=["not installed", "broken"],
)
def test_without_numba_numpy_folds_and_the_log_has_one_line(hindrance, numpy_digest):
    digest, compiled, _, lines = fold_in_new_process(hindrance)
    assert not compiled
    assert len(lines) == 1
    assert lines[0].startswith("sums are folded by numpy")
    assert digest == numpy_digest


@needs_numba
def test_the_compiler_is_loaded_at_the_first_fold_and_not_before(numpy_digest):
    assert fold_in_new_process() == (numpy_digest, True, False, [])


@needs_numba
def test_it_compiles_where_no_cache_folder_can_be_written(numpy_digest):
    """A read-only installation without a home: numba has no place for compiled code."""
    nowhere = "from numba.core import caching; caching.CacheImpl._locator_classes = []"
    digest, compiled, _, lines = fold_in_new_process(nowhere)
    assert (digest, compiled, lines) == (numpy_digest, True, [])


@needs_numba
def test_a_loop_that_does_not_compile_leaves_the_numpy_path(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("LLVM ERROR: unknown target\nmore")

    fused._compiled.cache_clear()
    monkeypatch.setattr(fused._loops(), "compile_fold", broken)
    try:
        with caplog.at_level(logging.WARNING):
            accumulator = FixedPointAccumulator(plan({"x": (5,)}, 1.0, 10))
            accumulator.fold(random_delta({"x": (5,)}, 0), 1)
            accumulator.fold(random_delta({"x": (5,)}, 1), 1)
        assert [r.message for r in caplog.records] == [
            "fold of fixed float32 goes through numpy: numba cannot compile: LLVM ERROR: unknown target"
        ]
        assert accumulator.clients == 2
    finally:
        fused._compiled.cache_clear()
