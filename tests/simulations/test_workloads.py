"""The embedded workloads: complete without a network, unlike by nature, and with something left to learn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedpeft_simulations.stdlib as stdlib
from fedpeft.data import load_source, partition
from fedpeft.data.encode import encode
from fedpeft.data.records import record_digest
from fedpeft.models import LoadedBase, load_base
from fedpeft_simulations import digits, digits_vit, tiny_code_lm


@pytest.fixture(scope="module")
def lm() -> LoadedBase:
    return load_base("builtin:tiny-code-lm", "causal-lm")


@torch.no_grad()
def loss(base: LoadedBase, records: tuple[dict[str, object], ...]) -> float:
    return float(base.model(**encode(records, base.task, base, 128).tensors).loss)


def test_eight_package_families_with_little_text_each() -> None:
    clients = load_source("builtin:stdlib", "causal-lm")[:8]
    assert len({c.name for c in clients}) == 8
    for client in clients:
        train, heldout = (sum(len(r["text"].encode()) for r in part) for part in (client.train, client.heldout))
        assert 30_000 < train < 60_000, client.name
        assert 8_000 < heldout < 30_000, client.name
        assert all(r["client"] == client.name for r in (*client.train, *client.heldout))


def test_no_text_is_both_trained_on_and_held_out_nor_public() -> None:
    clients = load_source("builtin:stdlib", "causal-lm")
    public = {text for _, text in stdlib.public_sections()}
    for client in clients:
        train = {r["text"] for r in client.train}
        heldout = {r["text"] for r in client.heldout}
        assert not train & heldout
        assert not (train | heldout) & public


def test_another_family_takes_the_place_of_a_missing_one() -> None:
    names = [c.name for c in stdlib.StdlibSource(families=("no_such_package", "asyncio", "email")).load()]
    assert names == ["asyncio", "email"]


lines = st.sampled_from(["", "    pass", "class A:", "def f():", "@decorator", "x = 1", "    return 'ü'"])


@given(st.lists(lines, max_size=60), st.integers(10, 200))
def test_sections_are_the_text_again_and_bounded(rows: list[str], limit: int) -> None:
    text = "\n".join(rows)
    pieces = stdlib.sections(text, limit)
    assert "".join(pieces) == text
    longest_line = max((len(line.encode()) + 1 for line in rows), default=0)
    assert all(len(piece.encode()) <= max(limit, longest_line) for piece in pieces)


def test_the_language_model_knows_python_but_not_every_family_alike(lm: LoadedBase) -> None:
    uniform = math.log(len(lm.tokenizer))
    losses = [loss(lm, c.heldout) for c in load_source("builtin:stdlib", "causal-lm")[:8]]
    assert all(0.5 < value < 0.65 * uniform for value in losses), losses
    assert max(losses) - min(losses) > 0.1


def test_a_shuffled_text_is_less_likely_than_the_text(lm: LoadedBase) -> None:
    record = load_source("builtin:stdlib", "causal-lm")[0].heldout[0]
    words = record["text"].split(" ")
    assert loss(lm, ({"text": " ".join(sorted(words))},)) > loss(lm, (record,)) + 0.3


def test_the_digits_are_three_parts_of_the_data_set() -> None:
    public = digits.public_half()
    (everything,) = load_source("builtin:digits", "image-classification")
    parts = [{record_digest(r) for r in part} for part in (public, everything.train, everything.heldout)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert 0.45 < len(public) / 1797 < 0.55
    assert 0.2 < len(everything.heldout) / (len(everything.train) + len(everything.heldout)) < 0.3


def test_the_vit_is_fair_on_plain_digits_and_poor_through_other_cameras() -> None:
    base = load_base("builtin:digits-vit", "image-classification")
    clients = load_source("builtin:digits", "image-classification")

    @torch.no_grad()
    def accuracy(records: tuple[dict[str, object], ...]) -> float:
        tensors = encode(records, base.task, base, 0).tensors
        return float((base.model(**tensors).logits.argmax(-1) == tensors["labels"]).float().mean())

    assert 0.85 < accuracy(clients[0].heldout) < 0.97
    shifted = [accuracy(c.heldout) for c in partition(clients, "feature-shift", 8, seed=7)]
    assert sum(shifted) / 8 < 0.75


@pytest.mark.parametrize(("module", "limit"), [(tiny_code_lm, 3_000_000), (digits_vit, 500_000)])
def test_the_committed_assets_are_small_and_say_how_they_were_made(module: object, limit: int) -> None:
    folder: Path = module.ASSETS  # type: ignore[attr-defined]

    def sizes() -> Iterator[int]:
        return (path.stat().st_size for path in folder.iterdir())

    assert sum(sizes()) < limit
    figures = json.loads((folder / "training.json").read_text())
    assert figures["training"]["steps"] > 0
    assert not list(folder.glob("*.bin"))
