"""The tables, as SQLAlchemy models. Nothing outside ``fedpeft.store`` sees them: callers get the values of ``rows``.

Only portable types are used, so the same models serve SQLite and PostgreSQL. What must never happen is a constraint
here, not only a check in code: two accepted deltas of one client in one round, two ledger entries with one number, two
clients with one key. Names of constraints follow one convention, because a later migration can only change what has a
name.

A change here needs a migration in ``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON as SqlJson
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

_JSON = SqlJson(none_as_null=True)


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, kept in UTC and read back as timezone-aware UTC, also where the database forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a time zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class UnsignedInt64(TypeDecorator[int]):
    """0 to 2**64-1, as decimal text: databases have no unsigned 64-bit column."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value)


class Base(DeclarativeBase):
    """Carries the metadata that migrations are compared with."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Run(Base):
    """See :class:`fedpeft.store.rows.RunRow`. Its row is also the lock under which a run's ledger grows."""

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'finished', 'failed', 'stopped')", name="state"),
        Index(None, "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    job_toml: Mapped[str] = mapped_column(Text)
    job_sha256: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    rounds_total: Mapped[int] = mapped_column(Integer)
    base_fingerprint: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(Text)
    summary: Mapped[dict[str, Any] | None] = mapped_column(_JSON)
    ledger_length: Mapped[int] = mapped_column(Integer)
    ledger_head: Mapped[str] = mapped_column(String(64))


class Round(Base):
    """See :class:`fedpeft.store.rows.RoundRow`."""

    __tablename__ = "rounds"
    __table_args__ = (
        CheckConstraint("state IN ('open', 'committed', 'failed')", name="state"),
        CheckConstraint("state <> 'committed' OR end_state IS NOT NULL", name="committed_has_end_state"),
    )

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    start_state: Mapped[str] = mapped_column(String(64))
    end_state: Mapped[str | None] = mapped_column(String(64))
    selected: Mapped[list[str]] = mapped_column(_JSON)
    opened_at: Mapped[datetime] = mapped_column(UtcDateTime)
    committed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    report: Mapped[dict[str, Any] | None] = mapped_column(_JSON)


class Delta(Base):
    """See :class:`fedpeft.store.rows.DeltaRow`. The primary key is the promise "counted once"."""

    __tablename__ = "deltas"
    __table_args__ = (ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.number"]),)

    run_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    client: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    payload_bytes: Mapped[int] = mapped_column(BigInteger)
    weight: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(_JSON)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Refusal(Base):
    """See :class:`fedpeft.store.rows.RefusalRow`. The round need not exist: a wrong round is a reason to refuse."""

    __tablename__ = "refusals"
    __table_args__ = (Index(None, "run_id", "round", "client"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    round: Mapped[int] = mapped_column(BigInteger)
    client: Mapped[str] = mapped_column(String(255))
    code: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Evaluation(Base):
    """See :class:`fedpeft.store.rows.EvaluationRow`. Needs no round: the untouched base model is evaluated too."""

    __tablename__ = "evaluations"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    client: Mapped[str] = mapped_column(String(255), primary_key=True)
    split: Mapped[str] = mapped_column(String(64), primary_key=True)
    metrics: Mapped[dict[str, Any]] = mapped_column(_JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Ledger(Base):
    """See :class:`fedpeft.store.ledger.LedgerEntry`."""

    __tablename__ = "ledger"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(64))
    payload: Mapped[str] = mapped_column(Text)
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Client(Base):
    """See :class:`fedpeft.store.rows.ClientRow`."""

    __tablename__ = "clients"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    public_key: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    fingerprint: Mapped[str] = mapped_column(String(128), unique=True)
    node_id: Mapped[int | None] = mapped_column(UnsignedInt64, unique=True)
    enrolled_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_seen: Mapped[datetime | None] = mapped_column(UtcDateTime)
