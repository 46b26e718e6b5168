"""Who may move which bytes: the decisions behind the adapter exchange, taken from the run that is active.

A client may upload one thing: the delta of a round that it was selected for, no larger than that round allows; and it
may download the states of the run that it takes part in. A complete object is judged by the round itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from fedpeft.errors import DeltaRefused, FedPeftError
from fedpeft.federation.run import FederatedRun, Round
from fedpeft_server.agents import Roster
from fedpeft_server.events import EventLog
from fedpeft_server.exchange import UploadHeader
from fedpeft_server.pki import PeerIdentity

_MOST_TOLD = 50  # refusals of one client in one round that the event log shows; the rest are only counted


class RoundAuthority:
    """The exchange's :class:`~fedpeft_server.exchange.Authority`. Thread-safe.

    Args:
        roster: who is admitted.
        observe: told ``(outcome, bytes)`` for metrics; outcome is ``accepted`` or a refusal code.
    """

    def __init__(self, roster: Roster, observe: Callable[[str, int], None] = lambda outcome, size: None):
        self._roster, self._observe = roster, observe
        self._lock = threading.Lock()
        self._run: FederatedRun | None = None
        self._events: EventLog | None = None
        self._told: dict[tuple[int, str], set[str]] = {}  # refusals that are in the event log, by round and client

    def open(self, run: FederatedRun | None, events: EventLog | None) -> None:
        """The run whose deltas are accepted from now on; ``None`` for none."""
        with self._lock:
            self._run, self._events = run, events
            self._told.clear()

    def may_upload(self, peer: PeerIdentity, header: UploadHeader) -> None:
        self._roster.admit(peer)
        if header.kind != "delta":
            raise DeltaRefused("kind", "only deltas are taken here", field="header.kind", value=header.kind)
        round_ = self._matching(header, peer.name)
        limit = round_.expectation(peer.name).max_bytes
        if header.total_bytes > limit:
            refusal = DeltaRefused(
                "size", f"is larger than the {limit} bytes expected", field="delta", value=header.total_bytes
            )
            round_.refuse(peer.name, refusal)
            self._refused(peer.name, header.round, refusal, 0)
            raise refusal

    def may_download(self, peer: PeerIdentity, digest: str, run_id: str) -> None:
        self._roster.admit(peer)
        with self._lock:
            run = self._run
        round_ = run.round if run else None
        if run is None or digest not in {run.state_digest, round_.start_digest if round_ else ""}:
            raise FedPeftError(f"{digest[:12]}... is not a state that {peer.name} was asked to work on", field="digest")

    def accept(self, peer: PeerIdentity, header: UploadHeader, path: Path) -> str:
        round_ = self._matching(header, peer.name)
        try:
            accepted = round_.accept(peer.name, header.digest)
        except DeltaRefused as refusal:
            self._refused(peer.name, header.round, refusal, header.total_bytes)
            raise
        except FedPeftError as error:
            if error.field == "storage":
                raise
            # Figures that are no numbers; or the round was committed, or another delta of this client taken, between
            # the check and the record.
            code = "metrics" if (error.field or "").startswith("metrics") else "late"
            late = DeltaRefused(code, error.message, field=error.field, value=error.value, hint=error.hint)
            round_.refuse(peer.name, late)
            self._refused(peer.name, header.round, late, header.total_bytes)
            raise late from None
        if accepted.new:
            self._observe("accepted", header.total_bytes)
            if self._events:
                loss = accepted.metrics.get("train_loss_mean")
                self._events.add(
                    "delta-accepted",
                    round=header.round,
                    client=peer.name,
                    text=f"{peer.name} delivered {header.total_bytes} bytes"
                    + (f", training loss {loss:.4f}" if loss is not None else ""),
                    metrics=accepted.metrics,
                )
        return ""

    def _refused(self, client: str, round_number: int, refusal: DeltaRefused, size: int) -> None:
        self._observe(refusal.code, size)
        text = f"{client} refused ({refusal.code}): {refusal}"
        told = self._told.setdefault((round_number, client), set())
        if self._events and text not in told and len(told) < _MOST_TOLD:
            told.add(text)
            self._events.add("delta-refused", round=round_number, client=client, text=text)

    def _matching(self, header: UploadHeader, client: str) -> Round:
        with self._lock:
            round_ = self._run.round if self._run else None
        if round_ is None or round_.run.run_id != header.run_id or round_.number != header.round:
            raise DeltaRefused(
                "late", f"round {header.round} of run {header.run_id} is not open", hint="wait for the next task"
            )
        round_.expectation(client)
        return round_
