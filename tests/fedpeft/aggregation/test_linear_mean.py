"""The new state: exact rounding, agreement with Flower's FedAvg, memory independent of the number of clients."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from aggregation_deltas import numpy_mean, random_delta

from fedpeft.aggregation.fixed_point import plan
from fedpeft.aggregation.linear_mean import LinearMean
from fedpeft.errors import DeltaRefused, FedPeftError

SHAPES = {"a": (4, 33), "b": (70_001,), "empty": (0,)}
WEIGHTS = [3, 1, 0, 900]


def start_state(seed: int = 9) -> dict[str, torch.Tensor]:
    return random_delta(SHAPES, seed, size=1.0).tensors


@pytest.mark.parametrize("precision", ["fixed", "float32"])
def test_new_state_is_start_plus_the_weighted_mean(precision):
    start, deltas = start_state(), [random_delta(SHAPES, k, 1e-3) for k in range(4)]
    mean = LinearMean(start, plan(SHAPES, 1.0, 1 << 20), precision)
    for delta, weight in zip(deltas, WEIGHTS, strict=True):
        mean.fold(delta, weight)
    state = mean.commit()
    for name in SHAPES:
        expected = start[name].double().numpy() + numpy_mean(deltas, WEIGHTS, name)
        np.testing.assert_allclose(state[name].double().numpy(), expected, rtol=2**-23, atol=2**-22)
        assert state[name].dtype == torch.float32


def test_fixed_point_rounds_once_to_float32():
    start, delta = start_state(), random_delta(SHAPES, 1, 1e-3)
    mean = LinearMean(start, plan(SHAPES, 1.0, 8))
    mean.fold(delta, 8)
    exact = start["b"].double() + mean.accumulator.mean("b")
    assert torch.equal(mean.commit()["b"], exact.float())


def test_commit_after_removal_equals_a_run_without_the_client():
    start, deltas = start_state(), [random_delta(SHAPES, k) for k in range(3)]
    spec = plan(SHAPES, 1.0, 1000)
    with_all, without = LinearMean(start, spec), LinearMean(start, spec)
    for delta in deltas:
        with_all.fold(delta, 5)
    for delta in deltas[1:]:
        without.fold(delta, 5)
    with_all.commit()
    with_all.remove(deltas[0], 5)
    one, other = with_all.commit(), without.commit()
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_agrees_with_flower_s_fedavg_to_float32_rounding():
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    deltas, weights = [random_delta(SHAPES, k, 1e-3) for k in range(4)], [3, 1, 40, 900]
    records = [
        RecordDict({"arrays": ArrayRecord(d.tensors), "metrics": MetricRecord({"n": w})})
        for d, w in zip(deltas, weights, strict=True)
    ]
    theirs = aggregate_arrayrecords(records, "n").to_torch_state_dict()
    mean = LinearMean({name: torch.zeros(shape) for name, shape in SHAPES.items()}, plan(SHAPES, 1.0, 1000))
    for delta, weight in zip(deltas, weights, strict=True):
        mean.fold(delta, weight)
    ours = mean.commit()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)


def test_float32_mode_refuses_bad_deltas_and_restores_the_sum_up_to_rounding():
    mean = LinearMean(start_state(), plan(SHAPES, 1.0, 1000), "float32")
    mean.fold(random_delta(SHAPES, 0), 3)
    before = mean.accumulator.mean("a")
    bad = random_delta(SHAPES, 1)
    bad.tensors["b"][-1] = float("nan")
    with pytest.raises(DeltaRefused, match="NaN"):
        mean.fold(bad, 5)
    torch.testing.assert_close(mean.accumulator.mean("a"), before, rtol=0, atol=1e-7)
    assert mean.accumulator.total_weight == 3


def test_a_start_state_that_does_not_fit_is_an_error():
    spec = plan(SHAPES, 1.0, 10)
    with pytest.raises(FedPeftError, match="missing from the starting state"):
        LinearMean({}, spec)
    with pytest.raises(FedPeftError, match="must be float32"):
        LinearMean({**start_state(), "a": torch.zeros(4, 33, dtype=torch.float64)}, spec)
    with pytest.raises(FedPeftError, match="is no precision"):
        LinearMean(start_state(), spec, "float16")


def test_memory_does_not_grow_with_the_number_of_clients():
    """Peak resident memory of a fresh process, 2 and 40 clients of 8 MB each: the same within 4 MB."""
    script = textwrap.dedent(
        """
        import resource, sys
        import torch
        from aggregation_deltas import random_delta
        from fedpeft.aggregation.fixed_point import plan
        from fedpeft.aggregation.linear_mean import LinearMean
        torch.set_num_threads(1)
        shapes = {"w": (2048, 1024)}
        mean = LinearMean({"w": torch.zeros(2048, 1024)}, plan(shapes, 1.0, 1000))
        for k in range(int(sys.argv[1])):
            mean.fold(random_delta(shapes, k), 3)
        mean.commit()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
    )
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(clients)],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parent,
            ).stdout
        )
        for clients in (2, 40)
    ]
    assert peaks[1] - peaks[0] < 4096
