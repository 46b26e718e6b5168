"""The exactness figure against dense float64 matrices, and the rules' reports."""

from __future__ import annotations

import json

import numpy as np
import pytest
from aggregation_deltas import MemoryDelta, Pair, Shape, random_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.aggregation import exactness
from fedpeft.aggregation.exactness import measure
from fedpeft.aggregation.fixed_point import plan
from fedpeft.aggregation.rules.registry import get_rule, rule_names
from fedpeft.errors import FedPeftError, JobError

PAIRS = (Pair("q", "q.A", "q.B", 2.0), Pair("v", "v.A", "v.B", 16 / 3))  # alpha/r = 8/4 and 16/3
SHAPES = {"q.A": (4, 31), "q.B": (17, 4), "v.A": (3, 8), "v.B": (40, 3), "bias": (6,)}
LORA = Shape(SHAPES, PAIRS)
FFA = Shape({n: s for n, s in SHAPES.items() if not n.endswith("A")}, PAIRS)


def dense(start, deltas, weights):
    """Distance, norm of M, norm of the step and of each client's update, from full matrices."""
    p = np.asarray(weights, np.float64) / sum(weights)
    error2 = target2 = step2 = 0.0
    clients2 = np.zeros(len(deltas))
    for pair in PAIRS:
        a0, b0 = start[pair.a].double().numpy(), start[pair.b].double().numpy()
        a = [a0 + (d.tensor(pair.a).double().numpy() if pair.a in d.tensors else 0) for d in deltas]
        b = [b0 + d.tensor(pair.b).double().numpy() for d in deltas]
        target = sum(w * pair.scale * y @ x for w, x, y in zip(p, a, b, strict=True))
        naive = pair.scale * np.tensordot(p, b, 1) @ np.tensordot(p, a, 1)
        error2, target2 = error2 + np.sum((target - naive) ** 2), target2 + np.sum(target**2)
        step2 += np.sum((naive - pair.scale * b0 @ a0) ** 2)
        clients2 += [np.sum((pair.scale * (y @ x - b0 @ a0)) ** 2) for x, y in zip(a, b, strict=True)]
    bias = [d.tensor("bias").double().numpy() for d in deltas]
    step2 += np.sum(np.tensordot(p, bias, 1) ** 2)
    clients2 += [np.sum(v**2) for v in bias]
    return np.sqrt(error2), np.sqrt(target2), np.sqrt(step2), np.sqrt(clients2)


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.integers(0, 100), min_size=2, max_size=6).filter(lambda w: sum(x > 0 for x in w) > 1),
    seed=st.integers(0, 2**20),
)
def test_figures_equal_dense_brute_force(weights, seed):
    start = random_delta(SHAPES, seed, 0.3).tensors
    deltas = [random_delta(SHAPES, seed + 1 + k, 0.05) for k in range(len(weights))]
    found = measure(PAIRS, start, list(zip(deltas, weights, strict=True)), ("bias",))
    distance, target, _, clients = dense(start, deltas, weights)
    assert found.distance == pytest.approx(distance, rel=1e-9)
    assert found.target_norm == pytest.approx(target, rel=1e-9)
    assert found.relative == pytest.approx(distance / target, rel=1e-9)
    np.testing.assert_allclose(found.client_norms, clients, rtol=1e-9)


def test_groups_of_clients_give_the_same_figure_as_all_at_once(monkeypatch):
    start = random_delta(SHAPES, 0, 0.3).tensors
    deltas = [(random_delta(SHAPES, 1 + k), 1 + k) for k in range(7)]
    whole = measure(PAIRS, start, deltas)
    monkeypatch.setattr(exactness, "GROUP_BYTES", 2 * 8 * (4 * 31 + 17 * 4))
    grouped = measure(PAIRS, start, deltas)
    assert grouped.distance == pytest.approx(whole.distance, rel=1e-12)
    assert grouped.target_norm == pytest.approx(whole.target_norm, rel=1e-12)


def test_a_common_factor_or_a_single_client_leaves_no_distance():
    start = random_delta(SHAPES, 0, 0.3).tensors
    common = random_delta(SHAPES, 1).tensors
    deltas = [
        MemoryDelta({**random_delta(SHAPES, k).tensors, "q.A": common["q.A"], "v.B": common["v.B"]}) for k in (2, 3)
    ]
    found = measure(PAIRS, start, [(d, 3) for d in deltas])
    assert found.distance <= max(found.floor, 1e-12)
    alone = measure(PAIRS, start, [(deltas[0], 3)])
    assert alone.distance <= max(alone.floor, 1e-12)


def test_mean_rule_reports_what_dense_matrices_say():
    start = random_delta(SHAPES, 0, 0.3).tensors
    deltas, weights = [random_delta(SHAPES, 1 + k, 0.05) for k in range(3)], [5, 1, 9]
    rule = get_rule("mean")
    round_ = rule.begin(start, LORA, plan(SHAPES, 1.0, 1000))
    for delta, weight in zip(deltas, weights, strict=True):
        round_.fold(delta, weight)
    state, report = round_.commit(list(zip(deltas, weights, strict=True))).__dict__.values()
    distance, target, step, clients = dense(start, deltas, weights)
    assert report["clients"] == 3
    assert report["total_weight"] == 15
    assert report["exactness_abs"] == pytest.approx(distance, rel=1e-9)
    assert report["exactness_rel"] == pytest.approx(distance / target, rel=1e-9)
    assert report["update_norm"] == pytest.approx(step, rel=1e-8)
    np.testing.assert_allclose(report["client_norms"], clients, rtol=1e-9)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(state) == set(SHAPES)
    skipped = round_.commit().report
    assert skipped["exactness_abs"] is None
    assert "not measured" in skipped["exactness_note"]


@pytest.mark.parametrize("orthonormal_known", [True, False])
def test_ffa_is_the_true_mean_of_the_updates(orthonormal_known):
    everything = random_delta(SHAPES, 0, 0.3).tensors
    start = {name: everything[name] for name in FFA.shapes}
    frozen = {name: t for name, t in everything.items() if name not in FFA.shapes}
    deltas, weights = [random_delta(FFA.shapes, 1 + k, 1e-3) for k in range(3)], [5, 0, 9]
    round_ = get_rule("ffa").begin(
        start, FFA, plan(FFA.shapes, 1.0, 1 << 20), frozen=frozen if orthonormal_known else None
    )
    for delta, weight in zip(deltas, weights, strict=True):
        round_.fold(delta, weight)
    committed = round_.commit(list(zip(deltas, weights, strict=True)))
    assert committed.report["exactness_abs"] == 0.0
    assert committed.report["exactness_floor"] == committed.report["rounding_bound"]
    _, _, step, clients = dense(everything, deltas, weights)
    for pair in PAIRS:  # the product of the new state is M, in float64, to float32 rounding of B
        b = np.tensordot(weights, [(everything[pair.b] + d.tensor(pair.b)).double().numpy() for d in deltas], 1) / 14
        a = everything[pair.a].double().numpy()
        got = committed.state[pair.b].double().numpy() @ a
        assert np.linalg.norm(got - b @ a) <= 1e-6 * np.linalg.norm(b @ a)
    if orthonormal_known:
        assert committed.report["update_norm"] == pytest.approx(step, rel=1e-6)
        np.testing.assert_allclose(committed.report["client_norms"], clients, rtol=1e-9)
    else:
        assert committed.report["update_norm"] is None
        assert committed.report["delta_norm"] > 0


def test_ffa_refuses_an_adapter_whose_a_travels():
    with pytest.raises(FedPeftError, match="needs it frozen"):
        get_rule("ffa").begin(random_delta(SHAPES, 0).tensors, LORA, plan(SHAPES, 1.0, 10))


def test_an_unknown_rule_names_the_nearest_and_lists_what_exists():
    with pytest.raises(JobError, match="is no aggregation rule") as error:
        get_rule("meen")
    assert "did you mean 'mean'? There are: ffa, mean" in str(error.value)
    for name in rule_names():
        rule = get_rule(name)
        assert rule.name == name
        assert rule.paper
        assert rule.averages(LORA) == tuple(sorted(SHAPES))
