"""The ledger: what happened in a run, in an order that nobody can rewrite unnoticed.

Each entry carries the hash of the one before it, so changing, dropping, inserting or moving an entry changes every hash
after it:

    ``hash_i = SHA-256(tag || run || seq_i || kind_i || payload_i || hash_(i-1) || at_i)``

Every part is length-prefixed, hence no two different entries have the same encoding, and the run's id is inside, hence
an entry cannot be moved to another run. A chain alone does not show that its *end* was cut off: for that the head
(:func:`head_hash`) has to be known from elsewhere, e.g. the run's report. These functions are pure: an auditor checks
an exported ledger with them, without the database.

:func:`head_hash` is the only place that says what commits to a whole ledger; a Merkle tree over the entries' hashes
would change that function (and the head of the empty ledger), not the entries.

*Canonical JSON* is UTF-8 with keys sorted by code point, no spaces, no escapes but those that JSON demands. Integers
are exact. Finite floats are written as Python's ``repr``: the shortest decimal that reads back as the same float64, so
writing and reading is the identity. NaN and infinities are refused, as are keys that are not text.

>>> canonical_json({"weight": 3, "loss": 0.1, "client": "Zürich"})
'{"client":"Zürich","loss":0.1,"weight":3}'
>>> at = datetime(2026, 1, 2, tzinfo=UTC)
>>> first = next_entry("run-1", None, "run-created", {"rounds": 2}, at)
>>> second = next_entry("run-1", first, "run-running", {}, at)
>>> verify_chain([first, second])
2
>>> from dataclasses import replace
>>> verify_chain([replace(first, payload='{"rounds":3}'), second])  # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
fedpeft.errors.IntegrityError: ledger: entry 0 does not match its hash (got 'run-created'); treat this run's records ...
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from fedpeft.errors import FedPeftError, IntegrityError

GENESIS = "0" * 64
"""The hash before the first entry, and the head of an empty ledger."""

_TAG = b"fedpeft ledger entry 1"


@dataclass(frozen=True)
class LedgerEntry:
    """One line of a run's ledger.

    Attributes:
        run_id: the run.
        seq: 0, 1, 2, ...
        kind: what happened, e.g. ``"delta-accepted"``.
        payload: the details, as canonical JSON text.
        prev_hash: ``hash`` of the entry before, or :data:`GENESIS`.
        hash: :func:`entry_hash` of all the others.
        at: when, in UTC, to the microsecond.
    """

    run_id: str
    seq: int
    kind: str
    payload: str
    prev_hash: str
    hash: str
    at: datetime

    @property
    def details(self) -> dict[str, object]:
        """``payload`` parsed."""
        value = json.loads(self.payload)
        assert isinstance(value, dict)
        return value


def canonical_json(value: object, *, field: str = "payload") -> str:
    """``value`` as the one JSON text that stands for it (see the module).

    Raises:
        FedPeftError: it holds something that JSON does not know, named by its path below ``field``.
    """
    _check_json(value, field)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=dict)


def entry_hash(run_id: str, seq: int, kind: str, payload: str, prev_hash: str, at: datetime) -> str:
    """The hash of one entry, as lowercase hex.

    The hashed bytes are the concatenation of ``length (8 bytes, big-endian) || bytes`` over: a version tag, ``run_id``,
    ``seq`` in decimal, ``kind``, ``payload``, ``prev_hash`` (all UTF-8) and ``at`` like
    ``2026-01-02T03:04:05.000006+00:00``.
    """
    parts = (run_id, str(seq), kind, payload, prev_hash, at.astimezone(UTC).isoformat(timespec="microseconds"))
    running = hashlib.sha256()
    for part in (_TAG, *(part.encode() for part in parts)):
        running.update(len(part).to_bytes(8, "big"))
        running.update(part)
    return running.hexdigest()


def next_entry(
    run_id: str, last: LedgerEntry | None, kind: str, payload: Mapping[str, object], at: datetime
) -> LedgerEntry:
    """The entry that follows ``last`` (``None``: the first one)."""
    seq, prev_hash = (0, GENESIS) if last is None else (last.seq + 1, last.hash)
    return chain_entry(run_id, seq, prev_hash, kind, payload, at)


def chain_entry(
    run_id: str, seq: int, prev_hash: str, kind: str, payload: Mapping[str, object], at: datetime
) -> LedgerEntry:
    """Entry number ``seq`` after the head ``prev_hash``, for those who know the head but not the last entry."""
    text = canonical_json(payload)
    return LedgerEntry(run_id, seq, kind, text, prev_hash, entry_hash(run_id, seq, kind, text, prev_hash, at), at)


def head_hash(entries: Iterable[LedgerEntry]) -> str:
    """What commits to the whole ledger: today the hash of its last entry. Does not check the chain."""
    head = GENESIS
    for entry in entries:
        head = entry.hash
    return head


def verify_chain(entries: Iterable[LedgerEntry], *, run_id: str | None = None) -> int:
    """Check a whole ledger, from its first entry on; how many entries it has.

    Args:
        entries: in the order of ``seq``.
        run_id: the run that they must belong to; without it, that of the first entry.

    Raises:
        IntegrityError: naming the first ``seq`` that is wrong.
    """
    expected, prev_hash = 0, GENESIS
    for entry in entries:
        run_id = entry.run_id if run_id is None else run_id
        if entry.run_id != run_id:
            raise _broken(f"entry {expected} belongs to another run", entry.run_id)
        if entry.seq != expected:
            raise _broken(f"entry {expected} is missing or out of order", entry.seq)
        if entry.prev_hash != prev_hash:
            raise _broken(f"entry {expected} does not continue the one before it", entry.prev_hash)
        if entry.hash != entry_hash(entry.run_id, entry.seq, entry.kind, entry.payload, entry.prev_hash, entry.at):
            raise _broken(f"entry {expected} does not match its hash", entry.kind)
        expected, prev_hash = expected + 1, entry.hash
    return expected


def _broken(message: str, value: object) -> IntegrityError:
    hint = "treat this run's records from here on as altered and restore them from a backup"
    return IntegrityError(message, field="ledger", value=value, hint=hint)


def _check_json(value: object, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FedPeftError("a key must be text", field=path, value=key)
            _check_json(key, f"{path}.{key}")
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_json(item, f"{path}[{position}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FedPeftError("must be a finite number", field=path, value=value, hint="leave it out or give null")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FedPeftError("is not valid Unicode text", field=path, value=value) from None
    elif value is not None and not isinstance(value, int):
        raise FedPeftError(
            "must be text, a number, a truth value, null, or a list or table of such",
            field=path,
            value=type(value).__name__,
            hint="convert it before it is recorded",
        )
