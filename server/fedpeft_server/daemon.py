"""The daemon: one process, one gRPC port, one run at a time.

It puts the parts together and owns their life: the store, Flower's engine, the services, the queue of jobs. Everything
that must survive is in the store before it is acknowledged, so ``kill -9`` is an ordinary way to stop: on the next
start the run that was under way continues in the round in which it was.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import secrets
import shutil
import socket
import threading
from concurrent import futures
from pathlib import Path
from typing import IO, Any

import grpc
from sqlalchemy.exc import SQLAlchemyError

from fedpeft import __version__
from fedpeft.adapters.attach import State
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.errors import FedPeftError, JobError, RunFailed
from fedpeft.federation.folder import RunFolder
from fedpeft.federation.run import FederatedRun
from fedpeft.federation.status import LEDGER, run_status
from fedpeft.job.loading import dump_job, job_digest, parse_job
from fedpeft.job.schema import Job
from fedpeft.store.blobs import storage_error
from fedpeft.store.export import export_run
from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc
from fedpeft_server.agents import AgentLinkService, Roster
from fedpeft_server.authority import RoundAuthority
from fedpeft_server.config import ServerConfig
from fedpeft_server.coordinator import CoordinatorService
from fedpeft_server.engine import FlowerEngine
from fedpeft_server.events import EventLog
from fedpeft_server.exchange import SERVER_OPTIONS, AdapterExchangeService, bound_heap
from fedpeft_server.pki import load_server_tls, peer_identity, server_credentials, server_options
from fedpeft_server.status_page import Metrics, StatusPage
from fedpeft_server.strategy import FederatedStrategy, RunStopped, failure_text

log = logging.getLogger(__name__)

_THREADS = 96
_SYNC_S = 1.0
_KEPT_JOBS = 4  # prepared jobs kept in memory
_STORAGE_RETRY_S = 5.0


class Daemon:
    """The server of one folder.

    Args:
        config: the folder.
        metrics_port: serve the status page there, on 127.0.0.1.

    Raises:
        FedPeftError: another daemon uses the folder, the port is taken, a certificate has expired, ...
    """

    def __init__(self, config: ServerConfig, metrics_port: int | None = None):
        bound_heap()
        self.config = config
        self._lock_file = _lock(config.directory)
        self._tls = load_server_tls(config.directory / "pki")
        self.store = config.open_store()
        self.engine = FlowerEngine(config.directory / "flower.db")
        self.roster = Roster(self.store, self.engine)
        self.roster.sync()
        self.metrics = Metrics()
        self.authority = RoundAuthority(self.roster, self.metrics.delta)
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # transformers cannot load two models in one process at the same time
        self._prepared: dict[str, tuple[AdapterSpec, State]] = {}
        self._logs: dict[str, EventLog] = {}
        self._active: tuple[FederatedStrategy, threading.Event] | None = None
        self._exchange: AdapterExchangeService[Any] = AdapterExchangeService(
            self.store.blobs, self.authority, identify=peer_identity, admit=self.roster.admit
        )
        self._server = self._make_server()
        self._page = StatusPage(metrics_port, self.metrics, self.overview) if metrics_port else None
        self._threads = [
            threading.Thread(target=self._keep_roster, name="roster", daemon=True),
            threading.Thread(target=self._work, name="runs", daemon=True),
        ]

    def start(self) -> None:
        """Serve, and continue the run that was under way."""
        self._server.start()
        for thread in self._threads:
            thread.start()
        log.info("listening on %s", self.config.address)

    def close(self) -> None:
        """Stop serving. The run under way stays as it is and continues at the next start."""
        self._closing.set()
        self._wake.set()
        with self._lock:
            active = self._active
        if active:
            active[1].set()
        self._threads[1].join(timeout=10)
        self._server.stop(grace=1.0).wait(5)
        self._exchange.close()
        if self._page:
            self._page.close()
        self.engine.close()
        self.store.close()
        self._lock_file.close()

    # -- what the services ask --------------------------------------------------------------------------------------

    def submit(self, job_toml: str) -> str:
        """Check a job and queue it. Returns the run id."""
        job = parse_job(job_toml)
        enrolled = len(self.roster.nodes())
        if not enrolled:
            raise JobError("no client is enrolled", field="clients", hint="fedpeft server enroll NAME --dir DIR")
        for key, value in (("per_round", job.clients.per_round), ("min_to_commit", job.clients.min_to_commit)):
            if value is not None and value > enrolled:
                raise JobError(
                    f"is more than the {enrolled} enrolled client{'s' if enrolled > 1 else ''}",
                    field=f"clients.{key}",
                    value=value,
                    hint="enrol more, or lower it with --set",
                )
        spec, _ = self._prepare(job)
        run_id = f"{job.name}-{secrets.token_hex(4)}"
        folder = self._folder(run_id)
        try:  # the folder first: what stands in the queue is complete
            RunFolder(folder).write_job(job)
            self.store.create_run(run_id, job.name, dump_job(job), job.aggregation.rounds, spec.base_fingerprint)
        except (OSError, FedPeftError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise storage_error(error, folder) if isinstance(error, OSError) else error from None
        self.events(run_id).add("run-queued", text=f"{job.name} queued")
        self._wake.set()
        return run_id

    def status(self, run_id: str | None) -> list[dict[str, Any]]:
        """Status of one run, or of all."""
        ids = [self._known(run_id)] if run_id is not None else [row.id for row in self.store.runs()]
        online = self.roster.online()
        with self._lock:
            active = self._active
        found = []
        for one in ids:
            status = run_status(self.store, one)
            states = active[0].client_states() if active and active[0].run.run_id == one else {}
            by_name = {c["name"]: c for c in status["clients"]}
            for name in sorted(states.keys() | by_name.keys()):
                entry = by_name.setdefault(
                    name, {"name": name, "selected": 0, "delivered": 0, "bytes_up": 0, "refused": 0}
                )
                entry["state"], entry["detail"] = states.get(name, ("idle", ""))
                entry["online"] = name in online
            status["clients"] = [by_name[name] for name in sorted(by_name)]
            last = self.events(one).last()
            status["last_event"] = last.text if last else ""
            found.append(status)
        return found

    def events(self, run_id: str) -> EventLog:
        """The event log of a run."""
        self._known(run_id)
        with self._lock:
            if run_id not in self._logs:
                folder = RunFolder(self._folder(run_id))
                self._logs[run_id] = EventLog(folder.root / "events.jsonl")
            return self._logs[run_id]

    def stop_run(self, run_id: str) -> str:
        """Stop a run that is queued or running. Returns its state."""
        row = self.store.run(self._known(run_id))
        if row.state not in ("queued", "running"):
            return row.state
        self.store.set_run_state(run_id, "stopped")
        with self._lock:
            active = self._active
        if active and active[0].run.run_id == run_id:
            active[1].set()
        self.events(run_id).add("run-stopped", text="stopped by the operator")
        return "stopped"

    def resume_run(self, run_id: str) -> str:
        """Queue a failed or stopped run again. Returns its state."""
        row = self.store.run(self._known(run_id))
        if row.state in ("failed", "stopped"):
            self.store.set_run_state(run_id, "queued")
            self.events(run_id).add("run-queued", text="queued again by the operator")
            self._wake.set()
        return self.store.run(run_id).state

    def run_files(self, run_id: str) -> list[tuple[str, Path]]:
        """Files of the run folder with their relative names; the ledger is exported into it first."""
        root = self._folder(self._known(run_id))
        export_run(self.store, run_id, root / LEDGER)
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [(p.relative_to(root).as_posix(), p) for p in files]

    def overview(self) -> dict[str, Any]:
        """Everything on the status page. Raises :class:`FedPeftError` when the state cannot be read."""
        return {
            "version": __version__,
            "agents": [
                {"name": a.name, "online": a.online, "version": a.version, "limits": dict(a.limits)}
                for a in self.roster.agents()
            ],
            "runs": [
                {"run_id": s["run_id"], "state": s["state"], "round": s["round"], "rounds_total": s["rounds_total"],
                 "error": s["error"]}
                for s in self.status(None)
            ],
        }  # fmt: skip

    def wanted(self, run_id: str, round_number: int, client: str) -> bool:
        """Whether an agent should go on working on a round."""
        with self._lock:
            active = self._active
        if active is not None and active[0].run.run_id == run_id:
            return active[0].wants(round_number, client)
        # A daemon that has just started is still loading the run that its agents are working on.
        return any(row.id == run_id and row.state in ("queued", "running") for row in self.store.runs())

    # -- threads ----------------------------------------------------------------------------------------------------

    def _keep_roster(self) -> None:
        while not self._closing.wait(_SYNC_S):
            try:
                self.roster.sync()
            except (FedPeftError, SQLAlchemyError) as error:
                log.warning("cannot bring the enrolled clients up to date: %s", failure_text(error))

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            try:
                row = next((r for r in self.store.runs() if r.state == "running"), None) or self.store.next_queued()
            except FedPeftError as error:
                log.warning("cannot read the queue: %s", error)
                row = None
            if row is None:
                self._wake.wait(_SYNC_S)
                continue
            try:
                self._run(row.id)
            except Exception as error:  # the run could not even be marked: on a full disk, for example
                log.error("run %s: %s", row.id, failure_text(error))
                self._closing.wait(_STORAGE_RETRY_S)

    def _run(self, run_id: str) -> None:
        """Work on one run until it ends, is stopped, or the daemon closes."""
        events = self.events(run_id)
        stop = threading.Event()
        try:
            job = parse_job(self.store.run(run_id).job_toml)
            spec, initial = self._prepare(job)
            run = FederatedRun.resume(self.store, run_id, spec, initial)
            strategy = FederatedStrategy(
                run, self.roster, events, RunFolder(self._folder(run_id)), stop, metrics=self.metrics
            )
            with self._lock:
                self._active = (strategy, stop)
            if self._closing.is_set():
                return
            self.authority.open(run, events)
            self.metrics.running.set(1)
            done = run.committed_rounds
            events.add("run-started", text=f"continued after round {done}" if done else "started")
            with self.engine.open_run(run_id) as engine_run:
                strategy.start(engine_run.grid)
        except RunStopped:
            log.info("run %s: set down", run_id)
        except Exception as error:
            if _waits_for_storage(error):
                log.error("run %s waits for storage: %s", run_id, failure_text(error))
                events.once("storage", f"waiting: {failure_text(error)}")
                self._closing.wait(_STORAGE_RETRY_S)
            else:
                if not isinstance(error, FedPeftError):
                    log.exception("run %s failed", run_id)
                self._failed(run_id, events, error)
        finally:
            self.authority.open(None, None)
            self.metrics.running.set(0)
            with self._lock:
                self._active = None

    def _failed(self, run_id: str, events: EventLog, error: Exception) -> None:
        text = failure_text(error)
        if not isinstance(error, RunFailed):
            log.error("run %s: %s", run_id, text)
        self.store.set_run_state(run_id, "failed", error=text)
        events.add("run-failed", text=text)

    # -- parts ------------------------------------------------------------------------------------------------------

    def _make_server(self) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc"),
            options=[*server_options(), *SERVER_OPTIONS],
            interceptors=self.engine.interceptors(),
        )
        self.engine.add_to(server)
        self._exchange.add_to(server)
        rpc.add_CoordinatorServicer_to_server(CoordinatorService(self, self.roster), server)
        rpc.add_AgentLinkServicer_to_server(AgentLinkService(self.roster, self.wanted), server)
        try:
            _probe_address(self.config)  # gRPC would say so as well, with lines of its own on standard error
            port = server.add_secure_port(self.config.address, server_credentials(self._tls))
        except (OSError, RuntimeError):
            port = 0
        if not port:
            raise FedPeftError(
                f"cannot listen on {self.config.address}: the address is in use or not this machine's",
                field="server.toml: port",
                value=self.config.port,
                hint="stop the other program, or change port in server.toml and enrol clients again",
            )
        return server

    def _prepare(self, job: Job) -> tuple[AdapterSpec, State]:
        """Names, shapes and first values of the job's adapter. The base model is loaded for this and let go again."""
        key = job_digest(job)
        with self._loading:
            if key not in self._prepared:
                from fedpeft.federation.participant import Participant

                participant = Participant(job)
                prepared = (participant.spec, participant.initial_state())
                if job.adapter.start_from is not None:
                    return prepared  # the folder may change
                self._prepared[key] = prepared
                while len(self._prepared) > _KEPT_JOBS:
                    self._prepared.pop(next(iter(self._prepared)))
            return self._prepared[key]

    def _folder(self, run_id: str) -> Path:
        return self.config.directory / "runs" / run_id

    def _known(self, run_id: str) -> str:
        if run_id not in {row.id for row in self.store.runs()}:
            raise FedPeftError("no such run", field="run", value=run_id, hint="list the runs: fedpeft status")
        return run_id


def _waits_for_storage(error: Exception) -> bool:
    """Whether a run may go on later, when the disk has space again or the database answers."""
    if isinstance(error, FedPeftError):
        return error.field in ("storage", "state_db")
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return isinstance(error, SQLAlchemyError)


def _probe_address(config: ServerConfig) -> None:
    """Raises :class:`OSError` when the address cannot be bound now."""
    family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a former daemon do not count
        probe.bind((config.listen, config.port))
        probe.listen(1)


def _lock(directory: Path) -> IO[str]:
    """Hold the folder for this process."""
    file = open(directory / ".lock", "w")  # noqa: SIM115 - held open for the life of the daemon
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FedPeftError(
            "another daemon is running on this folder", field=str(directory), hint="stop it first"
        ) from None
    return file
