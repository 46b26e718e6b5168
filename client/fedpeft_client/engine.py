"""Flower inside the agent: one resident process that answers messages, round after round.

This is the only module of the client that uses Flower's private names; ``docs/flower.md`` lists them. A stock Flower
node starts a new process for each message; here a Flower ``ClientApp`` is called in the process that is already warm,
so the base model, its kernels and the CUDA context stay loaded::

    bundle = load_bundle("hospital-a.toml")
    channel, endpoint = open_channel(bundle)
    FleetSession(channel, bundle, endpoint).run(app, stop)

:meth:`FleetSession.run` returns when ``stop`` is set and raises :class:`FedPeftError` when trying again cannot help
(not enrolled, certificate refused, clock wrong, bundle used twice). Everything else it sits out: a daemon that
restarts, a network that fails, a node that was taken for dead. Three threads share the work, so that a long training
never costs the node its place:

====================  ===========================================================
the caller's thread   joins, asks for messages, fetches their objects, sends replies
``fedpeft-heart``     a heartbeat every 5 s
``fedpeft-app``       runs the ClientApp, always the same thread, one message at a time
====================  ===========================================================

Flower refuses a key whose last session has not expired, so an agent that was killed waits before it can rejoin: at
most 20 s (two intervals of 10 s, the shortest that Flower accepts, after the last heartbeat). One that was stopped in
an orderly way signs off and rejoins at once.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import grpc

from fedpeft.errors import FedPeftError
from fedpeft_client.bundle import Bundle, check_validity, why_refused

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

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.app.message import remove_content_from_message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.common.serde import message_from_proto, message_to_proto  # noqa: E402
from flwr.proto.fleet_pb2 import (  # noqa: E402
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub  # noqa: E402
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # noqa: E402
from flwr.proto.message_pb2 import (  # noqa: E402
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node  # noqa: E402
from flwr.supercore.date import now  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: E402
from flwr.supercore.primitives.asymmetric import sign_message  # noqa: E402

log = logging.getLogger(__name__)

State = Literal["connecting", "waiting", "online", "working", "disconnected", "stopped"]
"""``connecting``: not yet joined. ``waiting``: a former session of this key has not expired. ``online``: ready for a
message. ``working``: the app is running. ``disconnected``: the server does not answer. ``stopped``: signed off."""

HEARTBEAT_INTERVAL_S = 10.0  # what is announced; Flower's minimum. The node counts as offline after twice this time.
_BEAT_S = 5.0  # what is sent, so that one lost heartbeat is harmless
_CALL_S = 10.0
_OBJECT_WAIT_S = 30.0
_IDENTITY_IN_USE_S = 3 * HEARTBEAT_INTERVAL_S + 15.0
_IDLE_POLL_S = (0.05, 1.0)
_BACKOFF_S = (0.1, 3.0)


class _ServerAway(Exception):
    """The call did not get through, or the server could not deal with it; try again later."""


class _NodeForgotten(Exception):
    """The server does not know this node by this number; join again."""


class _NotWanted(Exception):
    """The server does not take the reply: its run has ended, or the reply breaks a limit."""


class FleetSession:
    """The agent's side of Flower's Fleet protocol, over a channel under mutual TLS.

    Args:
        channel: from :func:`fedpeft_client.bundle.open_channel`; the caller closes it.
        bundle: who we are. Its key signs each call and its certificate must be the channel's.
        endpoint: where the channel goes, for messages and diagnosis.
        stop_grace_s: how long :meth:`run` waits for a running app after ``stop`` was set.
        send_tracebacks: put the traceback of a failed app into the error reply. Off by default: a traceback can show
            paths and data of this machine.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        bundle: Bundle,
        endpoint: str,
        *,
        stop_grace_s: float = 5.0,
        send_tracebacks: bool = False,
    ):
        require_flower()
        logging.getLogger("flwr").setLevel(logging.WARNING)
        self._bundle, self._endpoint = bundle, endpoint
        self._stop_grace_s, self._send_tracebacks = stop_grace_s, send_tracebacks
        self._fleet = FleetStub(grpc.intercept_channel(channel, _SignTimestamp(bundle)))
        self._node = Node()
        self._forgotten = threading.Event()
        self._ended = threading.Event()
        self._beat_now = threading.Event()
        self._state_of_app = RecordDict()
        self._report: Callable[[State], None] = lambda _: None
        self._reported: State | None = None

    @property
    def node_id(self) -> int:
        """Flower's number for this node; 0 before the first joining."""
        return int(self._node.node_id)

    def run(
        self,
        app: ClientApp,
        stop: threading.Event,
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        """Join, answer messages with ``app``, and come back by oneself, until ``stop`` is set.

        The app's ``Context.state`` lasts for this session, across runs. An exception of the app becomes an error
        reply that names its type only; the session goes on.

        Raises:
            FedPeftError: when trying again cannot help; it says what to do.
        """
        self._report = on_state or (lambda _: None)
        worker = _AppThread()
        heart = threading.Thread(target=self._beat, name="fedpeft-heart", daemon=True)
        self._ended.clear()
        heart.start()
        try:
            while not stop.is_set():
                self._join(stop)
                if not stop.is_set():
                    self._serve(app, worker, stop)
        finally:
            self._ended.set()
            self._beat_now.set()
            worker.finish()
            heart.join(timeout=_CALL_S)
            self._sign_off()
            self._say("stopped")

    def _join(self, stop: threading.Event) -> None:
        """Activate the node; returns when it is online or ``stop`` is set."""
        self._say("connecting")
        backoff = _Backoff(stop)
        refused_since: float | None = None
        key = self._bundle.public_key_pem
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_INTERVAL_S)
        failures = 0
        while not stop.is_set():
            try:
                node_id = self._fleet.ActivateNode(request, timeout=_CALL_S).node_id
            except grpc.RpcError as error:
                code = error.code()
                if code is grpc.StatusCode.PERMISSION_DENIED:
                    raise FedPeftError(
                        f"the server does not know the key of {self._bundle.name} ({error.details()})",
                        field="endpoint",
                        value=self._endpoint,
                        hint="ask the operator to enrol this participant: "
                        f"fedpeft server enroll {self._bundle.name} --renew",
                    ) from None
                if code is grpc.StatusCode.FAILED_PRECONDITION:
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since > _IDENTITY_IN_USE_S:
                        raise FedPeftError(
                            f"another agent is running with the bundle of {self._bundle.name}",
                            field="endpoint",
                            value=self._endpoint,
                            hint="stop the other agent; every agent needs a bundle of its own",
                        ) from None
                    self._say("waiting")
                    stop.wait(0.5)
                    continue
                try:
                    self._classify(error)
                except (_NodeForgotten, _NotWanted, _ServerAway) as away:
                    failures += 1
                    # Once early, then now and then: it opens a connection of its own.
                    if failures in (2, 5) or failures % 20 == 0:
                        self._raise_if_refused()
                    log.debug("joining failed: %s", away)
                backoff.wait()
                continue
            self._node = Node(node_id=node_id)
            self._forgotten.clear()
            self._say("online")
            return

    def _serve(self, app: ClientApp, worker: _AppThread, stop: threading.Event) -> None:
        """Answer messages until ``stop`` is set or the server has forgotten this node."""
        backoff = _Backoff(stop)
        idle_s, failures = _IDLE_POLL_S[0], 0
        while not stop.is_set() and not self._forgotten.is_set():
            asked = time.monotonic()
            try:
                message = self._next_message(stop)
            except _NodeForgotten:
                return
            except _NotWanted:
                continue
            except _ServerAway:
                failures += 1
                self._say("disconnected")
                if failures % 10 == 0:
                    self._raise_if_refused()
                backoff.wait()
                continue
            if failures:
                # The server may have counted us out meanwhile.
                self._beat_now.set()
            backoff.reset()
            failures = 0
            self._say("online")
            if message is not None:
                idle_s = _IDLE_POLL_S[0]
                self._say("working")
                started = time.monotonic()
                reply = self._answer(app, worker, message, stop)
                if reply is not None:
                    self._deliver(reply, time.monotonic() - started, stop)
                continue
            # A server that holds the question open paces us; one that answers at once should not be hammered.
            if time.monotonic() - asked < 0.5:
                stop.wait(idle_s * random.uniform(0.8, 1.2))
                idle_s = min(_IDLE_POLL_S[1], 1.5 * idle_s)

    def _next_message(self, stop: threading.Event) -> Message | None:
        response = self._pull(stop)
        if response is None or not response.messages_list:
            return None
        envelope = message_from_proto(response.messages_list[0])
        run_id, message_id = envelope.metadata.run_id, envelope.metadata.message_id
        contents: dict[str, bytes] = {}
        for branch in iterate_object_tree(response.message_object_trees[0]):
            content = self._fetch(run_id, branch.object_id)
            if content is None:
                log.warning("message %s was withdrawn while it was being fetched", message_id[:12])
                return None
            contents[branch.object_id] = content
        self._call(
            self._fleet.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id),
        )
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _pull(self, stop: threading.Event) -> Any:
        """Ask for a message; the server may hold the question open for a while, which must not delay stopping."""
        call = self._fleet.PullMessages.future(PullMessagesRequest(node=self._node), timeout=_CALL_S)
        answered = threading.Event()
        call.add_done_callback(lambda _: answered.set())
        while not answered.wait(0.2):
            if stop.is_set():
                call.cancel()
                return None
        return self._call(lambda request, timeout: call.result(), None)

    def _fetch(self, run_id: int, object_id: str) -> bytes | None:
        deadline = time.monotonic() + _OBJECT_WAIT_S
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        while time.monotonic() < deadline:
            response = self._call(self._fleet.PullObject, request)
            if not response.object_found:
                return None
            if response.object_available:
                return bytes(response.object_content)
            # Its message was registered a moment before its objects.
            time.sleep(0.01)
        return None

    def _answer(self, app: ClientApp, worker: _AppThread, message: Message, stop: threading.Event) -> Message | None:
        """The app's reply or the error in its place; ``None`` when stopped before the app was done."""
        context = Context(
            run_id=message.metadata.run_id,
            node_id=self._node.node_id,
            node_config={},
            state=self._state_of_app,
            run_config={},
        )

        def call() -> Message:
            reply = app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {type(reply).__name__} instead of a Message")
            return reply

        outcome = worker.run(call)
        finished_by: float | None = None
        while not outcome.done.wait(0.1):
            if stop.is_set():
                finished_by = finished_by or time.monotonic() + self._stop_grace_s
                if time.monotonic() >= finished_by:
                    return None
        self._state_of_app = context.state
        if outcome.error is None:
            return outcome.reply
        log.error("the app failed on message %s", message.metadata.message_id[:12], exc_info=outcome.error)
        return Message(
            Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=self._reason(outcome.error)), reply_to=message
        )

    def _reason(self, error: BaseException) -> str:
        if self._send_tracebacks:
            return "".join(traceback.format_exception(error))
        # The text of an exception may name paths and values of this machine; it is in the agent's own log.
        return f"the agent failed ({type(error).__name__}); its own log says why"

    def _deliver(self, reply: Message, seconds: float, stop: threading.Event) -> None:
        """Send ``reply``, through restarts of the server, until it has arrived or its run is over."""
        backoff = _Backoff(stop)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects = {object_id: each.deflate() for object_id, each in get_all_nested_objects(reply).items()}
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
        run_id = reply.metadata.run_id
        while True:
            try:
                pushed = self._call(self._fleet.PushMessages, request)
                for object_id in pushed.objects_to_push:
                    self._call(
                        self._fleet.PushObject,
                        PushObjectRequest(
                            node=self._node,
                            run_id=run_id,
                            session_id=pushed.session_id,
                            object_id=object_id,
                            object_content=objects[object_id],
                        ),
                    )
                return
            except _NotWanted as refusal:
                log.warning("the server did not take a reply, it is dropped: %s", refusal)
                return
            except _NodeForgotten:
                self._forgotten.set()
                return
            except _ServerAway:
                self._say("disconnected")
                if stop.is_set():
                    return
                backoff.wait()

    def _beat(self) -> None:
        """Heartbeats from joining to signing off, also while the app runs and while the server is away."""
        pause_s = _BEAT_S
        while not self._ended.is_set():
            self._beat_now.wait(pause_s)
            self._beat_now.clear()
            if self._ended.is_set() or not self._node.node_id or self._forgotten.is_set():
                continue
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL_S)
            try:
                known = self._fleet.SendNodeHeartbeat(request, timeout=_BEAT_S).success
                pause_s = _BEAT_S
            except grpc.RpcError as error:
                known = error.code() is not grpc.StatusCode.UNAUTHENTICATED
                pause_s = 1.0
            if not known:
                self._forgotten.set()

    def _sign_off(self) -> None:
        """Free the identity, so that a new session need not wait; best effort."""
        if not self._node.node_id:
            return
        try:
            self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id), timeout=2.0)
        except grpc.RpcError:
            log.debug("the server was not there to sign off from")

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            self._classify(error)
            raise

    def _classify(self, error: grpc.RpcError) -> None:
        """Raise what a failed call means for the session."""
        code, details = error.code(), error.details() or ""
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
            raise _NotWanted(details)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            if "Invalid node ID" in details:
                raise _NodeForgotten(details)
            if "timestamp" in details:
                raise FedPeftError(
                    "the server refused the time of this machine",
                    field="clock",
                    value=now().isoformat(timespec="seconds"),
                    hint="set the clock (for example with NTP): it may differ from the server's by 5 s",
                )
            raise FedPeftError(
                f"the server refused the key of {self._bundle.name} ({details})",
                field="endpoint",
                value=self._endpoint,
                hint=f"ask the operator for a new bundle: fedpeft server enroll {self._bundle.name} --renew",
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise FedPeftError(
                "this is not a fedpeft server, or one of another version",
                field="endpoint",
                value=self._endpoint,
                hint="check the address and that client and server run the same release",
            )
        raise _ServerAway(f"{code.name}: {details}")

    def _raise_if_refused(self) -> None:
        check_validity(self._bundle)
        refusal = why_refused(self._bundle, self._endpoint)
        if refusal is not None:
            raise refusal

    def _say(self, state: State) -> None:
        if state != self._reported:
            self._reported = state
            self._report(state)


_CallDetails = namedtuple("_CallDetails", "method timeout metadata credentials wait_for_ready compression")


class _SignTimestamp(grpc.UnaryUnaryClientInterceptor):
    """Flower's node authentication: every call carries the public key and a signed time."""

    def __init__(self, bundle: Bundle):
        self._private_key, self._public_key = bundle.private_key, bundle.public_key_pem

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        stamp = now().isoformat()
        metadata = [
            *(details.metadata or ()),
            ("flwr-public-key-bin", self._public_key),
            ("flwr-timestamp", stamp),
            ("flwr-signature-bin", sign_message(self._private_key, stamp.encode("ascii"))),
        ]
        signed = _CallDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return continuation(signed, request)


class _Outcome:
    """What became of one call of the app."""

    def __init__(self, call: Callable[[], Message]):
        self.call = call
        self.done = threading.Event()
        self.reply: Message | None = None
        self.error: BaseException | None = None


class _AppThread:
    """One thread for all calls of the app: thread pools of torch and CUDA contexts belong to the calling thread.

    A daemon thread, so that a training that does not end cannot keep the process from exiting.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[_Outcome | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="fedpeft-app", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], Message]) -> _Outcome:
        outcome = _Outcome(call)
        self._tasks.put(outcome)
        return outcome

    def finish(self) -> None:
        self._tasks.put(None)

    def _work(self) -> None:
        while (outcome := self._tasks.get()) is not None:
            try:
                outcome.reply = outcome.call()
            except BaseException as error:
                # Also SystemExit: whatever the app does, the agent stays.
                outcome.error = error
            outcome.done.set()


class _Backoff:
    """Exponential waiting with jitter, bounded, ended by ``stop``."""

    def __init__(self, stop: threading.Event):
        self._stop, self._next_s = stop, _BACKOFF_S[0]

    def wait(self) -> None:
        self._stop.wait(self._next_s * random.uniform(0.5, 1.0))
        self._next_s = min(_BACKOFF_S[1], 2 * self._next_s)

    def reset(self) -> None:
        self._next_s = _BACKOFF_S[0]
