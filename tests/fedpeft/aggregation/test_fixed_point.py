"""The sum of deltas: independent of order, invertible to the last bit, inside its stated error, never overflowing."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from aggregation_deltas import MemoryDelta, numpy_mean, random_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.aggregation import fixed_point
from fedpeft.aggregation.fixed_point import FixedPointAccumulator, plan
from fedpeft.errors import DeltaRefused, FedPeftError, IntegrityError

SHAPES = {"a": (3, 17), "b": (29, 3), "bias": (5,), "scalar": (), "empty": (0, 4)}
WEIGHTS = st.lists(st.integers(0, 5000), min_size=1, max_size=6).filter(sum)
EASY = settings(max_examples=25, deadline=None)


def folded(spec, deltas, weights) -> FixedPointAccumulator:
    accumulator = FixedPointAccumulator(spec)
    for delta, weight in zip(deltas, weights, strict=True):
        accumulator.fold(delta, weight)
    return accumulator


@EASY
@given(weights=WEIGHTS, seed=st.integers(0, 2**20), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_mean_is_the_float64_mean_within_the_error_bound(weights, seed, dtype):
    deltas = [random_delta(SHAPES, seed + k, dtype=dtype) for k in range(len(weights))]
    spec = plan(SHAPES, 1.0, 1 << 20)
    accumulator = folded(spec, deltas, weights)
    for name in SHAPES:
        expected = numpy_mean(deltas, weights, name)
        error = np.abs(accumulator.mean(name).numpy() - expected)
        assert error.max(initial=0.0) <= spec.error_bound(name) <= accumulator.error_bound()
        assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(expected)


@EASY
@given(weights=WEIGHTS, seed=st.integers(0, 2**20), data=st.data())
def test_order_of_arrival_leaves_no_trace(weights, seed, data):
    deltas = [random_delta(SHAPES, seed + k) for k in range(len(weights))]
    order = data.draw(st.permutations(range(len(weights))))
    spec = plan(SHAPES, 1.0, 1 << 20)
    one = folded(spec, deltas, weights)
    other = folded(spec, [deltas[k] for k in order], [weights[k] for k in order])
    assert one.to_bytes() == other.to_bytes()


@EASY
@given(weights=WEIGHTS, seed=st.integers(0, 2**20), data=st.data())
def test_removing_in_any_order_restores_the_bits_of_never_having_been_there(weights, seed, data):
    deltas = [random_delta(SHAPES, seed + k) for k in range(len(weights))]
    gone = data.draw(st.lists(st.sampled_from(range(len(weights))), unique=True))
    spec = plan(SHAPES, 1.0, 1 << 20)
    accumulator = folded(spec, deltas, weights)
    for k in gone:
        accumulator.remove(deltas[k], weights[k])
    stay = [k for k in range(len(weights)) if k not in gone]
    assert accumulator.to_bytes() == folded(spec, [deltas[k] for k in stay], [weights[k] for k in stay]).to_bytes()


def test_integers_are_the_rounded_values_half_to_even():
    spec = plan({"x": (6,)}, 1.0, 1)
    unit = 2.0 ** -spec["x"].fraction_bits
    values = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.75, -1.25], dtype=torch.float64) * unit
    accumulator = folded(spec, [MemoryDelta({"x": values.float()})], [1])
    assert accumulator.integers("x").tolist() == [0, 2, 0, -2, 3, -1]


@pytest.mark.parametrize("max_abs", [2.0**-40, 1e-3, 0.75, 1.0, 3.0, 64.0, 2.0**60])
@pytest.mark.parametrize("limit", [1, 3, 1 << 24, (1 << 40) - 1, 1 << 40])
def test_entries_at_the_bound_and_weights_at_their_limit_do_not_overflow(max_abs, limit):
    edge = torch.tensor(max_abs)
    if float(edge) > max_abs:
        edge = torch.nextafter(edge, torch.tensor(0.0))
    spec = plan({"x": (2,)}, max_abs, limit)
    accumulator = folded(spec, [MemoryDelta({"x": torch.stack([edge, -edge])})], [limit])
    scale = 2 ** spec["x"].fraction_bits if spec["x"].fraction_bits >= 0 else 2.0 ** spec["x"].fraction_bits
    exact = limit * round(float(edge) * scale)
    assert accumulator.integers("x").tolist() == [exact, -exact]
    assert exact < 2**62
    assert abs(accumulator.mean("x")[0].item() - float(edge)) <= accumulator.error_bound()


def test_two_s_complement_wraps_in_the_integer_passes():
    top = np.array([2**63 - 1], np.int64)
    np.add(top, np.array([1], np.int64), out=top)
    assert top[0] == -(2**63)
    bits = np.array([struct.unpack("<q", struct.pack("<d", 1.5 * 2.0**20))[0]], np.int64)
    product = int(bits[0]) * 12345 % 2**64
    np.multiply(bits, 12345, out=bits)
    assert int(bits[0]) % 2**64 == product


def test_one_client_and_a_zero_weight_client():
    one, nobody = random_delta(SHAPES, 1), random_delta(SHAPES, 2)
    spec = plan(SHAPES, 1.0, 100)
    accumulator = folded(spec, [one, nobody], [7, 0])
    assert (accumulator.total_weight, accumulator.clients) == (7, 2)
    torch.testing.assert_close(accumulator.mean("a"), one.tensor("a").double(), rtol=0, atol=accumulator.error_bound())


def test_nothing_folded_has_no_mean():
    with pytest.raises(FedPeftError, match="nothing to combine"):
        FixedPointAccumulator(plan(SHAPES, 1.0, 100)).mean("a")


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (float("nan"), "not-finite"),
        (float("inf"), "not-finite"),
        (-float("inf"), "not-finite"),
        (1.0001, "out-of-bounds"),
        (-3e38, "out-of-bounds"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 70_000, -1])
def test_a_bad_entry_is_refused_and_the_sum_stays_as_it_was(value, code, dtype, position):
    shapes = {"first": (11,), "large": (300_001,)}
    spec = plan(shapes, 1.0, 1000)
    accumulator = folded(spec, [random_delta(shapes, 1)], [3])
    before = accumulator.to_bytes()
    bad = random_delta(shapes, 2)
    bad.tensors["large"][position] = value * (1.01 if abs(value) < 2 else 1)
    bad.tensors = {name: t.to(dtype) for name, t in bad.tensors.items()}
    with pytest.raises(DeltaRefused) as refusal:
        accumulator.fold(bad, 5)
    assert refusal.value.code == code
    assert refusal.value.field == "large"
    assert accumulator.to_bytes() == before


def test_a_block_whose_sum_of_squares_is_large_is_not_refused_for_it():
    values = torch.full((100_000,), 0.999)
    accumulator = folded(plan({"x": (100_000,)}, 1.0, 10), [MemoryDelta({"x": values})], [2])
    torch.testing.assert_close(accumulator.mean("x"), values.double(), rtol=0, atol=accumulator.error_bound())


@pytest.mark.parametrize("weight", [-1, 101, 1.5, True])
def test_a_weight_that_is_negative_or_beyond_the_bound_is_refused(weight):
    accumulator = folded(plan(SHAPES, 1.0, 100), [random_delta(SHAPES, 0)], [1])
    before = accumulator.to_bytes()
    with pytest.raises(DeltaRefused) as refusal:
        accumulator.fold(random_delta(SHAPES, 1), weight)
    assert refusal.value.code == "weight"
    assert accumulator.to_bytes() == before


def test_the_sum_of_weights_may_reach_its_bound_but_not_pass_it():
    accumulator = folded(plan(SHAPES, 1.0, 10), [random_delta(SHAPES, 0)], [6])
    accumulator.fold(random_delta(SHAPES, 1), 4)
    with pytest.raises(DeltaRefused, match="beyond max_total_weight = 10"):
        accumulator.fold(random_delta(SHAPES, 2), 1)


def test_removing_what_was_never_folded_is_refused():
    accumulator = folded(plan(SHAPES, 1.0, 10), [random_delta(SHAPES, 0)], [2])
    with pytest.raises(DeltaRefused, match="not in the sum"):
        accumulator.remove(random_delta(SHAPES, 0), 3)


@pytest.mark.parametrize("change", ["extra", "missing", "shape"])
def test_another_layout_is_refused(change):
    delta = random_delta(SHAPES, 0)
    if change == "extra":
        delta.tensors["more"] = torch.zeros(1)
    elif change == "missing":
        del delta.tensors["bias"]
    else:
        delta.tensors["bias"] = torch.zeros(6)
    with pytest.raises(DeltaRefused) as refusal:
        FixedPointAccumulator(plan(SHAPES, 1.0, 10)).fold(delta, 1)
    assert refusal.value.code == ("shape" if change == "shape" else "names")


class FailingDelta(MemoryDelta):
    """Its disk fails at one tensor: at the first ``failures`` readings, and not afterwards."""

    failures = 1

    def chunks(self, name, elements):
        for k, piece in enumerate(super().chunks(name, elements)):
            if name == "z" and k == 1 and self.failures:
                self.failures -= 1
                raise OSError("input/output error")
            yield piece


def test_a_reader_that_fails_half_way_leaves_the_sum_as_it_was():
    shapes = {"a": (4,), "z": (fixed_point.CHUNK + 9,)}
    accumulator = folded(plan(shapes, 1.0, 10), [random_delta(shapes, 0)], [2])
    before = accumulator.to_bytes()
    with pytest.raises(OSError, match="input/output"):
        accumulator.fold(FailingDelta(random_delta(shapes, 1).tensors), 3)
    assert accumulator.to_bytes() == before


class GoneDelta(MemoryDelta):
    """Its file vanishes for good once the second tensor is asked for."""

    gone = False

    def chunks(self, name, elements):
        self.gone = self.gone or name == "z"
        if self.gone:
            raise OSError("no such file")
        yield from super().chunks(name, elements)


def test_an_accumulator_that_cannot_be_restored_says_so_instead_of_being_wrong():
    shapes = {"a": (4,), "z": (4,)}
    accumulator = folded(plan(shapes, 1.0, 10), [random_delta(shapes, 0)], [2])
    with pytest.raises(OSError, match="no such file"):
        accumulator.fold(GoneDelta(random_delta(shapes, 1).tensors), 3)
    with pytest.raises(IntegrityError, match="could not be read again"):
        accumulator.mean("a")


def test_merging_equals_folding_into_one():
    spec = plan(SHAPES, 1.0, 100)
    deltas = [random_delta(SHAPES, k) for k in range(4)]
    left, right = folded(spec, deltas[:1], [5]), folded(spec, deltas[1:], [1, 2, 3])
    left.merge(right)
    assert left.to_bytes() == folded(spec, deltas, [5, 1, 2, 3]).to_bytes()


def test_merging_another_format_is_refused():
    with pytest.raises(FedPeftError, match="another fixed-point format"):
        FixedPointAccumulator(plan(SHAPES, 1.0, 100)).merge(FixedPointAccumulator(plan(SHAPES, 2.0, 100)))


def test_a_stored_accumulator_goes_on_where_it_was():
    spec = plan(SHAPES, 0.7, 100)
    deltas = [random_delta(SHAPES, k) for k in range(3)]
    resumed = FixedPointAccumulator.from_bytes(folded(spec, deltas[:2], [5, 1]).to_bytes())
    resumed.fold(deltas[2], 9)
    resumed.remove(deltas[0], 5)
    assert resumed.to_bytes() == folded(spec, deltas[1:], [1, 9]).to_bytes()


@pytest.mark.parametrize("data", [b"", b"\x80\x05pickle", struct.pack("<Q", 2) + b"{}"])
def test_bytes_that_are_no_accumulator_are_refused(data):
    with pytest.raises(IntegrityError, match="not a stored accumulator"):
        FixedPointAccumulator.from_bytes(data)


@pytest.mark.parametrize(
    ("bound", "limit", "field"),
    [
        (0.0, 10, "aggregation.max_abs"),
        (float("nan"), 10, "aggregation.max_abs"),
        (1.0, 0, "aggregation.max_total_weight"),
        (1.0, 2**50, "aggregation.max_total_weight"),
    ],
)
def test_bounds_out_of_range_are_user_errors(bound, limit, field):
    with pytest.raises(FedPeftError) as error:
        plan(SHAPES, bound, limit)
    assert error.value.field == field


def test_a_bound_per_tensor_gives_a_scale_per_tensor():
    spec = plan({"a": (1,), "b": (1,)}, {"a": 1.0, "b": 8.0}, 10)
    assert spec["a"].fraction_bits == spec["b"].fraction_bits + 3
