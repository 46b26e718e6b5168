"""Dealing records out to the clients of a simulation.

A real federation has its owners and needs no partition (``natural``). The others make federations of a known kind of
unlikeness out of any data set:

==============  =======================================================================================
``iid``         every client a fair share
``dirichlet``   each label is split among the clients by proportions drawn from Dirichlet(alpha): small alpha,
                few labels per client (Hsu, Qi and Brown 2019, arXiv:1909.06335)
``quantity``    alike in kind, unlike in amount: sizes drawn from Dirichlet(alpha)
``label-shard`` records sorted by label and cut into shards, each client given ``shards`` of them (McMahan et al.
                2017, arXiv:1602.05629)
``feature-      a fair share each, but every client sees its images through a camera of its own: a rotation, every
shift``         other one inverted, some noise
==============  =======================================================================================

All choices are PRFs of the seed and of *what a record is*, never of where it stood: the clients and records may come
in any order, the result is the same. Every record goes to exactly one client, held-out records follow the same
distribution as the training records, and no client goes without either.

>>> source = [ClientData("all", tuple({"text": str(i), "label": i % 2} for i in range(10)), ({"text": "a", "label": 0},
...           {"text": "b", "label": 1}))]
>>> [(c.name, len(c.train), len(c.heldout)) for c in partition(source, "iid", 2, seed=7)]
[('client-00', 5, 1), ('client-01', 5, 1)]
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.data.records import ClientData, Record, record_digest
from fedpeft.errors import FedPeftError, nearest
from fedpeft.prf import numpy_generator, prf_bytes

KINDS = ("natural", "iid", "dirichlet", "quantity", "label-shard", "feature-shift")

_ANGLE_DEGREES = 40.0  # cameras are turned between minus and plus this much
_NOISE_SIGMAS = (0.0, 0.05, 0.1)


@dataclass(frozen=True)
class _Item:
    """A record with its label for the purpose of the partition and the digest that orders it."""

    record: Record
    label: Hashable
    digest: bytes


def partition(
    clients: Sequence[ClientData], by: str, count: int, seed: int, *, alpha: float = 0.5, shards: int = 2
) -> tuple[ClientData, ...]:
    """The ``count`` clients of a run.

    Args:
        clients: the natural clients of a source. Their order matters to ``natural`` alone.
        by: one of :data:`KINDS`. ``natural`` takes the first ``count`` clients under their own names; the other kinds
            pool all records and name the clients ``client-00`` and so on.
        count: how many clients.
        seed: the run seed.
        alpha: concentration for ``dirichlet`` and ``quantity``: large, all alike; small, all unlike.
        shards: shards per client for ``label-shard``.

    Raises:
        FedPeftError: a parameter is out of range, or there are too few clients, records or labels.
    """
    if by not in KINDS:
        meant = nearest(by, KINDS)
        hint = f"did you mean {meant!r}?" if meant else "choose one of " + ", ".join(KINDS)
        raise FedPeftError("unknown partition", field="data.partition.by", value=by, hint=hint)
    if count < 1:
        raise FedPeftError("must be at least 1", field="clients.count", value=count)
    if by == "natural":
        return _natural(clients, count)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise FedPeftError("must be a positive number", field="data.partition.alpha", value=alpha)
    if shards < 1:
        raise FedPeftError("must be at least 1", field="data.partition.shards", value=shards)

    train = _pool(clients, "train", seed)
    heldout = _pool(clients, "heldout", seed)
    for what, items in (("training", train), ("held-out", heldout)):
        if len(items) < count:
            raise FedPeftError(
                f"there are only {len(items)} {what} records in all",
                field="clients.count",
                value=count,
                hint="use fewer",
            )
    if by in ("dirichlet", "label-shard"):
        labels = {item.label for item in train}
        if len(labels) < 2:
            raise FedPeftError(
                "all records have the same label or owner, nothing to split by",
                field="data.partition.by",
                value=by,
                hint="use iid or quantity",
            )
        if by == "dirichlet":
            owners = _dirichlet(train, count, seed, alpha)
        else:
            owners = _label_shard(train, count, seed, shards)
        owners = _fill_empty(train, owners, count)
        heldout_owners = _follow(train, owners, heldout, count)
    elif by == "quantity":
        share = _proportions(count, alpha, seed, "partition-quantity")
        owners = _fill_empty(train, _cut(len(train), share), count)
        heldout_owners = _cut(len(heldout), share)
    else:
        owners = [i % count for i in range(len(train))]
        heldout_owners = [i % count for i in range(len(heldout))]
    heldout_owners = _fill_empty(heldout, heldout_owners, count)

    width = max(2, len(str(count - 1)))
    made = []
    for k in range(count):
        mine = [item for item, owner in zip(train, owners, strict=True) if owner == k]
        mine_heldout = [item for item, owner in zip(heldout, heldout_owners, strict=True) if owner == k]
        if by == "feature-shift":
            mine, mine_heldout = (_through_camera(items, k, count, seed) for items in (mine, mine_heldout))
        made.append(
            ClientData(
                name=f"client-{k:0{width}d}",
                train=tuple(item.record for item in mine),
                heldout=tuple(item.record for item in mine_heldout),
            )
        )
    return tuple(made)


def _natural(clients: Sequence[ClientData], count: int) -> tuple[ClientData, ...]:
    if len(clients) < count:
        names = ", ".join(client.name for client in clients)
        raise FedPeftError(
            f"the source has {len(clients)} natural clients only ({names})",
            field="clients.count",
            value=count,
            hint=f"use at most {len(clients)}, or another data.partition",
        )
    for client in clients[:count]:
        if not client.train or not client.heldout:
            part = "training" if not client.train else "held-out"
            raise FedPeftError(f"client {client.name!r} has no {part} records", field="data.source")
    return tuple(clients[:count])


def _pool(clients: Sequence[ClientData], part: str, seed: int) -> list[_Item]:
    """All records in PRF order. Equal records are interchangeable, so their order among themselves is immaterial."""
    items = []
    for client in clients:
        for record in client.train if part == "train" else client.heldout:
            # Text without labels is told apart by who wrote it.
            label = record["label"] if "label" in record else record.get("client", client.name)
            items.append(_Item(record, label, record_digest(record)))
    return sorted(items, key=lambda item: (prf_bytes(seed, "partition-order", part, item.digest), repr(item.label)))


def _by_label(items: Sequence[_Item]) -> dict[Hashable, list[int]]:
    """Label to positions in ``items``; labels sorted."""
    groups: dict[Hashable, list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.label, []).append(position)
    return {label: groups[label] for label in sorted(groups, key=lambda label: (str(type(label)), str(label)))}


def _proportions(count: int, alpha: float, seed: int, purpose: str, *parts: str) -> np.ndarray:
    """A draw from the symmetric Dirichlet over ``count`` clients; uniform where a tiny alpha underflows."""
    share = numpy_generator(seed, purpose, *parts).dirichlet(np.full(count, alpha))
    return share if np.isfinite(share).all() and share.sum() > 0 else np.full(count, 1.0 / count)


def _cut(n: int, share: np.ndarray) -> list[int]:
    """Owners of ``n`` records in a row, ``share`` of them each, rounded so that they add up."""
    edges = np.rint(np.cumsum(share) / share.sum() * n).astype(int)
    owners, start = [], 0
    for k, edge in enumerate(edges):
        owners += [k] * max(0, int(edge) - start)
        start = max(start, int(edge))
    return owners


def _dirichlet(items: Sequence[_Item], count: int, seed: int, alpha: float) -> list[int]:
    owners = [0] * len(items)
    for label, positions in _by_label(items).items():
        share = _proportions(count, alpha, seed, "partition-dirichlet", str(label))
        for position, owner in zip(positions, _cut(len(positions), share), strict=True):
            owners[position] = owner
    return owners


def _label_shard(items: Sequence[_Item], count: int, seed: int, shards: int) -> list[int]:
    total = count * shards
    if total > len(items):
        raise FedPeftError(
            f"{count} clients of {shards} shards need {total} records, there are {len(items)}",
            field="data.partition.shards",
            value=shards,
            hint="use fewer",
        )
    in_label_order = [position for positions in _by_label(items).values() for position in positions]
    dealt = sorted(range(total), key=lambda shard: prf_bytes(seed, "partition-shard", shard))
    owner_of_shard = {shard: place // shards for place, shard in enumerate(dealt)}
    owners = [0] * len(items)
    for rank, position in enumerate(in_label_order):
        owners[position] = owner_of_shard[rank * total // len(items)]
    return owners


def _follow(train: Sequence[_Item], owners: Sequence[int], heldout: Sequence[_Item], count: int) -> list[int]:
    """Owners of the held-out records: each label is split as it is among the training records."""
    seen: dict[Hashable, np.ndarray] = {}
    for item, owner in zip(train, owners, strict=True):
        seen.setdefault(item.label, np.zeros(count))[owner] += 1
    result = [0] * len(heldout)
    for label, positions in _by_label(heldout).items():
        share = seen.get(label, np.ones(count))
        for position, owner in zip(positions, _cut(len(positions), share), strict=True):
            result[position] = owner
    return result


def _fill_empty(items: Sequence[_Item], owners: Sequence[int], count: int) -> list[int]:
    """Give each client without a record one from the client that has most."""
    result = list(owners)
    sizes = np.bincount(result, minlength=count)
    for k in range(count):
        if sizes[k] == 0:
            donor = int(np.argmax(sizes))
            position = next(p for p in range(len(items)) if result[p] == donor)
            result[position] = k
            sizes[donor] -= 1
            sizes[k] += 1
    return result


def _through_camera(items: Sequence[_Item], k: int, count: int, seed: int) -> list[_Item]:
    """The items as client ``k`` sees them."""
    # The angles are spread evenly and dealt out by PRF, so that rotation and inversion do not go together.
    dealt = sorted(range(count), key=lambda client: prf_bytes(seed, "partition-angle", client))
    place = dealt.index(k)
    degrees = 0.0 if count == 1 else _ANGLE_DEGREES * (2 * place / (count - 1) - 1)
    sigma = _NOISE_SIGMAS[(k // 2) % len(_NOISE_SIGMAS)]
    seen = []
    for item in items:
        if "image" not in item.record:
            raise FedPeftError(
                "feature-shift is for images", field="data.partition.by", value="feature-shift", hint="use dirichlet"
            )
        image = rotate(np.asarray(item.record["image"], dtype=np.float32), degrees)
        if k % 2:
            image = np.float32(1.0) - image
        if sigma:
            noise = numpy_generator(seed, "partition-noise", k, item.digest).standard_normal(image.shape)
            image = np.clip(image + np.float32(sigma) * noise.astype(np.float32), 0.0, 1.0)
        seen.append(_Item({**item.record, "image": image.astype(np.float32)}, item.label, item.digest))
    return seen


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """``image`` (H, W) or (H, W, C) turned about its centre, bilinear, the border repeated outwards.

    >>> rotate(np.eye(3, dtype=np.float32), 0.0).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    height, width = image.shape[:2]
    turn = math.radians(degrees)
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    y, x = row - (height - 1) / 2, column - (width - 1) / 2
    source_row = np.clip(math.cos(turn) * y - math.sin(turn) * x + (height - 1) / 2, 0, height - 1)
    source_column = np.clip(math.sin(turn) * y + math.cos(turn) * x + (width - 1) / 2, 0, width - 1)
    top, left = np.floor(source_row).astype(int), np.floor(source_column).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = source_row - top, source_column - left
    if image.ndim == 3:
        down, across = down[:, :, None], across[:, :, None]
    upper = image[top, left] * (1 - across) + image[top, right] * across
    lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
    turned: np.ndarray = (upper * (1 - down) + lower * down).astype(np.float32)
    return turned
