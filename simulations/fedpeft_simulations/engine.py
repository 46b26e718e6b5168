"""The in-process simulation: the coordinator's state machine and the participants, with no network between.

It drives the very objects that the daemon and the agents drive. A delta goes through the same packing, the same checks,
the same store and the same sums, so a deployment of the same job file ends in the same adapter, byte for byte.

At the end every client's held-out data is scored under four models: the *base*, the client's own *local* training, the
*federated* adapter, and one model trained on the *pooled* data (what the participants would get if they could share).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.participant import ClientUpdate, Participant
from fedpeft.federation.run import FederatedRun, pack_state
from fedpeft.federation.status import LEDGER
from fedpeft.federation.summary import summarise
from fedpeft.job.loading import dump_job
from fedpeft.job.schema import Job
from fedpeft.store.store import RunStore
from fedpeft_simulations.hosts import ClientHost, Hosts, Metrics, Task, make_hosts, simulated_clients

Watcher = Callable[[str, Mapping[str, Any]], None]
"""Told what happens: (event, facts). Events: start, round, client, committed, evaluate, baseline."""


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation leaves behind.

    Attributes:
        directory: the run folder.
        summary: the final table and the bytes sent, as written to ``summary.json``.
    """

    directory: Path
    run_id: str
    summary: dict[str, Any]


def simulate(job: Job, out: Path, *, engine: str = "auto", watch: Watcher | None = None) -> SimulationResult:
    """Run ``job`` on this machine; continue it if ``out`` holds the same job unfinished.

    Args:
        job: the job.
        out: run folder, made if missing.
        engine: ``auto``, ``in-process`` or ``processes``; the result does not depend on it.
        watch: told what happens.

    Raises:
        FedPeftError: the job cannot be run here, or ``out`` holds another run.
        RunFailed: a round ended with too few deltas.
    """
    watch = watch or (lambda event, facts: None)
    began = time.monotonic()
    clients = simulated_clients(job)
    host = ClientHost(job, clients, Participant(job))
    names = sorted(host.clients)
    if job.clients.per_round is not None and job.clients.per_round > len(names):
        raise FedPeftError(
            f"is more than the {len(names)} clients of the simulation",
            field="clients.per_round",
            value=job.clients.per_round,
        )
    for name in names:  # unusable data is found before anything is written
        host.sizes(name)
    folder = RunFolder(out)
    with RunStore.open(f"sqlite:///{out / LEDGER}", out / "blobs") as store:
        run = open_run(store, job, host.participant, out)
        folder.write_job(job)
        if run.committed_rounds:  # it may have died between a commit and its publication
            folder.write_state(run, run.committed_rounds)
        hosts = make_hosts(engine, host)
        try:
            watch("start", {"run_id": run.run_id, "clients": names, "rounds": job.aggregation.rounds})
            initial = store.blobs.path(store.blobs.put_bytes(pack_state(run.spec, host.participant.initial_state())))
            base = _evaluate(hosts, run, names, initial, 0, watch, folder)
            while not run.done:
                _one_round(hosts, run, names, folder, watch)
                number = run.committed_rounds
                if job.evaluation.every and number % job.evaluation.every == 0 and not run.done:
                    _evaluate(hosts, run, names, store.blobs.path(run.state_digest), number, watch, folder)
            final = store.blobs.path(run.state_digest)
            federated = _evaluate(hosts, run, names, final, run.committed_rounds, watch, folder)
            baselines = _baselines(hosts, job, names, initial, watch)
            sizes = {name: host.sizes(name)[0] for name in names}
            summary = summarise(run, {"base": base, **baselines, "federated": federated}, sizes)
            summary["seconds"] = round(time.monotonic() - began, 1)
            folder.write_summary(summary)
            run.finish(summary)
        except FedPeftError as error:
            run.fail(str(error))
            raise
        finally:
            hosts.close()
    return SimulationResult(out, run.run_id, summary)


def open_run(store: RunStore, job: Job, participant: Participant, out: Path) -> FederatedRun:
    """A new run, or the unfinished one that the folder holds."""
    initial = participant.initial_state()
    for row in store.runs():
        if row.job_toml != dump_job(job):
            raise FedPeftError(
                "holds a run of another job", field="--out", value=str(out), hint="choose another folder"
            )
        if row.state in ("finished", "stopped"):
            raise FedPeftError(
                f"holds this run, {row.state} already", field="--out", value=str(out), hint="choose another folder"
            )
        if row.state == "failed":
            store.set_run_state(row.id, "queued")
        return FederatedRun.resume(store, row.id, participant.spec, initial)
    return FederatedRun.create(store, f"{job.name}-{secrets.token_hex(4)}", job, participant.spec, initial)


def _one_round(hosts: Hosts, run: FederatedRun, names: list[str], folder: RunFolder, watch: Watcher) -> None:
    round_ = run.open_round(names)
    watch("round", {"round": round_.number, "selected": round_.selected})
    state = run.store.blobs.path(round_.start_digest)
    tasks = {name: ("train", name, run.run_id, round_.number, state, round_.start_digest) for name in round_.missing()}
    for client, update in hosts.each(tasks):
        assert isinstance(update, ClientUpdate)
        run.store.blobs.put_bytes(update.payload)
        round_.accept(client, update.digest)
        watch("client", {"round": round_.number, "client": client, **update.metrics})
    report = round_.commit()
    folder.log("round", **report)
    folder.write_state(run, round_.number)
    watch("committed", report)


def _evaluate(
    hosts: Hosts, run: FederatedRun, names: list[str], state: Path, number: int, watch: Watcher, folder: RunFolder
) -> dict[str, Metrics]:
    results: dict[str, Metrics] = {}
    for name, metrics in hosts.each({name: ("evaluate", name, state) for name in names}):
        results[name] = metrics
        watch("evaluate", {"client": name, "round": number, **results[name]})
    for name in names:
        run.store.record_evaluation(run.run_id, number, name, "heldout", results[name])
        folder.log("evaluation", round=number, client=name, metrics=results[name])
    return results


def _baselines(
    hosts: Hosts, job: Job, names: list[str], initial: Path, watch: Watcher
) -> dict[str, dict[str, Metrics]]:
    wanted = job.evaluation.baselines
    in_a_round = job.clients.per_round or len(names)
    if job.clients.sample_rate is not None:
        in_a_round = max(1, round(job.clients.sample_rate * len(names)))
    tasks: dict[str, Task] = {}  # the key "" stands for the pooled model: no client has an empty name
    if "pooled" in wanted:  # the longest task first
        tasks[""] = ("pooled_baseline", initial, in_a_round)
    if "local" in wanted:
        tasks |= {name: ("local_baseline", name, initial) for name in names}
    results: dict[str, dict[str, Metrics]] = {"local": {}, "pooled": {}}
    for name, metrics in hosts.each(tasks):
        if name:
            results["local"][name] = metrics
        else:
            results["pooled"] = metrics
        watch("baseline", {"which": name or "pooled"})
    return {which: results[which] for which in ("local", "pooled") if which in wanted}
