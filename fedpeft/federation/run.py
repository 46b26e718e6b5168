"""The coordinator's state machine: open a round, accept deltas, commit, until the last round.

The store is the truth and this object is a view of it: whatever is acknowledged is durable first (payload on disk,
row and ledger entry in one transaction), so the process may die at any point and :meth:`FederatedRun.resume`
continues. What was folded into memory is folded again from the stored payloads; sums are fixed-point integers, so the
order of arrival, a restart or a retry cannot change one bit of the result.

    run = FederatedRun.create(store, run_id, job, spec, initial_state)
    while not run.done:
        round = run.open_round(names)          # PRF selection; the same round again after a restart
        for client in round.missing():         # ... ask them, in whatever way
            round.accept(client, digest)       # raises DeltaRefused and records why
        round.commit()
    run.finish()
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedpeft.adapters.attach import State, regenerate
from fedpeft.adapters.delta import PackedFile, pack
from fedpeft.adapters.manifest import manifest_for
from fedpeft.adapters.validation import Expectation, check_delta
from fedpeft.aggregation.fixed_point import plan
from fedpeft.aggregation.rules.registry import get_rule
from fedpeft.errors import DeltaRefused, FedPeftError, RunFailed
from fedpeft.federation.selection import select_clients
from fedpeft.job.loading import dump_job, parse_job

if TYPE_CHECKING:
    from fedpeft.adapters.spec import AdapterSpec
    from fedpeft.job.schema import Job
    from fedpeft.store.store import RunStore


@dataclass(frozen=True)
class Accepted:
    """The coordinator holds this delta, durably.

    ``new`` is false when the same delta had been accepted before, for example before a restart.
    """

    client: str
    digest: str
    weight: int
    payload_bytes: int
    metrics: Mapping[str, float]
    new: bool


class FederatedRun:
    """One run in a store. Thread-safe: deltas may be accepted from many threads."""

    def __init__(self, store: RunStore, run_id: str, job: Job, spec: AdapterSpec):
        self.store, self.run_id, self.job, self.spec = store, run_id, job, spec
        self.rule = get_rule(job.aggregation.rule)
        self._round: Round | None = None
        self._start_digest = ""
        if job.adapter.kind not in self.rule.adapter_kinds:
            raise FedPeftError(
                "does not combine this adapter kind", field="aggregation.rule", value=job.aggregation.rule
            )

    @classmethod
    def create(
        cls, store: RunStore, run_id: str, job: Job, spec: AdapterSpec, initial_state: Mapping[str, torch.Tensor]
    ) -> FederatedRun:
        """Record a new run with its starting state."""
        store.create_run(run_id, job.name, dump_job(job), job.aggregation.rounds, spec.base_fingerprint)
        return cls.start(store, run_id, job, spec, initial_state)

    @classmethod
    def start(
        cls, store: RunStore, run_id: str, job: Job, spec: AdapterSpec, initial_state: Mapping[str, torch.Tensor]
    ) -> FederatedRun:
        """Start, or continue, a run whose row exists already (a queued job).

        A run whose first round was opened goes on from the state that it began with, whatever ``initial_state`` is now.
        """
        run = cls(store, run_id, job, spec)
        begun = store.rounds(run_id)
        run._start_digest = begun[0].start_state if begun else store.blobs.put_bytes(pack_state(spec, initial_state))
        store.set_run_state(run_id, "running")
        return run

    @classmethod
    def resume(
        cls, store: RunStore, run_id: str, spec: AdapterSpec, initial_state: Mapping[str, torch.Tensor]
    ) -> FederatedRun:
        """The run as the store knows it."""
        job = parse_job(store.run(run_id).job_toml, name=f"job of run {run_id}")
        return cls.start(store, run_id, job, spec, initial_state)

    @property
    def committed_rounds(self) -> int:
        return sum(row.state == "committed" for row in self.store.rounds(self.run_id))

    @property
    def done(self) -> bool:
        return self.committed_rounds >= self.job.aggregation.rounds

    @property
    def state_digest(self) -> str:
        """Content address of the newest global state."""
        ends = [r.end_state for r in self.store.rounds(self.run_id) if r.state == "committed" and r.end_state]
        return ends[-1] if ends else self._start_digest

    def state(self) -> State:
        """The newest global state."""
        return PackedFile(self.store.blobs.path(self.state_digest)).state()

    def open_round(self, clients: Iterable[str]) -> Round:
        """The next round, or the one that was open when the process died.

        Args:
            clients: names of every client that could be asked.
        """
        number = self.committed_rounds + 1
        existing = next((r for r in self.store.rounds(self.run_id) if r.number == number), None)
        if existing is not None:
            selected: Sequence[str] = existing.selected
        else:
            section = self.job.clients
            selected = select_clients(
                clients,
                seed=self.job.seed,
                round_number=number,
                per_round=section.per_round,
                sample_rate=section.sample_rate,
            )
            self.store.open_round(self.run_id, number, self.state_digest, list(selected))
        start = existing.start_state if existing is not None else self.state_digest
        self._round = Round(self, number, tuple(selected), start)
        return self._round

    @property
    def round(self) -> Round | None:
        """The round that is open in this process."""
        return self._round

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished."""
        self.store.set_run_state(self.run_id, "finished", summary=dict(summary or {}))

    def fail(self, error: str) -> None:
        """Mark the run as failed; committed rounds stay."""
        self.store.set_run_state(self.run_id, "failed", error=error)


class Round:
    """An open round. Deltas that the store holds already are folded in when it is made."""

    def __init__(self, run: FederatedRun, number: int, selected: tuple[str, ...], start_digest: str):
        self.run, self.number, self.selected, self.start_digest = run, number, selected, start_digest
        self._start = PackedFile(run.store.blobs.path(start_digest)).state()
        section = run.job.aggregation
        self._aggregation = run.rule.begin(
            self._start,
            run.spec,
            plan(run.spec.shapes, section.max_abs, section.max_total_weight),
            frozen={s.name: regenerate(run.job.seed, s) for s in run.spec.seeded},
        )
        self._accepted: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._opened = time.monotonic()
        for row in run.store.deltas(run.run_id, number):
            self._fold(row.client, row.digest, row.weight)

    @property
    def needed(self) -> int:
        """Deltas without which the round cannot be committed at its deadline."""
        return min(self.run.job.clients.min_to_commit or len(self.selected), len(self.selected))

    def accepted(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(sorted(self._accepted))

    def missing(self) -> tuple[str, ...]:
        """Selected clients whose delta is not here yet, sorted."""
        with self._lock:
            return tuple(sorted(set(self.selected) - self._accepted.keys()))

    def expectation(self, client: str) -> Expectation:
        """What ``client`` must send. Raises :class:`DeltaRefused` if it was not selected."""
        if client not in self.selected:
            raise DeltaRefused(
                "not-selected", f"client {client} does not take part in round {self.number}", hint="wait to be asked"
            )
        section = self.run.job.aggregation
        return Expectation(
            run_id=self.run.run_id,
            round=self.number,
            client=client,
            start_state=self.start_digest,
            spec=self.run.spec,
            codec=self.run.job.adapter.codec,
            max_abs=section.max_abs,
            max_weight=section.max_total_weight // max(1, len(self.selected)),
            equal_weights=section.weights == "equal",
        )

    def accept(self, client: str, digest: str, metrics: Mapping[str, float] | None = None) -> Accepted:
        """Check a delta that lies in the blob store, record it durably and fold it in.

        Raises:
            DeltaRefused: it is not what the round asked for. The refusal is recorded; the payload is left to the
            caller.
        """
        blobs = self.run.store.blobs
        try:
            delta = check_delta(blobs.path(digest), self.expectation(client))
        except DeltaRefused as refusal:
            self.refuse(client, refusal)
            raise
        manifest = delta.manifest
        facts = {**manifest.metrics, **(metrics or {})}
        with self._lock:
            new = self.run.store.accept_delta(
                self.run.run_id, self.number, client, digest, blobs.size(digest), manifest.weight, facts
            )
            if client not in self._accepted:
                self._fold_locked(client, delta, digest, manifest.weight)
        return Accepted(client, digest, manifest.weight, blobs.size(digest), facts, new)

    def refuse(self, client: str, refusal: DeltaRefused) -> None:
        """Record why a delta was not taken."""
        self.run.store.refuse_delta(self.run.run_id, self.number, client, refusal.code, str(refusal))

    def commit(self) -> dict[str, Any]:
        """Combine what is here into the next global state, durably. Returns the round's report.

        Raises:
            RunFailed: fewer deltas than :attr:`needed`.
        """
        store, run_id = self.run.store, self.run.run_id
        with self._lock:
            if len(self._accepted) < self.needed:
                raise RunFailed(
                    f"round {self.number} has {len(self._accepted)} of the {self.needed} deltas it needs",
                    field="clients.min_to_commit",
                    value=self.needed,
                    hint="lower it, raise clients.deadline_s, or bring more clients online",
                )
            rows = store.deltas(run_id, self.number)
            for row in rows:  # one that was recorded but could not be folded in at the time, for example on a full disk
                if row.client not in self._accepted:
                    self._fold_locked(row.client, PackedFile(store.blobs.path(row.digest)), row.digest, row.weight)
            report: dict[str, Any] = {
                "round": self.number,
                "selected": len(self.selected),
                "accepted": len(rows),
                "bytes_up": sum(row.payload_bytes for row in rows),
                "bytes_down": len(rows) * store.blobs.size(self.start_digest),
                "payload_bytes_max": max((row.payload_bytes for row in rows), default=0),
                "train_loss": _weighted_loss(rows),
                "seconds": round(time.monotonic() - self._opened, 3),
            }
            if any(row.weight for row in rows):
                readers = [(PackedFile(store.blobs.path(row.digest)), row.weight) for row in rows]
                committed = self._aggregation.commit(readers)
                state = committed.state
                norms = committed.report.pop("client_norms", None)
                report.update(committed.report)
                report["client_update_norms"] = (
                    dict(zip([r.client for r in rows], norms, strict=True)) if norms else None
                )
            else:
                state = self._start  # nobody was selected, or nobody has examples: the state stands
            end_digest = store.blobs.put_bytes(pack_state(self.run.spec, state))
            store.commit_round(run_id, self.number, end_digest, report)
        if self.run.job.unlearning.retain == "nothing":
            for row in rows:
                store.blobs.delete(row.digest)
        return report

    def _fold(self, client: str, digest: str, weight: int) -> None:
        with self._lock:
            self._fold_locked(client, PackedFile(self.run.store.blobs.path(digest)), digest, weight)

    def _fold_locked(self, client: str, delta: PackedFile, digest: str, weight: int) -> None:
        self._aggregation.fold(delta, weight)
        self._accepted[client] = (digest, weight)


def pack_state(spec: AdapterSpec, state: Mapping[str, torch.Tensor]) -> bytes:
    """A global state as one packed object. The same values give the same bytes, in whatever run."""
    manifest = manifest_for(
        spec, run_id="", round=0, client="", start_state="", codec="fp32", example_count=0, weight=0
    )
    # Without the version: another release of fedpeft must find a run's state under the same address.
    return pack(state, replace(manifest, version=""))


def _weighted_loss(rows: Sequence[Any]) -> float | None:
    total = sum(row.weight for row in rows)
    if not total or any("train_loss_mean" not in row.metrics for row in rows):
        return None
    mean = sum(row.metrics["train_loss_mean"] * row.weight for row in rows) / total
    return mean if math.isfinite(mean) else None  # clients report what they like: the sum may overflow
