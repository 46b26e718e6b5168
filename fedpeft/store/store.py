"""The state of all runs, in one place that survives the process.

Whatever a daemon must know to go on after ``kill -9`` is here: which runs there are, which round is open and from which
state it started, whose delta was accepted, who is enrolled. The rule is *write-ahead*: a method returns after its
transaction is on the device (SQLite with a write-ahead log and ``synchronous=FULL``, or PostgreSQL), so whatever was
acknowledged to a peer is still true after a restart. Each method is one transaction, which also appends to the run's
hash-chained ledger where the event belongs there; either both happen or neither.

Methods that a retry may repeat do nothing the second time; with *other* arguments they refuse. So a round loop can run
from its first line after a restart and finds what it did before:

>>> import tempfile
>>> folder = tempfile.TemporaryDirectory()
>>> store = RunStore.open(f"sqlite:///{folder.name}/state.db", Path(folder.name) / "blobs")
>>> start = store.blobs.put_bytes(b"adapter before round 1")
>>> run = store.create_run("run-1", "quickstart", 'name = "quickstart"', rounds_total=1)
>>> for attempt in ("first", "after a restart"):
...     _ = store.open_round("run-1", 1, start, ["hospital-a"])
...     delta = store.blobs.put_bytes(b"delta of hospital-a")
...     print(store.accept_delta("run-1", 1, "hospital-a", delta, 19, weight=120, metrics={"loss": 2.5}))
True
False
>>> store.commit_round("run-1", 1, store.blobs.put_bytes(b"adapter after round 1"), {"clients": 1}).state
'committed'
>>> [entry.kind for entry in store.ledger_entries("run-1")]
['run-created', 'round-opened', 'delta-accepted', 'round-committed']
>>> store.verify_ledger("run-1")
4
>>> store.close(); folder.cleanup()

All methods may be called from any thread; several processes may share the database. A ledger grows under the lock of
its run's row (PostgreSQL) or of the database (SQLite), so entries never fork.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import Session

from fedpeft.errors import FedPeftError, IntegrityError
from fedpeft.store import ledger, models, schema
from fedpeft.store.blobs import BlobStore, check_digest, storage_error
from fedpeft.store.ledger import LedgerEntry, canonical_json
from fedpeft.store.rows import ClientRow, DeltaRow, EvaluationRow, RefusalRow, RoundRow, RoundState, RunRow, RunState

RUN_TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    "queued": frozenset({"running", "failed", "stopped"}),
    "running": frozenset({"queued", "finished", "failed", "stopped"}),
    "failed": frozenset({"queued"}),
    "stopped": frozenset({"queued"}),
    "finished": frozenset(),
}
"""Where a run may go from each state. A failed or stopped run is taken up again by way of the queue."""

_OWN_KINDS = frozenset(
    ["run-created", "run-base", "round-opened", "round-committed", "round-failed", "delta-accepted", "delta-refused"]
    + [f"run-{state}" for state in RUN_TRANSITIONS]
)
_BUSY_TIMEOUT_S = 30.0
_MAX_INT64 = 2**63 - 1
_MAX_INT32 = 2**31 - 1
_MAX_REASON_CHARS = 2000  # a refusal quotes what a peer sent: bounded, so that a peer cannot fill the disk with it


class RunStore:
    """Runs, rounds, deltas, evaluations, ledgers and enrolled clients. Made by :meth:`open`.

    Raises:
        FedPeftError: from every method: (field ``storage``) the database is full, locked, unreachable or damaged;
            (field ``run``, ``round``, ``client``, ...) what was asked contradicts what is recorded.

    Attributes:
        url: the database, without its password.
        blobs: the payloads that rows name by digest.
    """

    def __init__(self, engine: sa.Engine, blobs: BlobStore):
        self.url = engine.url.render_as_string(hide_password=True)
        self.blobs = blobs
        self._engine = engine
        # Two views of one connection pool: they differ in how a transaction begins (see _begin).
        self._writer = engine.execution_options(fedpeft_write=True)
        self._reader = engine
        self._write_turn: AbstractContextManager[Any] = nullcontext()
        if engine.dialect.name == "sqlite":
            # SQLite has one writer at a time and waits for it by sleeping; threads of one process queue here instead.
            self._write_turn = threading.Lock()
        else:
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")  # one snapshot per read, too

    @classmethod
    def open(cls, url: str, blobs: Path) -> RunStore:
        """Open the store, made and brought to the current schema where needed.

        Args:
            url: ``sqlite:///FILE`` (``sqlite:////abs/path/state.db``) or ``postgresql://USER:PASSWORD@HOST/DATABASE``.
            blobs: folder of the payloads.

        Raises:
            FedPeftError: (field ``storage``) the URL is wrong, its driver is missing, the database cannot be opened or
                was written by a newer version.
        """
        parsed = _parse_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            assert parsed.database is not None
            folder = Path(parsed.database).absolute().parent
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise storage_error(error, folder) from error
        engine = _create_engine(parsed)
        try:
            with _database_errors(shown):
                _migrate(engine)
            return cls(engine, BlobStore(Path(blobs)))
        except BaseException:
            engine.dispose()
            raise

    def close(self) -> None:
        """Give all connections back. No other thread may be inside a method."""
        self._engine.dispose()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Runs ------------------------------------------------------------------------------------------------------------

    def create_run(
        self, run_id: str, name: str, job_toml: str, rounds_total: int, base_fingerprint: str | None = None
    ) -> RunRow:
        """Queue a run; the same run again is returned as it is. Ledger: ``run-created``.

        Raises:
            FedPeftError: (field ``run``) the id is taken by a different job.
        """
        _check_text(run_id, "run", 128)
        _check_text(name, "name", 255)
        _check_int(rounds_total, "rounds_total", _MAX_INT32)
        job_sha256 = hashlib.sha256(job_toml.encode()).hexdigest()
        with self._write() as session:
            schema.lock_database(session.connection())
            if (run := session.get(models.Run, run_id)) is not None:
                if (run.name, run.job_sha256, run.rounds_total) != (name, job_sha256, rounds_total):
                    raise FedPeftError("this run exists with another job", field="run", value=run_id)
                return _run_row(run)
            now = _now()
            run = models.Run(
                id=run_id,
                name=name,
                job_toml=job_toml,
                job_sha256=job_sha256,
                state="queued",
                rounds_total=rounds_total,
                base_fingerprint=base_fingerprint,
                created_at=now,
                updated_at=now,
                ledger_length=0,
                ledger_head=ledger.GENESIS,
            )
            session.add(run)
            session.flush()
            details = {
                "name": name,
                "job_sha256": job_sha256,
                "rounds_total": rounds_total,
                "base_fingerprint": base_fingerprint,
            }
            _append(session, run, "run-created", details, now)
            return _run_row(run)

    def run(self, run_id: str) -> RunRow:
        """One run.

        Raises:
            FedPeftError: (field ``run``) there is none of this id.
        """
        with self._read() as session:
            return _run_row(_get_run(session, run_id))

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        with self._read() as session:
            found = session.scalars(sa.select(models.Run).order_by(models.Run.created_at, models.Run.id))
            return [_run_row(run) for run in found]

    def next_queued(self) -> RunRow | None:
        """The run that has waited longest, or ``None``. It stays queued until its state is set."""
        query = sa.select(models.Run).where(models.Run.state == "queued")
        with self._read() as session:
            run = session.scalar(query.order_by(models.Run.created_at, models.Run.id).limit(1))
            return None if run is None else _run_row(run)

    def set_run_state(
        self, run_id: str, state: RunState, error: str | None = None, summary: Mapping[str, Any] | None = None
    ) -> RunRow:
        """Move a run along :data:`RUN_TRANSITIONS`. Ledger: ``run-<state>``.

        Setting the state that it has does nothing, unless ``error`` or ``summary`` are given and new. A move sets
        ``error`` as given; ``summary`` stays when none is given.

        Raises:
            FedPeftError: (field ``run.state``) there is no such way; (field ``summary...``) a value is not JSON.
        """
        if state not in RUN_TRANSITIONS:
            raise FedPeftError(
                "is not a state of a run", field="run.state", value=state, hint=f"one of {', '.join(RUN_TRANSITIONS)}"
            )
        error = None if error is None else _storable(error)
        summary = None if summary is None else _plain(summary, "summary")
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            if state == run.state:
                if (error is None or error == run.error) and (summary is None or summary == run.summary):
                    return _run_row(run)
                error = run.error if error is None else error
            elif state not in RUN_TRANSITIONS[cast(RunState, run.state)]:
                ways = sorted(RUN_TRANSITIONS[cast(RunState, run.state)])
                raise FedPeftError(
                    f"run {run_id!r} is {run.state} and cannot become {state}",
                    field="run.state",
                    value=state,
                    hint=f"it can become {' or '.join(ways)}" if ways else "submit the job as a new run",
                )
            now = _now()
            run.state, run.error = state, error
            run.summary = run.summary if summary is None else summary
            _append(session, run, f"run-{state}", {"error": error, "summary_sha256": _json_sha256(run.summary)}, now)
            return _run_row(run)

    def set_base_fingerprint(self, run_id: str, base_fingerprint: str) -> RunRow:
        """Record which base model the run uses, once that is known. Ledger: ``run-base``.

        Raises:
            FedPeftError: (field ``base_fingerprint``) another one is recorded.
        """
        _check_text(base_fingerprint, "base_fingerprint", 128)
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            if run.base_fingerprint is None:
                run.base_fingerprint = base_fingerprint
                _append(session, run, "run-base", {"base_fingerprint": base_fingerprint}, _now())
            elif run.base_fingerprint != base_fingerprint:
                raise FedPeftError(
                    f"run {run_id!r} started on the base model {run.base_fingerprint}",
                    field="base_fingerprint",
                    value=base_fingerprint,
                    hint="go on with that base model or submit the job as a new run",
                )
            return _run_row(run)

    # Rounds ----------------------------------------------------------------------------------------------------------

    def open_round(
        self, run_id: str, number: int, start_state: str, selected: Iterable[str], *, reopen: bool = False
    ) -> RoundRow:
        """Begin a round: from which state, with which clients (kept sorted). Ledger: ``round-opened``.

        With the same arguments the round is returned as it stands, also when it has been committed or has failed.

        Args:
            reopen: open a failed round again. Deltas that it had accepted stay accepted: they answer the same state.

        Raises:
            FedPeftError: (field ``round``) the round exists with another start or other clients.
        """
        _check_int(number, "round", _MAX_INT32)
        check_digest(start_state, field="start_state")
        names = sorted(selected)
        for name in names:
            _check_text(name, "selected", 255)
        if len(set(names)) != len(names):
            raise FedPeftError("names a client twice", field="selected", value=names)
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            row = session.get(models.Round, (run_id, number))
            if row is not None:
                if row.start_state != start_state:
                    raise FedPeftError(
                        f"round {number} of run {run_id!r} was opened from state {row.start_state}",
                        field="round",
                        value=start_state,
                        hint="continue it from that state",
                    )
                if row.selected != names:
                    raise FedPeftError(
                        f"round {number} of run {run_id!r} was opened with the clients {', '.join(row.selected)}",
                        field="round",
                        value=names,
                        hint="continue it with those clients",
                    )
                if not (reopen and row.state == "failed"):
                    return _round_row(row)
            now = _now()
            if row is None:
                row = models.Round(
                    run_id=run_id, number=number, start_state=start_state, selected=names, opened_at=now, state="open"
                )
                session.add(row)
            row.state, row.report = "open", None
            details = {"round": number, "start_state": start_state, "selected": names}
            _append(session, run, "round-opened", details, now)
            return _round_row(row)

    def round(self, run_id: str, number: int) -> RoundRow:
        """One round.

        Raises:
            FedPeftError: (field ``round``) it was never opened.
        """
        with self._read() as session:
            _get_run(session, run_id)
            return _round_row(_get_round(session, run_id, number))

    def rounds(self, run_id: str) -> list[RoundRow]:
        """The run's rounds by number."""
        query = sa.select(models.Round).where(models.Round.run_id == run_id).order_by(models.Round.number)
        with self._read() as session:
            _get_run(session, run_id)
            return [_round_row(row) for row in session.scalars(query)]

    def commit_round(self, run_id: str, number: int, end_state: str, report: Mapping[str, Any]) -> RoundRow:
        """End a round with its result. Ledger: ``round-committed``, with ``[client, digest, weight]`` of each delta.

        Raises:
            FedPeftError: (field ``round``) it has failed, or was committed with another result; (field ``report...``) a
                value is not JSON.
        """
        check_digest(end_state, field="end_state")
        report = _plain(report, "report")
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            row = _get_round(session, run_id, number)
            if row.state == "committed" and row.end_state == end_state:
                return _round_row(row)
            if row.state != "open":
                raise FedPeftError(
                    f"round {number} of run {run_id!r} is {row.state} already"
                    + (f" with state {row.end_state}" if row.end_state else ""),
                    field="round",
                    value=end_state,
                    hint="keep the recorded result" if row.end_state else "open it again first",
                )
            now = _now()
            row.state, row.end_state, row.committed_at, row.report = "committed", end_state, now, report
            details = {
                "round": number,
                "start_state": row.start_state,
                "end_state": end_state,
                "deltas": [[delta.client, delta.digest, delta.weight] for delta in _deltas(session, run_id, number)],
                "report_sha256": _json_sha256(report),
            }
            _append(session, run, "round-committed", details, now)
            return _round_row(row)

    def fail_round(self, run_id: str, number: int, reason: str) -> RoundRow:
        """End a round without a result; its report becomes ``{"error": reason}``. Ledger: ``round-failed``.

        A round that has failed already stays as it is.

        Raises:
            FedPeftError: (field ``round``) it was committed.
        """
        reason = _storable(reason)
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            row = _get_round(session, run_id, number)
            if row.state == "committed":
                raise FedPeftError(
                    f"round {number} of run {run_id!r} is committed already",
                    field="round",
                    value=number,
                    hint="keep the recorded result",
                )
            if row.state == "open":
                row.state, row.report = "failed", {"error": reason}
                _append(session, run, "round-failed", {"round": number, "reason": reason}, _now())
            return _round_row(row)

    # Deltas ----------------------------------------------------------------------------------------------------------

    def accept_delta(
        self,
        run_id: str,
        round: int,
        client: str,
        digest: str,
        payload_bytes: int,
        weight: int,
        metrics: Mapping[str, Any],
    ) -> bool:
        """Count a client's delta into the round; when this returns, that is durable. Ledger: ``delta-accepted``.

        Args:
            digest: the payload's blob. It must be in the store before: what is accepted must be there later.
            payload_bytes: its length.
            weight: number of examples.
            metrics: what the client reported, as JSON.

        Returns:
            ``True`` when it is new; ``False`` when this very delta was accepted before (also once the round is over: a
            client whose acknowledgement got lost asks again).

        Raises:
            FedPeftError: (field ``delta``) the client has delivered another delta; (field ``round``) the round is over;
                (field ``client``) the client was not selected; (field ``metrics...``) a value is not JSON.
        """
        check_digest(digest)
        _check_int(payload_bytes, "payload_bytes", _MAX_INT64)
        _check_int(weight, "weight", _MAX_INT64)
        metrics = _plain(metrics, "metrics")
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            row = _get_round(session, run_id, round)
            if (known := session.get(models.Delta, (run_id, round, client))) is not None:
                if known.digest == digest:
                    return False
                raise FedPeftError(
                    f"client {client!r} has delivered delta {known.digest} for round {round}",
                    field="delta",
                    value=digest,
                    hint="one delta counts per client and round; the first one stays",
                )
            if row.state != "open":
                raise FedPeftError(
                    f"round {round} of run {run_id!r} is {row.state}",
                    field="round",
                    value=round,
                    hint="take part in the next round",
                )
            if client not in row.selected:
                raise FedPeftError(
                    f"is not selected for round {round} of run {run_id!r}",
                    field="client",
                    value=client,
                    hint="deliver only when asked",
                )
            now = _now()
            session.add(
                models.Delta(
                    run_id=run_id,
                    round=round,
                    client=client,
                    digest=digest,
                    payload_bytes=payload_bytes,
                    weight=weight,
                    metrics=metrics,
                    received_at=now,
                )
            )
            details = {
                "round": round,
                "client": client,
                "digest": digest,
                "payload_bytes": payload_bytes,
                "weight": weight,
            }
            _append(session, run, "delta-accepted", details, now)
            return True

    def refuse_delta(self, run_id: str, round: int, client: str, code: str, reason: str) -> bool:
        """Record that a delta was refused, and why. Ledger: ``delta-refused``.

        Returns:
            ``False`` when the same refusal is recorded already: a peer that keeps sending fills no disk.
        """
        _check_int(round, "round", _MAX_INT64)
        _check_text(client, "client", 255)
        _check_text(code, "code", 64)
        reason = _storable(reason)[:_MAX_REASON_CHARS]
        same = {"run_id": run_id, "round": round, "client": client, "code": code, "reason": reason}
        with self._write() as session:
            run = _get_run(session, run_id, lock=True)
            if session.scalar(sa.select(models.Refusal.id).filter_by(**same).limit(1)) is not None:
                return False
            now = _now()
            session.add(models.Refusal(**same, at=now))
            details = {"round": round, "client": client, "code": code, "reason": reason}
            _append(session, run, "delta-refused", details, now)
            return True

    def deltas(self, run_id: str, round: int) -> list[DeltaRow]:
        """The deltas accepted in one round, sorted by client."""
        with self._read() as session:
            _get_run(session, run_id)
            return [_delta_row(delta) for delta in _deltas(session, run_id, round)]

    def refusals(self, run_id: str) -> list[RefusalRow]:
        """The run's refusals, in the order in which they happened."""
        query = sa.select(models.Refusal).where(models.Refusal.run_id == run_id).order_by(models.Refusal.id)
        with self._read() as session:
            _get_run(session, run_id)
            return [
                RefusalRow(row.run_id, row.round, row.client, row.code, row.reason, row.at)
                for row in session.scalars(query)
            ]

    # Evaluations -----------------------------------------------------------------------------------------------------

    def record_evaluation(
        self, run_id: str, round: int, client: str, split: str, metrics: Mapping[str, Any]
    ) -> EvaluationRow:
        """Keep the metrics of one client's data at one round; a later call with the same key replaces them.

        Raises:
            FedPeftError: (field ``metrics...``) a value is not JSON, e.g. NaN.
        """
        _check_int(round, "round", _MAX_INT32)
        _check_text(client, "client", 255)
        _check_text(split, "split", 64)
        metrics = _plain(metrics, "metrics")
        with self._write() as session:
            _get_run(session, run_id, lock=True)
            now = _now()
            row = session.get(models.Evaluation, (run_id, round, client, split))
            if row is None:
                row = models.Evaluation(run_id=run_id, round=round, client=client, split=split)
                session.add(row)
            row.metrics, row.at = metrics, now
            return _evaluation_row(row)

    def evaluations(self, run_id: str) -> list[EvaluationRow]:
        """The run's evaluations, sorted by round, client and split."""
        table = models.Evaluation
        query = sa.select(table).where(table.run_id == run_id).order_by(table.round)
        with self._read() as session:
            _get_run(session, run_id)
            rows = [_evaluation_row(row) for row in session.scalars(query)]
        # Names are sorted here: databases order text by their own collations.
        return sorted(rows, key=lambda row: (row.round, row.client, row.split))

    # Ledger ----------------------------------------------------------------------------------------------------------

    def append_ledger(self, run_id: str, kind: str, payload: Mapping[str, Any]) -> LedgerEntry:
        """Add an event that no other method records, e.g. a privacy spend or a removal. Not idempotent.

        Raises:
            FedPeftError: (field ``payload...``) a value is not JSON; (field ``kind``) only another method writes it.
        """
        _check_text(kind, "kind", 64)
        if kind in _OWN_KINDS:
            raise FedPeftError("is written by the method that changes the state", field="kind", value=kind)
        with self._write() as session:
            return _append(session, _get_run(session, run_id, lock=True), kind, payload, _now())

    def ledger_entries(self, run_id: str) -> list[LedgerEntry]:
        """The run's ledger from its first entry on."""
        with self._read() as session:
            _get_run(session, run_id)
            return list(_entries(session, run_id))

    def ledger_head(self, run_id: str) -> str:
        """The hash that commits to the whole ledger so far."""
        return self.run(run_id).ledger_head

    def verify_ledger(self, run_id: str, expected_head: str | None = None) -> int:
        """Check the chain, its recorded end, and that the rounds and deltas on record are those it tells of.

        Args:
            expected_head: a head kept elsewhere, e.g. in a report. Whoever can rewrite the whole database can rewrite
                the whole chain; only this shows it.

        Returns:
            How many entries were checked.

        Raises:
            IntegrityError: naming the first entry, round or delta that does not agree.
        """
        with self._read() as session:
            run = _get_run(session, run_id)
            told = _Told()
            try:
                length = ledger.verify_chain(told.listen(_entries(session, run_id)), run_id=run_id)
            except (ValueError, TypeError, KeyError, AssertionError, AttributeError) as error:  # not even readable
                raise _altered(f"an entry cannot be read ({error})", run_id) from error
            if (length, told.head) != (run.ledger_length, run.ledger_head):
                raise _altered(
                    f"entry {min(length, run.ledger_length)} is missing or was added: the run's record says "
                    f"{run.ledger_length} entries ending in {run.ledger_head}, found {length} ending in {told.head}",
                    run_id,
                )
            if expected_head is not None and told.head != expected_head:
                raise _altered(f"the ledger ends in {told.head}, not in the expected head", expected_head)
            told.compare(
                session.scalars(sa.select(models.Round).where(models.Round.run_id == run_id)),
                session.scalars(sa.select(models.Delta).where(models.Delta.run_id == run_id)),
            )
            return length

    # Clients ---------------------------------------------------------------------------------------------------------

    def enroll(self, name: str, public_key: bytes, fingerprint: str) -> ClientRow:
        """Enrol a client; the same client again is returned as it is; a revoked name may be enrolled anew.

        Raises:
            FedPeftError: (field ``client``) the name, key or certificate belongs to an enrolment already.
        """
        _check_text(name, "client", 255)
        _check_text(fingerprint, "fingerprint", 128)
        table = models.Client
        with self._write() as session:
            schema.lock_database(session.connection())
            client = session.get(table, name)
            if client is not None and client.revoked_at is None:
                if (client.public_key, client.fingerprint) == (public_key, fingerprint):
                    return _client_row(client)
                raise FedPeftError(
                    "is enrolled with another key or certificate",
                    field="client",
                    value=name,
                    hint="revoke it first or choose another name",
                )
            other = session.scalar(
                sa.select(table.name).where(
                    table.name != name, sa.or_(table.public_key == public_key, table.fingerprint == fingerprint)
                )
            )
            if other is not None:
                raise FedPeftError(
                    f"this key or certificate belongs to client {other!r}",
                    field="client",
                    value=name,
                    hint="make a new key for each client",
                )
            if client is None:
                client = table(name=name)
                session.add(client)
            client.public_key, client.fingerprint, client.enrolled_at = public_key, fingerprint, _now()
            client.revoked_at = client.last_seen = client.node_id = None
            return _client_row(client)

    def client_by_name(self, name: str) -> ClientRow | None:
        """The client of this name, also when revoked."""
        return self._client(models.Client.name == name)

    def client_by_fingerprint(self, fingerprint: str) -> ClientRow | None:
        """The client with this certificate, also when revoked (see :attr:`ClientRow.active`)."""
        return self._client(models.Client.fingerprint == fingerprint)

    def client_by_key(self, public_key: bytes) -> ClientRow | None:
        """The client with this key, also when revoked."""
        return self._client(models.Client.public_key == public_key)

    def client_by_node(self, node_id: int) -> ClientRow | None:
        """The client that the transport knows by this number, also when revoked."""
        return self._client(models.Client.node_id == node_id)

    def clients(self) -> list[ClientRow]:
        """All clients, sorted by name, also the revoked ones."""
        with self._read() as session:
            rows = [_client_row(client) for client in session.scalars(sa.select(models.Client))]
        return sorted(rows, key=lambda row: row.name)

    def revoke(self, name: str) -> ClientRow:
        """Shut a client out from now on; revoking again keeps the first time.

        Raises:
            FedPeftError: (field ``client``) nobody of this name is enrolled.
        """
        with self._write() as session:
            client = _get_client(session, name)
            client.revoked_at = client.revoked_at or _now()
            return _client_row(client)

    def touch(self, name: str, at: datetime | None = None) -> None:
        """Record that a client was heard of, now or at ``at`` (timezone-aware); never moves backwards."""
        at = _now() if at is None else at
        with self._write() as session:
            client = _get_client(session, name)
            if client.last_seen is None or client.last_seen < at:
                client.last_seen = at

    def set_node(self, name: str, node_id: int | None) -> ClientRow:
        """Record the transport's number for a client.

        Raises:
            FedPeftError: (field ``node_id``) it belongs to another client, or is no unsigned 64-bit number.
        """
        if node_id is not None:
            _check_int(node_id, "node_id", 2**64 - 1)
        table = models.Client
        with self._write() as session:
            schema.lock_database(session.connection())
            client = _get_client(session, name)
            if node_id is not None:
                other = session.scalar(sa.select(table.name).where(table.node_id == node_id, table.name != name))
                if other is not None:
                    raise FedPeftError(
                        f"this node is client {other!r}",
                        field="node_id",
                        value=node_id,
                        hint="every client connects with its own key",
                    )
            client.node_id = node_id
            return _client_row(client)

    # Transactions ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with (
            self._write_turn,
            _database_errors(self.url),
            Session(self._writer, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with _database_errors(self.url), Session(self._reader) as session, session.begin():
            yield session

    def _client(self, condition: sa.ColumnElement[bool]) -> ClientRow | None:
        with self._read() as session:
            client = session.scalar(sa.select(models.Client).where(condition))
            return None if client is None else _client_row(client)


class _Told:
    """What a ledger tells about rounds and deltas, gathered while its chain is checked."""

    def __init__(self) -> None:
        self.head = ledger.GENESIS
        self._deltas: dict[tuple[int, str], tuple[object, ...]] = {}
        self._rounds: dict[int, tuple[object, ...]] = {}

    def listen(self, entries: Iterable[LedgerEntry]) -> Iterator[LedgerEntry]:
        """Pass the entries on; each is read only after the one before it was found sound."""
        for entry in entries:
            yield entry
            self.head = entry.hash
            if entry.kind not in ("round-opened", "round-failed", "round-committed", "delta-accepted"):
                continue
            told: dict[str, Any] = entry.details
            number = told["round"]
            if entry.kind == "delta-accepted":
                self._deltas[number, told["client"]] = (told["digest"], told["payload_bytes"], told["weight"])
            elif entry.kind == "round-opened":
                self._rounds[number] = ("open", told["start_state"], None, told["selected"])
            elif entry.kind == "round-failed":
                self._rounds[number] = ("failed", *self._rounds[number][1:])
            else:
                _, start_state, _, selected = self._rounds[number]
                self._rounds[number] = ("committed", start_state, told["end_state"], selected)

    def compare(self, rounds: Iterable[models.Round], deltas: Iterable[models.Delta]) -> None:
        """Raise unless the tables hold exactly what was told."""
        found_rounds = {row.number: (row.state, row.start_state, row.end_state, row.selected) for row in rounds}
        found_deltas = {(row.round, row.client): (row.digest, row.payload_bytes, row.weight) for row in deltas}
        for number in sorted(self._rounds.keys() | found_rounds.keys()):
            if self._rounds.get(number) != found_rounds.get(number):
                raise _altered(f"the record of round {number} is not what the ledger tells", number)
        for number, client in sorted(self._deltas.keys() | found_deltas.keys()):
            if self._deltas.get((number, client)) != found_deltas.get((number, client)):
                raise _altered(f"the delta of client {client!r} in round {number} is not what the ledger tells", client)


# Database ------------------------------------------------------------------------------------------------------------


def _parse_url(url: str) -> URL:
    ways = "give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (exc.ArgumentError, ValueError):
        raise FedPeftError("is not a database URL", field="storage", value=url, hint=ways) from None
    shown = parsed.render_as_string(hide_password=True)
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:" or "mode=memory" in url:
            raise FedPeftError(
                "state that only lives in memory cannot survive", field="storage", value=shown, hint=ways
            )
        return parsed.set(drivername="sqlite")
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise FedPeftError("this kind of database is not supported", field="storage", value=shown, hint=ways)


def _create_engine(url: URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return sa.create_engine(url, pool_size=8, max_overflow=24, pool_pre_ping=True)
        except ImportError:
            raise FedPeftError(
                "the driver for PostgreSQL is not installed",
                field="storage",
                value=url.render_as_string(hide_password=True),
                hint="pip install 'fedpeft[postgres]'",
            ) from None
    engine = sa.create_engine(url, pool_size=8, max_overflow=24, connect_args={"timeout": _BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # no BEGIN behind our back: _begin sends the right one
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={round(_BUSY_TIMEOUT_S * 1000)}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads first and writes later would fail at once (not wait) when another wrote in between.
    write = connection.get_execution_options().get("fedpeft_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _migrate(engine: sa.Engine) -> None:
    with engine.connect().execution_options(fedpeft_write=True) as connection:
        if engine.dialect.name == "sqlite":
            raw = connection.connection.driver_connection
            assert raw is not None
            raw.execute("PRAGMA foreign_keys=OFF")  # has no effect inside a transaction, hence before it
            try:
                with connection.begin():
                    schema.upgrade(connection)
            finally:
                raw.execute("PRAGMA foreign_keys=ON")
        else:
            with connection.begin():
                schema.upgrade(connection)


@contextmanager
def _database_errors(shown: str) -> Iterator[None]:
    """What the database says of its own troubles, as one error with a next step."""
    try:
        yield
    except exc.TimeoutError as error:
        raise FedPeftError(
            "no database connection became free", field="storage", value=shown, hint="try again when the load is lower"
        ) from error
    except (exc.ProgrammingError, exc.IntegrityError, exc.DataError, exc.NotSupportedError):
        raise  # a defect of ours, not of the database
    except exc.DatabaseError as error:
        said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        low = said.lower()
        if "full" in low or "no space" in low:
            message, hint = "the disk of the database is full", "free space there and try again; nothing is half done"
        elif "locked" in low:
            message, hint = "another process keeps the database locked", "end that process and try again"
        elif "malformed" in low or "not a database" in low:
            message, hint = f"the database is damaged ({said})", "restore it from a backup"
        elif "readonly" in low or "unable to open" in low or "permission" in low:
            message, hint = f"the database cannot be opened for writing ({said})", "check the path and its permissions"
        else:
            message, hint = f"the database failed ({said})", "check that it runs, its disk and its log, then try again"
        raise FedPeftError(message, field="storage", value=shown, hint=hint) from error


# Rows ----------------------------------------------------------------------------------------------------------------


def _get_run(session: Session, run_id: str, *, lock: bool = False) -> models.Run:
    """The run's row; with ``lock``, held to the end of the transaction (SQLite holds the whole database)."""
    run = session.get(models.Run, run_id, with_for_update=lock)
    if run is None:
        raise FedPeftError("there is no such run", field="run", value=run_id, hint="list the runs that there are")
    return run


def _get_round(session: Session, run_id: str, number: int) -> models.Round:
    row = session.get(models.Round, (run_id, number))
    if row is None:
        raise FedPeftError(f"run {run_id!r} has no such round", field="round", value=number, hint="open it first")
    return row


def _get_client(session: Session, name: str) -> models.Client:
    client = session.get(models.Client, name, with_for_update=True)
    if client is None:
        raise FedPeftError("is not enrolled", field="client", value=name, hint="enrol it first")
    return client


def _deltas(session: Session, run_id: str, round: int) -> list[models.Delta]:
    found = session.scalars(sa.select(models.Delta).filter_by(run_id=run_id, round=round))
    return sorted(found, key=lambda delta: delta.client)


def _entries(session: Session, run_id: str) -> Iterator[LedgerEntry]:
    query = sa.select(models.Ledger).where(models.Ledger.run_id == run_id).order_by(models.Ledger.seq)
    for row in session.scalars(query.execution_options(yield_per=1000)):
        yield LedgerEntry(row.run_id, row.seq, row.kind, row.payload, row.prev_hash, row.hash, row.at)


def _append(session: Session, run: models.Run, kind: str, payload: Mapping[str, Any], at: datetime) -> LedgerEntry:
    entry = ledger.chain_entry(run.id, run.ledger_length, run.ledger_head, kind, payload, at)
    session.add(
        models.Ledger(
            run_id=entry.run_id,
            seq=entry.seq,
            kind=entry.kind,
            payload=entry.payload,
            prev_hash=entry.prev_hash,
            hash=entry.hash,
            at=entry.at,
        )
    )
    run.ledger_length, run.ledger_head, run.updated_at = entry.seq + 1, entry.hash, at
    return entry


def _run_row(run: models.Run) -> RunRow:
    return RunRow(
        id=run.id,
        name=run.name,
        job_toml=run.job_toml,
        job_sha256=run.job_sha256,
        state=cast(RunState, run.state),
        rounds_total=run.rounds_total,
        base_fingerprint=run.base_fingerprint,
        created_at=run.created_at,
        updated_at=run.updated_at,
        error=run.error,
        summary=run.summary,
        ledger_length=run.ledger_length,
        ledger_head=run.ledger_head,
    )


def _round_row(row: models.Round) -> RoundRow:
    return RoundRow(
        run_id=row.run_id,
        number=row.number,
        state=cast(RoundState, row.state),
        start_state=row.start_state,
        end_state=row.end_state,
        selected=tuple(row.selected),
        opened_at=row.opened_at,
        committed_at=row.committed_at,
        report=row.report,
    )


def _delta_row(delta: models.Delta) -> DeltaRow:
    return DeltaRow(
        run_id=delta.run_id,
        round=delta.round,
        client=delta.client,
        digest=delta.digest,
        payload_bytes=delta.payload_bytes,
        weight=delta.weight,
        metrics=delta.metrics,
        received_at=delta.received_at,
    )


def _evaluation_row(row: models.Evaluation) -> EvaluationRow:
    return EvaluationRow(row.run_id, row.round, row.client, row.split, row.metrics, row.at)


def _client_row(client: models.Client) -> ClientRow:
    return ClientRow(
        name=client.name,
        public_key=client.public_key,
        fingerprint=client.fingerprint,
        node_id=client.node_id,
        enrolled_at=client.enrolled_at,
        revoked_at=client.revoked_at,
        last_seen=client.last_seen,
    )


# Values --------------------------------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now(UTC)


def _plain(value: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A copy of ``value`` as it will be read back: plain, finite, detached from the caller's."""
    return cast(dict[str, Any], json.loads(canonical_json(value, field=field)))


def _json_sha256(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _storable(text: str) -> str:
    """Free text as every database takes it: no NUL, no half of a surrogate pair."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def _check_text(value: str, field: str, most: int) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= most or _storable(value) != value:
        raise FedPeftError(f"must be 1 to {most} characters of text", field=field, value=value)


def _check_int(value: int, field: str, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise FedPeftError(f"must be a whole number from 0 to {most}", field=field, value=value)


def _altered(message: str, value: object) -> IntegrityError:
    hint = "treat this run's records as altered and restore them from a backup"
    return IntegrityError(message, field="ledger", value=value, hint=hint)
