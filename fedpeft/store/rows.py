"""What the store hands out: frozen values, detached from the database.

They are snapshots: reading one again later may give another answer, changing one is impossible, and holding one costs
no connection. All times are timezone-aware UTC. Values of JSON columns (``report``, ``metrics``, ``summary``) are fresh
plain dicts that belong to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

RunState = Literal["queued", "running", "finished", "failed", "stopped"]
RoundState = Literal["open", "committed", "failed"]


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        id: its name in the store, unique.
        name: the job's name.
        job_toml: the job file, as resolved.
        job_sha256: SHA-256 of ``job_toml`` in UTF-8.
        state: see :meth:`fedpeft.store.RunStore.set_run_state` for the transitions.
        rounds_total: how many rounds the job asks for.
        base_fingerprint: fingerprint of the base model, or ``None`` while unknown.
        error: why it failed, or ``None``.
        summary: final figures, or ``None``.
        ledger_length: number of ledger entries.
        ledger_head: hash that commits to all of them.
    """

    id: str
    name: str
    job_toml: str
    job_sha256: str
    state: RunState
    rounds_total: int
    base_fingerprint: str | None
    created_at: datetime
    updated_at: datetime
    error: str | None
    summary: dict[str, Any] | None
    ledger_length: int
    ledger_head: str


@dataclass(frozen=True)
class RoundRow:
    """One round: ``start_state`` and ``end_state`` are blob digests, ``selected`` is sorted by name."""

    run_id: str
    number: int
    state: RoundState
    start_state: str
    end_state: str | None
    selected: tuple[str, ...]
    opened_at: datetime
    committed_at: datetime | None
    report: dict[str, Any] | None


@dataclass(frozen=True)
class DeltaRow:
    """The one accepted delta of a client in a round; ``weight`` is its example count, ``digest`` its blob."""

    run_id: str
    round: int
    client: str
    digest: str
    payload_bytes: int
    weight: int
    metrics: dict[str, Any]
    received_at: datetime


@dataclass(frozen=True)
class RefusalRow:
    """A delta that was refused: ``code`` is the short word of :class:`fedpeft.errors.DeltaRefused`."""

    run_id: str
    round: int
    client: str
    code: str
    reason: str
    at: datetime


@dataclass(frozen=True)
class EvaluationRow:
    """Metrics of one model on one client's data; ``split`` says which data and model, e.g. ``"heldout"``."""

    run_id: str
    round: int
    client: str
    split: str
    metrics: dict[str, Any]
    at: datetime


@dataclass(frozen=True)
class ClientRow:
    """An enrolled client.

    Attributes:
        name: unique.
        public_key: the key that is its identity, in the encoding that enrolment chose (PEM or raw); unique.
        fingerprint: of its certificate; unique.
        node_id: the transport's number for it (unsigned 64 bit), or ``None`` before it first connects.
        revoked_at: since when it is no longer welcome, or ``None``.
        last_seen: when it was last heard of, or ``None``.
    """

    name: str
    public_key: bytes
    fingerprint: str
    node_id: int | None
    enrolled_at: datetime
    revoked_at: datetime | None
    last_seen: datetime | None

    @property
    def active(self) -> bool:
        """Enrolled and not revoked."""
        return self.revoked_at is None
