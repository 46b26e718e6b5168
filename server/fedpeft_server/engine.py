"""Flower inside the daemon: nodes, liveness and messages, without Flower's processes.

This is the only module of the server that uses Flower's private names; ``docs/flower.md`` lists them and says why the
version is pinned exactly. It hosts Flower's ``Fleet`` service in a ``grpc.Server`` that belongs to us, over Flower's
``LinkState``, and gives the round loop a Flower ``Grid``::

    engine = FlowerEngine(folder / "flower.db")
    server = grpc.server(pool, interceptors=engine.interceptors(), options=server_options())
    engine.add_to(server)                       # beside our own services, on the same port
    engine.register_node(bundle.public_key_pem, bundle.name)
    ...
    run = engine.open_run("quickstart")
    replies = run.grid.send_and_receive([run.grid.create_message(content, "train", node_id, "1")], timeout=60)

What is on disk and what is not. Nodes, runs and message metadata are rows of SQLite, so nodes keep their ids over a
restart; message *contents* are in memory. They are tiny here (adapter payloads travel on the adapter exchange), an
object in SQLite costs two to three times as much as one in memory, and a restarted daemon opens a new Flower run and
sends its messages again anyway.

Delivery is at most once: Flower hands a message out a single time, and says nothing when it is lost. The engine makes
a loss visible instead of repairing it. An agent has one message in hand at a time, so when it asks for another, or
joins again, whatever it took before is either answered in full or never will be; the latter comes back as an error
reply with code 5 (node unavailable) at the next pull. Sending again is for the round loop to decide.

Admission is stricter than Flower's. A caller must hold a certificate of our authority (TLS), sign with a key that was
registered at enrolment (Flower's node authentication), and the two must be the same key; only the eight calls that an
agent makes are answered at all.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc
from sqlalchemy.exc import SQLAlchemyError

from fedpeft.errors import FedPeftError
from fedpeft_server.pki import peer_identity

FLOWER_VERSION = "1.41.0"


def require_flower() -> None:
    """Refuse to start on any Flower but the one whose private names are used here.

    Raises:
        FedPeftError: naming the installed version and the command that installs the right one.
    """
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        installed = "none"
    if installed != FLOWER_VERSION:
        raise FedPeftError(
            f"this version of fedpeft works with flwr {FLOWER_VERSION} only",
            field="flwr",
            value=installed,
            hint=f"pip install 'flwr=={FLOWER_VERSION}'",
        )


# Both before the first import of flwr: telemetry and the update check read the environment then, and another version
# must be refused by name rather than by an ImportError below.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
require_flower()

from flwr.app import Error, Message, RecordDict  # noqa: E402
from flwr.app.message import remove_content_from_message  # noqa: E402
from flwr.app.metadata import Metadata  # noqa: E402
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, Status  # noqa: E402
from flwr.proto.fleet_pb2 import PullMessagesResponse  # noqa: E402
from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server  # noqa: E402
from flwr.proto.message_pb2 import (  # noqa: E402
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer  # noqa: E402
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor  # noqa: E402
from flwr.server.superlink.linkstate import LinkStateFactory  # noqa: E402
from flwr.serverapp.grid import Grid  # noqa: E402
from flwr.supercore.constant import (  # noqa: E402
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: E402
from flwr.supercore.interceptors import RpcErrorTranslationServerInterceptor  # noqa: E402
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from flwr.superlink.federation import NoOpFederationManager  # noqa: E402

log = logging.getLogger(__name__)

_FLEET = "/flwr.proto.Fleet/"
_ANSWERED = frozenset(
    _FLEET + name
    for name in (
        "ActivateNode",
        "DeactivateNode",
        "SendNodeHeartbeat",
        "PullMessages",
        "PushMessages",
        "PushObject",
        "PullObject",
        "ConfirmMessageReceived",
    )
)
_NO_MESSAGES = PullMessagesResponse()
_TASK_HEARTBEAT_S = 10.0  # Flower fails a run after 60 s without one
_MESSAGE_TTL_S = 12 * 3600.0
_POLL_S = 0.05
_LOST = "this message was lost on the way or when the node or the run started again; send it again"
_MAX_OBJECTS = 1024


@dataclass(frozen=True)
class NodeView:
    """A registered participant as Flower sees it.

    Attributes:
        node_id: Flower's number for it; stable over restarts, but the identity is the key.
        public_key: SubjectPublicKeyInfo in PEM.
        name: the name given at registration.
        online: whether its heartbeat is current.
        online_until: when it counts as offline if no further heartbeat arrives; ``None`` before its first visit.
        joined_at: start of its present (or last) session; ``None`` before its first visit.
    """

    node_id: int
    public_key: bytes = field(repr=False)
    name: str
    online: bool
    online_until: datetime | None
    joined_at: datetime | None


class FlowerEngine:
    """Flower's state and Fleet service, embedded in this process.

    One engine per database; the caller sees to it that no second process opens the same file. On opening, runs that a
    former process left unfinished are ended: their messages have lost their contents with that process.

    Args:
        state_db: SQLite file, created if missing; its folder must exist.
        hold_s: how long an agent's question for messages is held open when there is none. This is what makes a
            round start within milliseconds although agents poll.
        max_held: how many such questions are held at once, each in one thread of the ``grpc.Server``; the others are
            answered at once and the agents slow down. The server's pool needs ``max_held`` threads plus those for
            its other calls.
        max_object_bytes: the largest single object of a reply, and with 1024 objects at most the limit of what one
            participant can make this process hold.

    Raises:
        FedPeftError: when the database cannot be opened.
    """

    def __init__(self, state_db: Path, *, hold_s: float = 2.0, max_held: int = 16, max_object_bytes: int = 4 << 20):
        require_flower()
        # Flower logs each call at INFO to the console; what matters to an operator is logged by the daemon.
        flower_log = logging.getLogger("flwr")
        flower_log.setLevel(logging.WARNING)
        flower_log.addFilter(_not_a_refusal)
        state_db = Path(state_db)
        if not state_db.parent.is_dir():
            raise FedPeftError("no such folder", field="state_db", value=str(state_db.parent))
        self._objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        self._links = LinkStateFactory(str(state_db), NoOpFederationManager(), self._objects)
        self._post = _PostOffice(max_held)
        self._runs: list[EngineRun] = []
        self._lock = threading.Lock()
        self._servicer = _FleetService(
            self._links, self._objects, self._post, hold_s, max_object_bytes, self._owes_nothing
        )
        with _database_errors(state_db):
            self.state = self._links.state()
            unfinished = [Status.PENDING, Status.STARTING, Status.RUNNING]
            for run in self.state.get_run_info(statuses=unfinished):
                self.state.stop_run(run.run_id)

    def add_to(self, server: grpc.Server) -> None:
        """Add Flower's Fleet service to ``server``; :meth:`interceptors` must have been given to it as well."""
        add_FleetServicer_to_server(self._servicer, server)

    def interceptors(self) -> list[grpc.ServerInterceptor]:
        """For ``grpc.server(interceptors=...)``, in this order; they concern Flower's service alone."""
        return [
            _AgentsCallsOnly(),
            _FleetOnly(RpcErrorTranslationServerInterceptor()),
            _FleetOnly(NodeAuthServerInterceptor(self._links)),
            _FleetOnly(_SameKeyAsTls()),
        ]

    def register_node(self, public_key_bytes: bytes, name: str) -> int:
        """Admit a key, as ``flwr supernode register`` does; admitting a known key again returns its id.

        Args:
            public_key_bytes: SubjectPublicKeyInfo in PEM (``Bundle.public_key_pem``).

        Raises:
            FedPeftError: for a key that had been removed; it stays removed.
        """
        known = self.state.get_node_id_by_public_key(public_key_bytes)
        if known is not None:
            return int(known)
        try:
            node_id = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_bytes, 0, name=name)
        except ValueError:
            raise FedPeftError(
                "this key was removed from the federation",
                field="name",
                value=name,
                hint=f"enrol the participant with a new key: fedpeft server enroll {name} --renew",
            ) from None
        return int(node_id)

    def unregister_node(self, node_id: int) -> None:
        """Remove a node for good: its next call is refused, and so is its key from then on.

        Raises:
            FedPeftError: when there is no such node.
        """
        try:
            self.state.delete_node(NOOP_FLWR_AID, node_id)
        except ValueError:
            raise FedPeftError("no such node", field="node_id", value=node_id) from None

    def nodes(self) -> list[NodeView]:
        """All registered nodes, in order of registration."""
        infos = self.state.get_node_info(statuses=[NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE])
        return [_view(info) for info in sorted(infos, key=lambda info: (info.registered_at, info.node_id))]

    def open_run(self, name: str) -> EngineRun:
        """Open a Flower run, through which messages can be sent until it is closed. Several may be open at once."""
        run = EngineRun(self, name)
        with self._lock:
            self._runs.append(run)
        return run

    def close(self) -> None:
        """Close all runs and let go of waiting agents and of the database. Stop the ``grpc.Server`` around it."""
        self._post.close()
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.close()
        engine = getattr(self.state, "_engine", None)
        if engine is not None:
            engine.dispose()

    def _closed(self, run: EngineRun) -> None:
        with self._lock:
            if run in self._runs:
                self._runs.remove(run)

    def _owes_nothing(self, message_ids: set[str]) -> None:
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.grid._will_not_be_answered(message_ids)


class EngineRun:
    """A Flower run that is kept alive while this object is open; made by :meth:`FlowerEngine.open_run`.

    Flower ends a run whose task has not sent a heartbeat for 60 s. A thread of this object sends them. After a longer
    standstill of the whole machine the run is lost; a new one is opened under the same object, and messages of the old
    one that were not answered come back as error replies with code 5.
    """

    def __init__(self, engine: FlowerEngine, name: str):
        self.name = name
        self._engine = engine
        self._stop = threading.Event()
        self.run_id, self._task_id = self._create()
        self.grid = EmbeddedGrid(engine, self.run_id, self._stop)
        self._heart = threading.Thread(target=self._beat, name=f"flower-run-{name}", daemon=True)
        self._heart.start()

    def close(self) -> None:
        """End the Flower run; agents' late replies to it are refused. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._heart.join(timeout=5)
        self._engine.state.stop_run(self.run_id)
        self._engine._closed(self)

    def __enter__(self) -> EngineRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> tuple[int, int]:
        state = self._engine.state
        run_id = state.create_run(
            f"fedpeft/{self.name}", "1", None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        if not run_id:
            raise FedPeftError("Flower did not create the run", field="run", value=self.name)
        task_id = state.get_run_info(run_ids=[run_id])[0].primary_task_id
        if state.claim_task(task_id) is None or not state.activate_task(task_id):
            raise FedPeftError("Flower did not start the run", field="run", value=self.name)
        # Process-global in Flower, and read by the public constructor Message(content, node_id, type). A stock
        # Strategy uses it; the grid puts the right run into every message, so the last run opened may win here.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, SUPERLINK_NODE_ID
        return run_id, task_id

    def _beat(self) -> None:
        while not self._stop.wait(_TASK_HEARTBEAT_S):
            try:
                self.heartbeat()
            except SQLAlchemyError as error:
                # A full disk or a locked file: the next beat may succeed, and there is a minute of grace.
                log.warning("heartbeat of run %s failed: %s", self.name, error.__class__.__name__)

    def heartbeat(self) -> None:
        """Keep the Flower run alive, or open it anew where Flower has already ended it."""
        if not self._engine.state.acknowledge_task_heartbeat(self._task_id) and not self._stop.is_set():
            log.warning("run %s had no heartbeat for too long; opened anew", self.name)
            self.run_id, self._task_id = self._create()
            self.grid._continue_as(self.run_id)


class EmbeddedGrid(Grid):
    """Flower's ``Grid`` over the state in this process; stock strategies run on it.

    Safe to use from several threads. Messages are sent under this grid's run whatever run they were made in.
    """

    def __init__(self, engine: FlowerEngine, run_id: int, stop: threading.Event):
        self._engine, self._state, self._post, self._stop = engine, engine.state, engine._post, stop
        self._run_id = run_id
        self._run: Run | None = None
        self._lock = threading.RLock()
        self._unanswered: dict[str, Message] = {}  # by message id, without content
        self._lost: set[str] = set()  # ids among them that their node took and will not answer any more
        self._arriving: dict[str, Message] = {}  # replies by message id whose objects are still on their way

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run if self._run is not None else self._state.get_run_info(run_ids=[self._run_id])[0]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message of this run. ``message_type`` is ``"train"``, ``"evaluate"`` or ``"query"``, or one of them with
        an action as in ``"train.warmup"``; ``group_id`` is the round in words; ``ttl`` is in seconds."""
        metadata = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or _MESSAGE_TTL_S,
            message_type=message_type,
        )
        return Message(content=content, metadata=metadata)

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are online."""
        return sorted(self._state.get_nodes(self._run_id))

    def get_nodes(self) -> list[NodeInfo]:
        """Flower's records of the nodes that are online."""
        return list(self._state.get_node_info(node_ids=self.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message to its node, at most once.

        A message may be pushed again, also the same object: it becomes a new message.

        Returns:
            The ids in the order of ``messages``; ``""`` for a node that is unknown or never was online.

        Raises:
            FedPeftError: when the state cannot be written, e.g. on a full disk.
        """
        messages, ids, missing, contents = list(messages), [], [], {}
        with self._lock, _database_errors(None), no_object_id_recompute():
            session = self._state.start_session(self._run_id)
            # All trees first: a push session ends as soon as nothing is missing from it.
            for message in messages:
                facts = message.metadata.__dict__
                # A fresh time makes a repeated message a new one: ids are hashes of what is sent.
                facts.update(_run_id=self._run_id, _src_node_id=SUPERLINK_NODE_ID, _created_at=time.time())
                facts["_message_id"] = message.object_id
                for object_id, nested in get_all_nested_objects(message).items():
                    contents[object_id] = nested.deflate()
                envelope = remove_content_from_message(message)
                stored, absent = self._state.store_message_and_object_tree(envelope, get_object_tree(message), session)
                ids.append(message.metadata.message_id if stored else "")
                missing += absent
                if stored:
                    self._unanswered[message.metadata.message_id] = envelope
            for object_id in dict.fromkeys(missing):
                self._state.store_object(self._run_id, session, object_id, contents[object_id])
        for message, message_id in zip(messages, ids, strict=True):
            if message_id:
                self._post.put(message.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are complete by now, each returned once; ids that were answered or withdrawn are passed over.

        Error replies (``reply.has_error()``) have code 2 for an exception in the app, 3 or 4 for a message that
        expired, 5 for a node that is offline or lost the message by starting again. ``metadata.src_node_id`` is the
        node that was asked in any case.
        """
        replies: list[Message] = []
        with self._lock, _database_errors(None):
            wanted = {message_id for message_id in message_ids if message_id in self._unanswered}
            # Of a run that Flower gave up; its state would not answer for them.
            stale = {each for each in wanted if self._unanswered[each].metadata.run_id != self._run_id}
            wanted -= stale
            lost = wanted & self._lost
            arriving = {reply.metadata.reply_to_message_id for reply in self._arriving.values()}
            if questions := wanted - arriving:
                for reply in self._state.get_message_res(message_ids=questions, run_id=self._run_id):
                    self._arriving[reply.metadata.message_id] = reply
            for envelope in list(self._arriving.values()):
                if envelope.metadata.reply_to_message_id in wanted:
                    replies += self._assemble(envelope)
            # Last, because a reply may have been complete before its node asked for the next message.
            replies += [self._give_up(each) for each in sorted(stale | lost) if each in self._unanswered]
            return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push ``messages`` and wait for their replies, for ``timeout`` seconds or until the run is closed."""
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting:
            arrived = self.pull_messages(waiting)
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if not waiting or self._stop.wait(_POLL_S) or (deadline is not None and time.monotonic() >= deadline):
                break
        return replies

    def forget_messages(self, message_ids: Iterable[str]) -> None:
        """Withdraw messages whose replies are no longer wanted, e.g. after a deadline, and free what they hold."""
        ids = {message_id for message_id in message_ids if message_id}
        with self._lock, _database_errors(None):
            self._state.delete_messages(message_ins_ids=ids)
            for message_id in ids:
                self._state.object_store.delete(message_id)
                self._unanswered.pop(message_id, None)
            self._lost -= ids
            for reply_id, reply in list(self._arriving.items()):
                if reply.metadata.reply_to_message_id in ids:
                    self._state.object_store.delete(reply_id)
                    del self._arriving[reply_id]

    def _assemble(self, envelope: Message) -> list[Message]:
        """The reply with its content, if all objects are here; nothing if they are not, or never will be."""
        reply_id, asked = envelope.metadata.message_id, envelope.metadata.reply_to_message_id
        store = self._state.object_store
        contents: dict[str, bytes] = {}
        try:
            tree = store.get_object_tree(reply_id)
        except NoObjectInStoreError:
            tree = None
        if tree is None:
            # The node vanished while it was sending and the push session has expired: as good as never sent.
            return [self._give_up(asked)]
        for node in iterate_object_tree(tree):
            content = self._state.get_object(self._run_id, node.object_id)
            if not content:
                return []
            contents[node.object_id] = content
        del self._arriving[reply_id]
        store.delete(reply_id)
        try:
            reply = inflate_object_from_contents(reply_id, contents)
            if not isinstance(reply, Message):
                raise TypeError(f"not a message but {type(reply).__name__}")
        except Exception as error:
            # The bytes come from a participant; whatever is wrong with them is its failure and not the round's.
            log.warning("a reply could not be read: %s", error)
            return [self._give_up(asked, f"the reply could not be read ({type(error).__name__})")]
        # The state has checked the envelope (sender, question, run); the copy inside the reply is the sender's claim.
        reply.__dict__["_metadata"] = envelope.metadata
        if question := self._unanswered.get(asked):
            # Error replies that Flower makes itself come "from" the server; say which node they are about.
            reply.metadata.__dict__["_src_node_id"] = question.metadata.dst_node_id
        self.forget_messages([asked])
        return [reply]

    def _give_up(self, message_id: str, reason: str = _LOST) -> Message:
        question = self._unanswered[message_id]
        self.forget_messages([message_id])
        return Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason=reason), reply_to=question)

    def _will_not_be_answered(self, message_ids: set[str]) -> None:
        with self._lock:
            self._lost |= message_ids & self._unanswered.keys()

    def _continue_as(self, run_id: int) -> None:
        with self._lock:
            self._run_id, self._run = run_id, None


class _PostOffice:
    """Which nodes may have a message waiting, and which message a node has in hand.

    Flower's state answers the first question by a write transaction in SQLite for each poll of each agent. All
    messages of this process pass through here, so a node without mail need not disturb the database, and its question
    can be held open until there is some.
    """

    def __init__(self, max_held: int):
        self._changed = threading.Condition()
        self._mail: set[int] = set()
        self._in_hand: dict[int, set[str]] = {}
        self._slots = threading.BoundedSemaphore(max(1, max_held))
        self._closed = False

    def put(self, node_id: int) -> None:
        with self._changed:
            self._mail.add(node_id)
            self._changed.notify_all()

    def await_mail(self, node_id: int, hold_s: float) -> bool:
        """Whether to ask the state for a message; waits up to ``hold_s`` if there is room to wait."""
        with self._changed:
            if node_id in self._mail:
                return True
        if not self._slots.acquire(blocking=False):
            return False
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or node_id in self._mail, hold_s)
                return node_id in self._mail
        finally:
            self._slots.release()

    def clear(self, node_id: int) -> None:
        with self._changed:
            self._mail.discard(node_id)

    def took(self, node_id: int, message_id: str) -> None:
        with self._changed:
            self._in_hand.setdefault(node_id, set()).add(message_id)

    def hands_free(self, node_id: int) -> set[str]:
        """The node has nothing in hand any more; what it had until now."""
        with self._changed:
            return self._in_hand.pop(node_id, set())

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _FleetService(FleetServicer):
    """Flower's service with our admission, held pulls and a notice of what a node will not answer."""

    def __init__(
        self,
        links: LinkStateFactory,
        objects: ObjectStoreFactory,
        post: _PostOffice,
        hold_s: float,
        max_object_bytes: int,
        owes_nothing: Callable[[set[str]], None],
    ):
        super().__init__(state_factory=links, objectstore_factory=objects, enable_supernode_auth=True)
        self._post, self._hold_s, self._owes_nothing = post, hold_s, owes_nothing
        self._max_object_bytes = max_object_bytes

    def ActivateNode(self, request: Any, context: grpc.ServicerContext) -> Any:
        state = self.state_factory.state()
        node_id = state.get_node_id_by_public_key(request.public_key)
        if node_id is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this key is not enrolled")
        # Flower refuses as well, but logs each attempt as an error; an agent that restarts makes several.
        for info in state.get_node_info(node_ids=[node_id], statuses=[NodeStatus.ONLINE]):
            wait_s = max(0.0, info.online_until - time.time())
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this identity is in use for {wait_s:.1f} s more")
        response = super().ActivateNode(request, context)
        self._owes_nothing(self._post.hands_free(response.node_id))
        # Messages that were waiting for the node are still in the state.
        self._post.put(response.node_id)
        return response

    def PullMessages(self, request: Any, context: grpc.ServicerContext) -> Any:
        node_id = request.node.node_id
        if in_hand := self._post.hands_free(node_id):
            self._owes_nothing(in_hand)
        # A caller that has gone must not take a message: it would be lost, Flower hands each out once.
        if not self._post.await_mail(node_id, self._hold_s) or not context.is_active():
            return _NO_MESSAGES
        self._post.clear(node_id)  # before asking: a message that arrives meanwhile raises the flag again
        response = super().PullMessages(request, context)
        for message in response.messages_list:
            self._post.took(node_id, message.metadata.message_id)
            self._post.put(node_id)  # Flower gives one at a time; there may be more
        return response

    def PushMessages(self, request: Any, context: grpc.ServicerContext) -> Any:
        # Flower authenticates request.node but believes the sender that a message claims.
        if any(message.metadata.src_node_id != request.node.node_id for message in request.messages_list):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a reply must come from the node that was asked")
        if any(_exceeds(tree, _MAX_OBJECTS) for tree in request.message_object_trees):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a reply may have {_MAX_OBJECTS} objects")
        return super().PushMessages(request, context)

    # Flower's own handlers of the next three write to SQLite several times per call (run status, traffic figures that
    # no one reads here), which made a round of eight agents twice as slow. Contents are in memory and addressed by
    # hash, so the store alone can answer; and what is pushed after the run's end finds its push session gone.

    def PullObject(self, request: Any, context: grpc.ServicerContext) -> Any:
        content = self.objectstore_factory.store().get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.objectstore_factory.store().delete(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def PushObject(self, request: Any, context: grpc.ServicerContext) -> Any:
        if len(request.object_content) > self._max_object_bytes:
            limit = f"an object of a reply may have {self._max_object_bytes} bytes; payloads go by the adapter exchange"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, limit)
        stored = self.state_factory.state().store_object(
            request.run_id, request.session_id, request.object_id, request.object_content
        )
        return PushObjectResponse(stored=stored)


class _FleetOnly(grpc.ServerInterceptor):
    """Apply an interceptor to Flower's service and leave ours alone."""

    def __init__(self, inner: grpc.ServerInterceptor):
        self._inner = inner

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        if details.method.startswith(_FLEET):
            return self._inner.intercept_service(continuation, details)
        return continuation(details)


class _AgentsCallsOnly(grpc.ServerInterceptor):
    """Of Flower's service, answer what an agent calls; not registration, and nothing about app bundles."""

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        if details.method.startswith(_FLEET) and details.method not in _ANSWERED:
            return grpc.unary_unary_rpc_method_handler(self._refuse)
        return continuation(details)

    @staticmethod
    def _refuse(_: bytes, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not offered by fedpeft; participants are enrolled by an operator")


class _SameKeyAsTls(grpc.ServerInterceptor):
    """The node key must be the key of the TLS certificate.

    Flower lets any signed caller activate any registered key; and a signature covers the time of day alone, so
    whoever overheard one could replay it. Tied to the TLS key, neither is of use to anyone else.
    """

    def intercept_service(self, continuation: Callable[..., Any], details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        signed_by = next((value for key, value in details.invocation_metadata if key == "flwr-public-key-bin"), b"")

        def checked(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                certified = peer_identity(context).public_key_bytes
            except FedPeftError as error:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            if signed_by != certified or getattr(request, "public_key", certified) != certified:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "node key and TLS certificate differ")
            return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            checked,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _exceeds(tree: ObjectTree, limit: int) -> bool:
    return any(count >= limit for count, _ in enumerate(iterate_object_tree(tree)))


def _not_a_refusal(record: logging.LogRecord) -> bool:
    """Drop Flower's log of each call that it refused, e.g. a late reply: the caller has been told."""
    return "[ApiError:" not in record.getMessage()


def _view(info: NodeInfo) -> NodeView:
    return NodeView(
        node_id=info.node_id,
        public_key=info.public_key,
        name=info.name,
        online=info.status == NodeStatus.ONLINE,
        online_until=datetime.fromtimestamp(info.online_until).astimezone() if info.online_until else None,
        joined_at=datetime.fromisoformat(info.last_activated_at) if info.last_activated_at else None,
    )


@contextmanager
def _database_errors(path: Path | None) -> Iterator[None]:
    """Turn the database's errors into one line with a way out."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise FedPeftError(
            f"Flower's state database failed: {cause}",
            field="state_db",
            value=None if path is None else str(path),
            hint="check that the file is writable, not damaged, and that the disk is not full",
        ) from error
