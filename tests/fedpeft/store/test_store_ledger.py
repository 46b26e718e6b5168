"""The ledger as pure functions: one text per value, one hash per entry, and no rewriting that stays unnoticed."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.store.ledger import (
    GENESIS,
    LedgerEntry,
    canonical_json,
    entry_hash,
    head_hash,
    next_entry,
    verify_chain,
)

AT = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def chain(length: int = 5) -> list[LedgerEntry]:
    entries: list[LedgerEntry] = []
    for number in range(length):
        last = entries[-1] if entries else None
        entries.append(next_entry("run-1", last, "event", {"number": number}, AT + timedelta(seconds=number)))
    return entries


@given(JSON)
def test_canonical_json_reads_back_as_the_same_value_and_is_stable(value: object) -> None:
    text = canonical_json(value)
    back = json.loads(text)
    assert repr(back) == repr(value) or back == value
    assert canonical_json(back) == text


def test_canonical_json_ignores_insertion_order_and_spells_floats_as_repr() -> None:
    assert canonical_json({"b": [1, 1.0, -0.0, 1e16, 0.1], "a": "é\n"}) == '{"a":"é\\n","b":[1,1.0,-0.0,1e+16,0.1]}'
    assert canonical_json({"x": 1, "y": 2}) == canonical_json({"y": 2, "x": 1})


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"loss": float("nan")}, r"payload\.loss"),
        ({"a": [0.0, float("inf")]}, r"payload\.a\[1\]"),
        ({"a": {1: 2}}, r"payload\.a"),
        ({"a": b"bytes"}, r"payload\.a"),
        ({"a": "\ud800"}, r"payload\.a"),
    ],
)
def test_what_has_no_single_json_text_is_refused_by_its_path(value: object, path: str) -> None:
    with pytest.raises(FedPeftError, match=f"^{path}: "):
        canonical_json(value)


def test_the_hash_is_the_documented_one() -> None:
    parts = [b"fedpeft ledger entry 1", b"run", b"3", b"kind", b"{}", b"ab" * 32, b"2026-03-04T05:06:07.000089+00:00"]
    expected = hashlib.sha256(b"".join(struct.pack(">Q", len(part)) + part for part in parts)).hexdigest()
    assert entry_hash("run", 3, "kind", "{}", "ab" * 32, AT) == expected
    assert entry_hash("run", 3, "kind", "{}", "ab" * 32, AT.astimezone(timezone(timedelta(hours=5)))) == expected
    assert entry_hash("ru", 3, "nkind", "{}", "ab" * 32, AT) != expected


def test_an_untouched_chain_verifies_and_its_head_is_its_last_hash() -> None:
    entries = chain()
    assert verify_chain(entries) == 5
    assert entries[0].prev_hash == GENESIS
    assert head_hash(entries) == entries[-1].hash
    assert verify_chain([]) == 0
    assert head_hash([]) == GENESIS


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("field", [field.name for field in fields(LedgerEntry)])
def test_changing_any_field_of_any_entry_is_found_there(position: int, field: str) -> None:
    entries = chain()
    old = getattr(entries[position], field)
    changed: Any = {
        "run_id": "run-2",
        "seq": position + 1,
        "kind": "Event",
        "payload": '{"number":9}',
        "prev_hash": "f" * 64,
        "hash": "f" * 64,
        "at": AT + timedelta(microseconds=1, seconds=position),
    }[field]
    assert changed != old
    entries[position] = replace(entries[position], **{field: changed})
    with pytest.raises(IntegrityError, match=f"entry {position} "):
        verify_chain(entries, run_id="run-1")


@pytest.mark.parametrize("position", range(4))
def test_removing_or_swapping_entries_is_found(position: int) -> None:
    removed = chain()
    del removed[position]
    with pytest.raises(IntegrityError, match=f"entry {position} is missing"):
        verify_chain(removed)
    swapped = chain()
    swapped[position], swapped[position + 1] = swapped[position + 1], swapped[position]
    with pytest.raises(IntegrityError, match=f"entry {position} "):
        verify_chain(swapped)


def test_a_rewritten_tail_is_found_where_it_joins_and_a_cut_one_by_its_head() -> None:
    entries = chain()
    forged = next_entry("run-1", entries[1], "event", {"number": 99}, AT)
    with pytest.raises(IntegrityError, match="entry 3 does not continue"):
        verify_chain([*entries[:2], forged, *entries[3:]])
    assert verify_chain(entries[:3]) == 3
    assert head_hash(entries[:3]) != head_hash(entries)
