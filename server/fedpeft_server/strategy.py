"""The round loop: a Flower ``Strategy`` on our own ``Grid``.

Flower's stock loop sends once and waits for everybody. This one follows the run's state machine instead: it asks the
clients whose delta is missing, asks again after a lost message or a restarted agent, stops waiting at the round's
deadline, takes a decline for an answer, and can be killed and started again at any point, because what counts as done
is what the store has accepted and never what a reply says.

Messages carry a :class:`RoundTask` and bring a :class:`RoundReply`, serialised in one record; the tensors travel on the
adapter exchange.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.grid import Grid
from flwr.serverapp.strategy import Result, Strategy
from google.protobuf.message import DecodeError

from fedpeft.errors import FedPeftError, RunFailed
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.run import FederatedRun
from fedpeft.federation.summary import are_scores, summarise
from fedpeft.job.loading import dump_job
from fedpeft_proto.v1 import round_pb2 as pb
from fedpeft_server.agents import Roster
from fedpeft_server.engine import EmbeddedGrid
from fedpeft_server.events import EventLog, printable
from fedpeft_server.status_page import Metrics

log = logging.getLogger(__name__)

RECORD, KEY = "fedpeft", "task"
POLL_S = 0.05
RETRY_S = 1.0
OFFLINE_GRACE_S = 60.0
EVALUATION_GRACE_S = 30.0  # longer than a restarted agent needs to be back
HEAR_OUT_S = 2.0
MAX_CRASHES = 3
MAX_REASON = 500  # characters of a client's own words that are kept
SPLIT = "heldout"
LITTLE_SPACE = 256 << 20
NO_SPACE = "waiting for space at the server"  # a phase that agents report


class RunStopped(Exception):
    """An operator stopped the run, or the daemon is shutting down."""


@dataclass
class _Ask:
    """The state of one question to one client."""

    attempt: int = 0
    message_id: str = ""
    retry_at: float = 0.0
    crashes: int = 0
    verdict: str = ""  # "declined" or "failed": the client will not deliver
    reason: str = ""
    answered: bool = False
    offline_since: float | None = None


@dataclass
class _Phase:
    """One question to several clients: train in a round, or evaluate a state."""

    number: int
    train: bool
    start_state: str
    asks: dict[str, _Ask] = field(default_factory=dict)


class FederatedStrategy(Strategy):
    """Drives one :class:`~fedpeft.federation.run.FederatedRun` over a grid.

    Args:
        run: the state machine.
        roster: enrolled clients.
        events: where people can follow.
        folder: the run folder.
        stop: set to end the run.
        metrics: told about committed rounds.
        chunk_bytes: told to agents.
    """

    def __init__(
        self,
        run: FederatedRun,
        roster: Roster,
        events: EventLog,
        folder: RunFolder,
        stop: threading.Event,
        *,
        metrics: Metrics | None = None,
        chunk_bytes: int = 1 << 20,
    ):
        self.run, self.roster, self.events, self.folder, self.stop = run, roster, events, folder, stop
        self.metrics, self.chunk_bytes = metrics, chunk_bytes
        self._phase = _Phase(0, False, run.state_digest)

    # -- Flower's Strategy interface -------------------------------------------------------------------------------

    def start(self, grid: Grid, initial_arrays: ArrayRecord | None = None, **_: Any) -> Result:
        """Run the rounds that are left. Raises :class:`RunStopped` or :class:`RunFailed`."""
        assert isinstance(grid, EmbeddedGrid)
        self.summary()
        last = self.run.committed_rounds
        if last and not self.events.has("round-committed", last):
            # The process died, or the disk was full, just after the commit.
            self._publish(dict(self.run.store.rounds(self.run.run_id)[last - 1].report or {}))
        if last == 0:
            self._evaluate(grid, 0)
        while not self.run.done:
            self._one_round(grid)
            every, number = self.run.job.evaluation.every, self.run.committed_rounds
            if every and number % every == 0 and not self.run.done:
                self._evaluate(grid, number)
        self._evaluate(grid, self.run.committed_rounds)
        self._finish()
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages that are due now: first questions and repeats."""
        return self._due(grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take note of replies. The deltas themselves were accepted by the exchange, one by one, as they came."""
        for reply in replies:
            self._note(reply)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._due(grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        for reply in replies:
            self._note(reply)
        return None

    def summary(self) -> None:
        job = self.run.job
        log.info("run %s: %s, rule %s, %d rounds", self.run.run_id, job.adapter.kind, job.aggregation.rule,
                 job.aggregation.rounds)  # fmt: skip

    # -- a round ---------------------------------------------------------------------------------------------------

    def _one_round(self, grid: EmbeddedGrid) -> None:
        self._await_clients()
        round_ = self.run.open_round(self.roster.nodes())
        asked = ", ".join(round_.missing()) or "nobody"
        self.events.add(
            "round-started",
            round=round_.number,
            text=f"round {round_.number}/{self.run.job.aggregation.rounds}: asking {asked}",
        )
        phase = _Phase(round_.number, True, round_.start_digest, {name: _Ask() for name in round_.selected})
        self._converse(
            grid, phase, lambda: set(round_.missing()), enough=lambda: len(round_.accepted()) >= round_.needed
        )
        try:
            report = round_.commit()
        except RunFailed as error:
            raise self._explained(error, phase) from None
        if self.metrics:
            self.metrics.rounds.inc()
            self.metrics.round_seconds.observe(report["seconds"])
        self._publish(report)

    def _publish(self, report: dict[str, Any]) -> None:
        """Put the newest committed state into the run folder, and tell the watchers."""
        self.folder.write_state(self.run, report["round"])
        self.folder.log("round", **report)
        loss = report.get("train_loss")
        self.events.add(
            "round-committed",
            round=report["round"],
            text=f"round {report['round']} committed: {report['accepted']} of {report['selected']} deltas"
            + (f", training loss {loss:.4f}" if loss is not None else ""),
            metrics={k: float(v) for k, v in report.items() if isinstance(v, int | float) and not isinstance(v, bool)},
        )

    def _await_clients(self) -> None:
        """Wait until anybody is enrolled; the selection of a round is made once and stays."""
        while not self.roster.nodes():
            self._check_stop()
            time.sleep(RETRY_S)

    def _explained(self, error: RunFailed, phase: _Phase) -> RunFailed:
        """The failure with what each missing client said."""
        reasons = "; ".join(f"{name} {ask.verdict}: {ask.reason}" for name, ask in phase.asks.items() if ask.verdict)
        return RunFailed(
            error.message + (f" ({reasons})" if reasons else ""), field=error.field, value=error.value, hint=error.hint
        )

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _evaluate(self, grid: EmbeddedGrid, number: int) -> None:
        """Ask everybody for the held-out scores of the newest state; whoever is offline is left out."""
        self._await_clients()
        known = {e.client for e in self.run.store.evaluations(self.run.run_id) if e.round == number}
        asks = {name: _Ask() for name in self.roster.nodes() if name not in known}
        if not asks:
            return
        phase = _Phase(number, False, self.run.state_digest, asks)
        self._converse(
            grid,
            phase,
            lambda: {n for n, a in asks.items() if not a.answered},
            enough=lambda: True,
            grace_s=EVALUATION_GRACE_S,
        )

    def _finish(self) -> None:
        scores: dict[str, dict[str, Mapping[str, float]]] = {"base": {}, "federated": {}}
        last = self.run.committed_rounds
        for row in self.run.store.evaluations(self.run.run_id):
            if row.round == 0:
                scores["base"][row.client] = row.metrics
            if row.round == last:
                scores["federated"][row.client] = row.metrics
        sizes: dict[str, int] = {}
        for number in range(1, last + 1):
            sizes |= {d.client: d.weight for d in self.run.store.deltas(self.run.run_id, number)}
        summary = summarise(self.run, scores, sizes)
        self.folder.write_summary(summary)
        self.run.finish(summary)
        mean = summary["mean"]
        text = "finished"
        if mean:
            text += f": mean held-out loss {mean['base']['loss']:.4f} -> {mean['federated']['loss']:.4f}"
        self.events.add("run-finished", round=last, text=text)

    # -- asking and listening --------------------------------------------------------------------------------------

    def _converse(
        self,
        grid: EmbeddedGrid,
        phase: _Phase,
        missing: Callable[[], set[str]],
        *,
        enough: Callable[[], bool],
        grace_s: float = OFFLINE_GRACE_S,
    ) -> None:
        """Ask until nobody who could still answer is missing, or the deadline has passed.

        Clients that are offline for ``grace_s`` are not waited for once there is ``enough`` without them.
        """
        self._phase = phase
        empty = (ArrayRecord(), ConfigRecord())
        deadline = time.monotonic() + self.run.job.clients.deadline_s
        try:
            while True:
                self._check_stop()
                waiting = {name for name in missing() if not phase.asks[name].verdict}
                if not waiting or time.monotonic() >= deadline:
                    return
                if enough() and all(self._gone(name, grace_s) for name in waiting):
                    return
                self._say_if_full(phase, waiting)
                configure = self.configure_train if phase.train else self.configure_evaluate
                self._push(grid, list(configure(phase.number, *empty, grid)))
                replies = grid.pull_messages([a.message_id for a in phase.asks.values() if a.message_id])
                if phase.train:
                    self.aggregate_train(phase.number, replies)
                else:
                    self.aggregate_evaluate(phase.number, replies)
                self.stop.wait(POLL_S)
        finally:
            self._hear_out(grid, missing())
            grid.forget_messages([a.message_id for a in phase.asks.values() if a.message_id])

    def _say_if_full(self, phase: _Phase, waiting: set[str]) -> None:
        """An agent whose upload finds the disk full tries again by itself; tell the operator what it waits for."""
        here = (self.run.run_id, phase.number, NO_SPACE)
        told = (self.roster.progress(name) for name in waiting)
        says_so = any(p and (p.run_id, p.round, p.phase) == here for p in told)
        if says_so and shutil.disk_usage(self.folder.root).free < LITTLE_SPACE:
            self.events.once("storage", "deltas wait: the disk is full; free space, and the run goes on by itself")

    def _hear_out(self, grid: EmbeddedGrid, missing: set[str]) -> None:
        """Take the replies of those who have delivered: an upload is accepted a moment before its reply comes."""
        deadline = time.monotonic() + HEAR_OUT_S
        while time.monotonic() < deadline and not self.stop.is_set():
            ids = [a.message_id for name, a in self._phase.asks.items() if a.message_id and name not in missing]
            if not ids:
                return
            for reply in grid.pull_messages(ids):
                self._note(reply)
            self.stop.wait(POLL_S / 5)

    def _due(self, grid: Grid) -> list[Message]:
        assert isinstance(grid, EmbeddedGrid)
        now, nodes = time.monotonic(), self.roster.nodes()
        have = set(self.run.round.accepted()) if self._phase.train and self.run.round else set()
        messages = []
        for name, ask in self._phase.asks.items():
            if ask.message_id or ask.verdict or ask.answered or name in have or now < ask.retry_at or name not in nodes:
                continue
            ask.attempt += 1
            content = RecordDict({RECORD: ConfigRecord({KEY: self._task(ask.attempt).SerializeToString()})})
            kind = "train" if self._phase.train else "evaluate"
            messages.append(grid.create_message(content, kind, nodes[name], str(self._phase.number)))
        return messages

    def _push(self, grid: EmbeddedGrid, messages: list[Message]) -> None:
        if not messages:
            return
        names = {node_id: name for name, node_id in self.roster.nodes().items()}
        for message, message_id in zip(messages, grid.push_messages(messages), strict=True):
            ask = self._phase.asks[names[message.metadata.dst_node_id]]
            ask.message_id = message_id
            if not message_id:  # it has never been online
                ask.retry_at = time.monotonic() + RETRY_S

    def _task(self, attempt: int) -> pb.RoundTask:
        job = self.run.job
        return pb.RoundTask(
            run_id=self.run.run_id,
            round=self._phase.number,
            rounds_total=job.aggregation.rounds,
            attempt=attempt,
            job_toml=dump_job(job),
            start_state=self._phase.start_state,
            start_state_bytes=self.run.store.blobs.size(self._phase.start_state),
            base_fingerprint=self.run.spec.base_fingerprint,
            deadline_s=job.clients.deadline_s,
            chunk_bytes=self.chunk_bytes,
            train=self._phase.train,
            evaluate=not self._phase.train,
        )

    def _note(self, reply: Message) -> None:
        """What a reply, or Flower's word that there will be none, means for the client that was asked."""
        asked = reply.metadata.reply_to_message_id
        found = next(((n, a) for n, a in self._phase.asks.items() if a.message_id == asked), None)
        if found is None:
            return
        name, ask = found
        ask.message_id = ""
        if reply.has_error():
            self._note_error(name, ask, reply)
            return
        try:
            answer = pb.RoundReply.FromString(bytes(reply.content[RECORD][KEY]))
        except (DecodeError, KeyError, TypeError):
            self._verdict(name, ask, "failed", "sent a reply that cannot be read")
            return
        if answer.status == pb.RoundReply.DELIVERED:
            ask.retry_at = time.monotonic() + RETRY_S  # asked again only if the exchange did not get it after all
        elif answer.status == pb.RoundReply.EVALUATED:
            if [e.split for e in answer.evaluations] != [SPLIT] or not are_scores(answer.evaluations[0].metrics):
                self._verdict(name, ask, "failed", "sent scores that are not what was asked for")
                return
            ask.answered = True
            scores = dict(answer.evaluations[0].metrics)
            self.run.store.record_evaluation(self.run.run_id, self._phase.number, name, SPLIT, scores)
            self.folder.log("evaluation", round=self._phase.number, client=name, metrics=scores)
            text = f"{name}: held-out loss {scores['loss']:.4f}"
            self.events.add("evaluated", round=self._phase.number, client=name, text=text, metrics=scores)
        else:
            self._verdict(name, ask, "declined" if answer.status == pb.RoundReply.DECLINED else "failed", answer.reason)

    def _note_error(self, name: str, ask: _Ask, reply: Message) -> None:
        ask.retry_at = time.monotonic() + RETRY_S
        if reply.error.code == 2:  # the app raised, which an agent turns into a reply unless something is badly wrong
            ask.crashes += 1
            if ask.crashes >= MAX_CRASHES:
                self._verdict(name, ask, "failed", reply.error.reason or "the agent crashed")

    def _verdict(self, name: str, ask: _Ask, verdict: str, reason: str) -> None:
        reason = printable(reason, MAX_REASON)
        ask.verdict, ask.reason = verdict, reason
        self.events.add(f"client-{verdict}", round=self._phase.number, client=name, text=f"{name} {verdict}: {reason}")

    def _gone(self, name: str, grace_s: float) -> bool:
        ask = self._phase.asks[name]
        if name in self.roster.online():
            ask.offline_since = None
            return False
        ask.offline_since = ask.offline_since or time.monotonic()
        return time.monotonic() - ask.offline_since >= grace_s

    def client_states(self) -> dict[str, tuple[str, str]]:
        """Name -> (state, detail) of the clients of the present phase, for status."""
        phase, states = self._phase, {}
        have = set(self.run.round.accepted()) if phase.train and self.run.round else set()
        for name, ask in phase.asks.items():
            if ask.verdict:
                states[name] = (ask.verdict, ask.reason)
            elif name in have or ask.answered:
                states[name] = ("delivered" if phase.train else "evaluated", "")
            else:
                progress = self.roster.progress(name)
                detail = ""
                if progress and (progress.run_id, progress.round) == (self.run.run_id, phase.number):
                    detail = f"{progress.phase} {progress.step}/{progress.steps_total}"
                states[name] = ("training" if phase.train else "evaluating", detail)
        return states

    def wants(self, number: int, client: str) -> bool:
        """Whether work on phase ``number`` by ``client`` is still of use."""
        ask = self._phase.asks.get(client)
        return self._phase.number == number and ask is not None and not ask.verdict and not self.stop.is_set()

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped


def failure_text(error: BaseException) -> str:
    """One line for the run's record."""
    return str(error) if isinstance(error, FedPeftError) else f"internal error: {type(error).__name__}: {error}"
