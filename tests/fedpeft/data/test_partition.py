"""Partitions: every record to exactly one client, nobody empty, and the order of the input never matters."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.partition import KINDS, partition, rotate
from fedpeft.data.records import ClientData, record_digest
from fedpeft.errors import FedPeftError

DEALING = tuple(kind for kind in KINDS if kind not in ("natural", "feature-shift"))


def labelled(n: int, classes: int, prefix: str) -> tuple[dict[str, object], ...]:
    return tuple({"text": f"{prefix}{i}", "label": (i * i) % classes} for i in range(n))


def source(n: int, m: int, classes: int) -> list[ClientData]:
    return [
        ClientData("left", labelled(n, classes, "a"), labelled(m, classes, "ha")),
        ClientData("right", labelled(n // 2 + 1, classes, "b"), labelled(m, classes, "hb")),
    ]


def content(clients: list[ClientData] | tuple[ClientData, ...], part: str) -> Counter[bytes]:
    return Counter(record_digest(r) for c in clients for r in getattr(c, part))


@given(
    by=st.sampled_from(DEALING),
    n=st.integers(16, 60),
    m=st.integers(5, 20),
    classes=st.integers(2, 6),
    count=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    alpha=st.sampled_from([1e-3, 0.1, 0.5, 10.0]),
)
def test_every_record_goes_to_exactly_one_client_and_no_client_is_empty(
    by: str, n: int, m: int, classes: int, count: int, seed: int, alpha: float
) -> None:
    given_clients = source(n, m, classes)
    made = partition(given_clients, by, count, seed, alpha=alpha)
    assert [c.name for c in made] == [f"client-{k:02d}" for k in range(count)]
    for part in ("train", "heldout"):
        assert content(made, part) == content(given_clients, part)
        assert all(getattr(c, part) for c in made)


@given(by=st.sampled_from(DEALING), seed=st.integers(0, 1000), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_clients_and_records_does_not_matter(by: str, seed: int, shuffle: random.Random) -> None:
    given_clients = source(30, 10, 4)
    moved = []
    for client in given_clients[::-1]:
        train, heldout = list(client.train), list(client.heldout)
        shuffle.shuffle(train)
        shuffle.shuffle(heldout)
        moved.append(ClientData(client.name, tuple(train), tuple(heldout)))
    assert partition(moved, by, 4, seed) == partition(given_clients, by, 4, seed)


@pytest.mark.parametrize("by", DEALING)
def test_another_seed_gives_another_partition(by: str) -> None:
    assert partition(source(40, 12, 4), by, 4, 1) != partition(source(40, 12, 4), by, 4, 2)


def test_iid_shares_are_equal_to_one_record() -> None:
    sizes = [len(c.train) for c in partition(source(40, 12, 4), "iid", 7, 1)]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_separates_labels_and_large_alpha_mixes_them() -> None:
    def mean_labels(alpha: float) -> float:
        made = partition(source(400, 60, 6), "dirichlet", 6, 3, alpha=alpha)
        # The share of a client's most frequent label: 1 for one label only, about 1/4 for this mix of labels.
        return float(np.mean([max(Counter(r["label"] for r in c.train).values()) / len(c.train) for c in made]))

    assert mean_labels(0.02) > mean_labels(1.0) > mean_labels(1000.0)


def test_heldout_records_follow_the_labels_of_the_training_records() -> None:
    given_clients = [ClientData("all", labelled(600, 5, "a"), labelled(300, 5, "h"))]
    for by in ("dirichlet", "label-shard"):
        for client in partition(given_clients, by, 4, 5, alpha=0.1):
            train, heldout = (Counter(r["label"] for r in part) for part in (client.train, client.heldout))
            for label in range(5):
                expected = train[label] / 2
                assert abs(heldout[label] - expected) <= 2, (by, client.name, label)


def test_a_label_shard_client_has_few_labels() -> None:
    records = tuple({"text": str(i), "label": i % 10} for i in range(1000))
    made = partition([ClientData("all", records, records[:100])], "label-shard", 10, 0, shards=2)
    # A shard of 50 records out of 100 per label holds one label.
    assert all(len({r["label"] for r in c.train}) <= 2 for c in made)


def test_natural_keeps_names_and_data_of_the_first_clients() -> None:
    given_clients = source(10, 3, 2)
    assert partition(given_clients, "natural", 1, seed=9) == (given_clients[0],)


def test_text_without_labels_is_split_by_owner() -> None:
    owners = [ClientData(n, tuple({"text": f"{n}{i}"} for i in range(30)), ({"text": f"{n}h"},)) for n in "abcd"]
    made = partition(owners, "label-shard", 4, 1, shards=1)
    for client in made:
        assert len({str(r["text"])[0] for r in client.train}) == 1


def images(n: int) -> tuple[dict[str, object], ...]:
    rng = np.random.default_rng(0)
    return tuple({"image": rng.random((6, 6), dtype=np.float32), "label": i % 3} for i in range(n))


def test_feature_shift_changes_what_clients_see_but_not_what_it_is() -> None:
    given_clients = [ClientData("all", images(40), images(52)[40:])]
    shifted, plain = (partition(given_clients, by, 4, 2) for by in ("feature-shift", "iid"))
    for mine, theirs in zip(shifted, plain, strict=True):
        for part in ("train", "heldout"):
            for new, old in zip(getattr(mine, part), getattr(theirs, part), strict=True):
                assert new["label"] == old["label"]
                assert new["image"].dtype == np.float32
                assert new["image"].shape == (6, 6)
                assert 0 <= new["image"].min() <= new["image"].max() <= 1
    # Every other client sees negatives: their mean mirrors that of the original at one half.
    for k in (1, 3):
        seen = np.mean([r["image"] for r in shifted[k].train])
        meant = np.mean([r["image"] for r in plain[k].train])
        assert seen == pytest.approx(1 - meant, abs=0.08)


def test_rotation_by_a_right_angle_is_exact() -> None:
    image = np.arange(25, dtype=np.float32).reshape(5, 5)
    np.testing.assert_allclose(rotate(image, 90.0), np.rot90(image, k=-1), atol=1e-4)
    colour = np.stack([image, image + 1, image + 2], axis=2)
    np.testing.assert_allclose(rotate(colour, -90.0), np.rot90(colour), atol=1e-4)


@pytest.mark.parametrize(
    ("by", "count", "options", "says"),
    [
        ("dirichlett", 2, {}, "data.partition.by: unknown partition (got 'dirichlett'); did you mean 'dirichlet'?"),
        ("natural", 3, {}, "clients.count: the source has 2 natural clients only (left, right) (got 3)"),
        ("iid", 0, {}, "clients.count: must be at least 1"),
        ("iid", 100, {}, "held-out records in all"),
        ("dirichlet", 2, {"alpha": 0.0}, "data.partition.alpha: must be a positive number"),
        ("label-shard", 2, {"shards": 1000}, "need 2000 records"),
        ("feature-shift", 2, {}, "feature-shift is for images"),
    ],
)
def test_a_mistake_is_named(by: str, count: int, options: dict[str, float], says: str) -> None:
    with pytest.raises(FedPeftError) as error:
        partition(source(90, 20, 3), by, count, 1, **options)
    assert says in str(error.value)
