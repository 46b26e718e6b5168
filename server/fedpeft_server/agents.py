"""The agents as the daemon knows them: who is admitted, what they announced, how far they are.

Admission has one source, the table of enrolled clients: a certificate of the authority is not enough, its key must be
enrolled and not revoked. :class:`Roster` answers that for every service and keeps Flower's list of node keys equal to
it, so that ``fedpeft server enroll`` and ``revoke`` take effect while the daemon runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedpeft import __version__
from fedpeft.errors import FedPeftError
from fedpeft.store.store import RunStore
from fedpeft_proto.v1 import coordinator_pb2 as pb
from fedpeft_proto.v1 import coordinator_pb2_grpc as rpc
from fedpeft_server.engine import FlowerEngine
from fedpeft_server.events import printable
from fedpeft_server.pki import PeerIdentity, peer_identity

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0


@dataclass(frozen=True)
class Agent:
    """An enrolled client as seen now."""

    name: str
    node_id: int | None
    fingerprint: str
    online: bool
    enrolled_at: float
    last_seen_at: float
    version: str
    limits: Mapping[str, str]


@dataclass(frozen=True)
class Progress:
    """What an agent reported last about a round."""

    run_id: str
    round: int
    phase: str
    step: int
    steps_total: int
    loss: float
    at: float = field(default_factory=time.monotonic)


class Roster:
    """Enrolled clients, their Flower nodes and their latest reports. Thread-safe."""

    def __init__(self, store: RunStore, engine: FlowerEngine):
        self._store, self._engine = store, engine
        self._lock = threading.Lock()
        self._announced: dict[str, tuple[str, Mapping[str, str]]] = {}
        self._progress: dict[str, Progress] = {}
        self._nodes: dict[str, tuple[bytes, int]] = {}

    def sync(self) -> None:
        """Make Flower's nodes equal to the enrolled clients: admit new keys, remove replaced and revoked ones."""
        with self._lock:
            wanted = {c.name: c.public_key for c in self._store.clients() if c.revoked_at is None}
            known = {node.public_key: node.node_id for node in self._engine.nodes()}
            for key, node_id in known.items():
                if key not in wanted.values():
                    self._engine.unregister_node(node_id)
            for name, key in wanted.items():
                if self._nodes.get(name, (b"", 0))[0] != key:
                    node_id = self._engine.register_node(key, name)
                    self._store.set_node(name, node_id)
                    self._nodes[name] = (key, node_id)
            for name in self._nodes.keys() - wanted.keys():
                del self._nodes[name]

    def admit(self, peer: PeerIdentity, role: str = "client") -> None:
        """Raises :class:`FedPeftError` unless ``peer`` has ``role`` and, as a client, is enrolled and not revoked."""
        if peer.role != role:
            raise FedPeftError(
                f"this call is for {role}s; {peer.name} is a {peer.role}",
                hint=f"use a bundle of an {role}" if role == "operator" else "use the bundle of a client",
            )
        if role != "client":
            return
        row = self._store.client_by_key(peer.public_key_bytes)
        if row is None:
            raise FedPeftError(f"client {peer.name} is not enrolled here", hint="ask the operator for a new bundle")
        if row.revoked_at is not None:
            raise FedPeftError(f"client {peer.name} was revoked on {row.revoked_at:%Y-%m-%d}", hint="ask the operator")

    def nodes(self) -> dict[str, int]:
        """Flower's node id of every client that is enrolled and not revoked, by name."""
        with self._lock:
            return {name: node_id for name, (_, node_id) in self._nodes.items()}

    def online(self) -> frozenset[str]:
        """Names of the clients whose heartbeat is current."""
        alive = {node.node_id for node in self._engine.nodes() if node.online}
        return frozenset(name for name, node_id in self.nodes().items() if node_id in alive)

    def agents(self) -> list[Agent]:
        online = self.online()
        with self._lock:
            announced = dict(self._announced)
        return [
            Agent(
                row.name,
                row.node_id,
                row.fingerprint,
                row.name in online,
                row.enrolled_at.timestamp(),
                row.last_seen.timestamp() if row.last_seen else 0.0,
                *announced.get(row.name, ("", {})),
            )
            for row in self._store.clients()
            if row.revoked_at is None
        ]

    def announce(self, name: str, version: str, limits: Mapping[str, str]) -> None:
        with self._lock:
            self._announced[name] = (version, dict(limits))
        try:
            self._store.touch(name)
        except FedPeftError as error:  # a full disk; that the agent is there is known without this date
            log.warning("%s: %s", name, error)

    def report(self, name: str, progress: Progress) -> None:
        with self._lock:
            self._progress[name] = progress

    def progress(self, name: str) -> Progress | None:
        with self._lock:
            return self._progress.get(name)


class AgentLinkService(rpc.AgentLinkServicer):
    """What agents tell the daemon outside a round's messages.

    Args:
        roster: who is admitted.
        wanted: whether ``(run_id, round, client)`` is still worth working on.
    """

    def __init__(self, roster: Roster, wanted: Callable[[str, int, str], bool]):
        self._roster, self._wanted = roster, wanted

    def Announce(self, request: pb.AnnounceRequest, context: grpc.ServicerContext) -> pb.AnnounceReply:
        peer = admitted(context, self._roster, "client")
        limits = {printable(k, 64): printable(v, 500) for k, v in list(request.limits.items())[:16]}
        self._roster.announce(peer.name, printable(request.agent_version, 64), limits)
        return pb.AnnounceReply(server_version=__version__, heartbeat=HEARTBEAT_S)

    def Report(self, request: pb.ReportRequest, context: grpc.ServicerContext) -> pb.ReportReply:
        peer = admitted(context, self._roster, "client")
        self._roster.report(
            peer.name,
            Progress(
                request.run_id,
                request.round,
                printable(request.phase, 64),
                request.step,
                request.steps_total,
                request.loss,
            ),
        )
        return pb.ReportReply(cancel=not self._wanted(request.run_id, request.round, peer.name))


def admitted(context: Any, roster: Roster, role: str) -> PeerIdentity:
    """The caller, if it may make this call; otherwise the call is aborted with PERMISSION_DENIED."""
    try:
        peer = peer_identity(context)
        roster.admit(peer, role)
    except FedPeftError as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        raise
    return peer
