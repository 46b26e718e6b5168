"""Who takes part: decided by seed, name and round alone."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fedpeft.federation.selection import select_clients

names = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=12)
seeds = st.integers(0, 2**63 - 1)
rounds = st.integers(1, 10_000)
rates = st.floats(0.01, 1.0)


@given(names, seeds, rounds, rates)
def test_under_poisson_a_client_takes_part_whoever_else_exists(clients, seed, number, rate):
    together = select_clients(clients, seed=seed, round_number=number, sample_rate=rate)
    alone = [n for n in clients if select_clients([n], seed=seed, round_number=number, sample_rate=rate)]
    assert together == tuple(sorted(alone))


@given(names, seeds, rounds, st.randoms(), st.integers(1, 12), rates)
def test_the_order_of_the_list_does_not_matter(clients, seed, number, random, count, rate):
    shuffled = random.sample(clients, len(clients))
    for how in ({"per_round": count}, {"sample_rate": rate}, {}):
        chosen = select_clients(clients, seed=seed, round_number=number, **how)
        assert chosen == select_clients(shuffled, seed=seed, round_number=number, **how)
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(clients)


@given(names, seeds, rounds, st.integers(1, 15))
def test_per_round_selects_exactly_so_many(clients, seed, number, count):
    chosen = select_clients(clients, seed=seed, round_number=number, per_round=count)
    assert len(chosen) == len(set(chosen)) == min(count, len(clients))


@given(names.filter(len), seeds, rounds, st.integers(1, 12), st.data())
def test_a_client_that_leaves_changes_a_fixed_size_round_by_its_own_place_only(clients, seed, number, count, data):
    gone = data.draw(st.sampled_from(clients))
    before = set(select_clients(clients, seed=seed, round_number=number, per_round=count))
    after = set(select_clients([c for c in clients if c != gone], seed=seed, round_number=number, per_round=count))
    assert before - {gone} <= after
    assert len(after - before) <= (gone in before)


@given(names, seeds, rounds)
def test_without_a_rule_everybody_takes_part(clients, seed, number):
    assert select_clients(clients, seed=seed, round_number=number) == tuple(sorted(clients))
    assert select_clients(clients, seed=seed, round_number=number, sample_rate=1.0) == tuple(sorted(clients))


def share(clients, trials, **how):
    counts = dict.fromkeys(clients, 0)
    sizes = []
    for number in range(1, trials + 1):
        chosen = select_clients(clients, seed=7, round_number=number, **how)
        sizes.append(len(chosen))
        for name in chosen:
            counts[name] += 1
    return counts, sizes


def test_each_client_is_included_as_often_as_the_rate_says():
    clients, trials, rate = [f"client-{i}" for i in range(10)], 2000, 0.3
    five_sigma = 5 * math.sqrt(trials * rate * (1 - rate))
    counts, sizes = share(clients, trials, sample_rate=rate)
    assert all(abs(count - trials * rate) < five_sigma for count in counts.values()), counts
    # Independent draws: the size of a round has the binomial's variance, 10 * 0.3 * 0.7, not that of a fixed size.
    mean = sum(sizes) / trials
    variance = sum((size - mean) ** 2 for size in sizes) / (trials - 1)
    assert abs(variance - 2.1) < 5 * 2.1 * math.sqrt(2 / trials)
    nobody = trials * 0.7**10
    assert abs(sizes.count(0) - nobody) < 5 * math.sqrt(nobody)
    counts, _ = share(clients, trials, per_round=3)
    assert all(abs(count - trials * rate) < five_sigma for count in counts.values()), counts


def test_rounds_and_seeds_select_independently():
    clients = [f"client-{i}" for i in range(40)]

    def chosen(seed, number):
        return set(select_clients(clients, seed=seed, round_number=number, sample_rate=0.5))

    for other in (chosen(7, 2), chosen(8, 1)):
        # Agreement of two independent fair draws is binomial(40, 1/2).
        agree = 40 - len(chosen(7, 1) ^ other)
        assert abs(agree - 20) < 5 * math.sqrt(10)
