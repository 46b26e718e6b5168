"""The operators' service: submit, status, watch, stop, fetch, clients.

Thin: every call checks the caller's role and asks the daemon. Mistakes come back as INVALID_ARGUMENT or NOT_FOUND with
the one line that the command prints.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc

from fedpeft.errors import FedPeftError, JobError
from fedpeft_proto.v1 import coordinator_pb2 as pb
from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc
from fedpeft_server.agents import Agent, Roster, admitted
from fedpeft_server.events import EventLog

_CHUNK = 1 << 20


class Jobs(Protocol):
    """What the service asks of the daemon; each method raises :class:`FedPeftError` for a caller's mistake."""

    def submit(self, job_toml: str) -> str: ...
    def status(self, run_id: str | None) -> list[dict[str, Any]]: ...
    def events(self, run_id: str) -> EventLog: ...
    def stop_run(self, run_id: str) -> str: ...
    def resume_run(self, run_id: str) -> str: ...
    def run_files(self, run_id: str) -> list[tuple[str, Path]]: ...


class CoordinatorService(rpc.CoordinatorServicer):
    def __init__(self, jobs: Jobs, roster: Roster):
        self._jobs, self._roster = jobs, roster

    def Submit(self, request: pb.SubmitRequest, context: grpc.ServicerContext) -> pb.SubmitReply:
        self._operator(context)
        return _answer(context, lambda: pb.SubmitReply(run_id=self._jobs.submit(request.job_toml)))

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        self._operator(context)
        run_id = request.run_id if request.HasField("run_id") else None
        runs = _answer(context, lambda: self._jobs.status(run_id))
        return pb.StatusReply(json=json.dumps(runs), runs=[_run_status(run) for run in runs])

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        self._operator(context)
        log = _answer(context, lambda: self._jobs.events(request.run_id))
        for event in log.follow(request.from_seq):
            if not context.is_active():
                return
            if event is not None:
                yield pb.Event(
                    seq=event.seq, at=event.at, kind=event.kind, run_id=request.run_id, round=event.round,
                    client=event.client, text=event.text, metrics=dict(event.metrics),
                )  # fmt: skip

    def Stop(self, request: pb.StopRequest, context: grpc.ServicerContext) -> pb.StopReply:
        self._operator(context)
        return _answer(context, lambda: pb.StopReply(state=self._jobs.stop_run(request.run_id)))

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        self._operator(context)
        return _answer(context, lambda: pb.ResumeReply(state=self._jobs.resume_run(request.run_id)))

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.FileChunk]:
        self._operator(context)
        for name, path in _answer(context, lambda: self._jobs.run_files(request.run_id)):
            with open(path, "rb") as file:
                total, first = path.stat().st_size, True
                while first or file.tell() < total:
                    data = file.read(_CHUNK)
                    head = {"path": name, "total_bytes": total} if first else {}
                    yield pb.FileChunk(data=data, crc32=zlib.crc32(data), **head)
                    first = False
                    if not data:
                        break

    def Clients(self, request: pb.ClientsRequest, context: grpc.ServicerContext) -> pb.ClientsReply:
        self._operator(context)
        return pb.ClientsReply(clients=[_client(agent) for agent in self._roster.agents()])

    def _operator(self, context: grpc.ServicerContext) -> None:
        admitted(context, self._roster, "operator")


def _answer(context: grpc.ServicerContext, ask: Any) -> Any:
    try:
        return ask()
    except FedPeftError as error:
        code = grpc.StatusCode.INVALID_ARGUMENT
        if not isinstance(error, JobError) and error.field == "run":
            code = grpc.StatusCode.NOT_FOUND
        context.abort(code, str(error))
        raise


def _run_status(run: dict[str, Any]) -> pb.RunStatus:
    return pb.RunStatus(
        run_id=run["run_id"],
        name=run["name"],
        state=run["state"],
        round=run["round"],
        rounds_total=run["rounds_total"],
        error=run["error"] or "",
        clients=[
            pb.ClientStatus(
                name=c["name"], state=c.get("state", ""), detail=c.get("detail", ""), online=c.get("online", False)
            )
            for c in run["clients"]
        ],
    )


def _client(agent: Agent) -> pb.EnrolledClient:
    return pb.EnrolledClient(
        name=agent.name,
        role="client",
        fingerprint=agent.fingerprint,
        online=agent.online,
        enrolled_at=agent.enrolled_at,
        last_seen_at=agent.last_seen_at,
        agent_version=agent.version,
        limits=dict(agent.limits),
    )
