"""The agent's session: what it sits out, what it gives up on, and what it lets out of the machine."""

from __future__ import annotations

import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedpeft_client.engine as engine_module
from fedpeft.bundle import Bundle
from fedpeft.errors import FedPeftError
from fedpeft_client.bundle import channel_credentials, channel_options, open_channel
from fedpeft_client.engine import FleetSession, require_flower
from fedpeft_server.engine import EngineRun, FlowerEngine
from fedpeft_server.pki import Authority, init_authority, load_server_tls, server_credentials, server_options


class Daemon:
    """Flower's Fleet service on a port that stays the same over restarts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.authority: Authority = init_authority(folder / "server")
        self.port = 0
        self.start()

    def start(self) -> None:
        self.engine = FlowerEngine(self.folder / "flower.db")
        self.server = grpc.server(
            futures.ThreadPoolExecutor(24), interceptors=self.engine.interceptors(), options=server_options()
        )
        self.engine.add_to(self.server)
        credentials = server_credentials(load_server_tls(self.authority.directory))
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self.server.start()

    def stop(self) -> None:
        self.engine.close()
        self.server.stop(0).wait()

    def enroll(self, name: str) -> Bundle:
        bundle = self.authority.issue(name, "client", endpoints=[f"127.0.0.1:{self.port}"])
        self.engine.register_node(bundle.public_key_pem, name)
        return bundle


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.stop()


class Agent:
    """A session in a thread; ``error`` is what it ended with."""

    def __init__(self, bundle: Bundle, app: ClientApp | None = None, **options: bool | float):
        self.channel, endpoint = open_channel(bundle)
        self.session = FleetSession(self.channel, bundle, endpoint, **options)  # type: ignore[arg-type]
        self.stop, self.states, self.error = threading.Event(), list[str](), None
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, args=(app or ClientApp(),), daemon=True)
        self.thread.start()

    def _run(self, app: ClientApp) -> None:
        try:
            self.session.run(app, self.stop, self._said)
        except FedPeftError as error:
            self.error = error

    def _said(self, state: str) -> None:
        with self._changed:
            self.states.append(state)
            self._changed.notify_all()

    def wait_for(self, state: str, times: int = 1, timeout: float = 15) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.states.count(state) >= times, timeout), self.states

    def end(self) -> float:
        started = time.monotonic()
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.channel.close()
        return time.monotonic() - started


def app_that(behaves: Callable[[Message], object]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        behaves(message)
        return Message(RecordDict(), reply_to=message)

    return app


def ask(run: EngineRun, timeout: float = 10) -> list[Message]:
    node_id = run.grid.get_node_ids()[0]
    return run.grid.send_and_receive([run.grid.create_message(RecordDict(), "train", node_id, "1")], timeout=timeout)


def test_private_names_of_flower_are_as_we_know_them() -> None:
    for name, parameters in {
        "flwr.app:Context": ["run_id", "node_id", "node_config", "state", "run_config", "series_id"],
        "flwr.app:Error": ["code", "reason"],
        "flwr.proto.fleet_pb2_grpc:FleetStub": ["channel"],
    }.items():
        module, attribute = name.split(":")
        found = list(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)
        assert found[: len(parameters)] == parameters or set(found) <= set(parameters), (name, found)
    from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2

    def fields(message: type) -> set[str]:
        return set(message.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined]

    assert fields(fleet_pb2.ActivateNodeRequest) == {"public_key", "heartbeat_interval"}
    assert {"messages_list", "message_object_trees"} <= fields(fleet_pb2.PullMessagesResponse)
    assert {"objects_to_push", "session_id"} <= fields(fleet_pb2.PushMessagesResponse)
    assert fields(heartbeat_pb2.SendNodeHeartbeatRequest) == {"node", "heartbeat_interval"}
    assert fields(message_pb2.PullObjectResponse) == {"object_found", "object_available", "object_content"}
    assert "session_id" in fields(message_pb2.PushObjectRequest)


def test_another_flower_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "version", lambda _: "1.40.0")
    with pytest.raises(FedPeftError, match=r"flwr: .* 1\.41\.0 only \(got '1\.40\.0'\); pip install"):
        require_flower()


def test_telemetry_is_off_in_this_process() -> None:
    import os

    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_of_an_exception_only_its_type_leaves_the_machine_unless_asked_to(daemon: Daemon) -> None:
    def fail(_: Message) -> None:
        raise ValueError("no data in /home/secret" + "x" * 1000)

    bundle = daemon.enroll("a")
    for send_tracebacks in (False, True):
        agent = Agent(bundle, app_that(fail), send_tracebacks=send_tracebacks)
        agent.wait_for("online")
        with daemon.engine.open_run("x") as run:
            (reply,) = ask(run)
        agent.end()
        reason = reply.error.reason or ""
        assert ("Traceback" in reason) is send_tracebacks
        if not send_tracebacks:
            assert reason == "the agent failed (ValueError); its own log says why"


def test_heartbeats_go_on_while_the_app_is_busy_and_stopping_does_not_wait_for_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_BEAT_S", 0.3)
    busy = threading.Event()
    agent = Agent(daemon.enroll("a"), app_that(lambda _: busy.wait(30)), stop_grace_s=0.5)
    agent.wait_for("online")
    with daemon.engine.open_run("x") as run:
        assert ask(run, timeout=0.5) == []
        agent.wait_for("working")
        first = daemon.engine.nodes()[0].online_until
        time.sleep(1)
        second = daemon.engine.nodes()[0].online_until
        assert first is not None
        assert second is not None
        assert second - first > timedelta(seconds=0.5)
        assert agent.end() < 3
    busy.set()
    assert agent.states[-1] == "stopped"
    assert not daemon.engine.nodes()[0].online


def test_stopping_an_idle_agent_is_quick(daemon: Daemon) -> None:
    agent = Agent(daemon.enroll("a"))
    agent.wait_for("online")
    time.sleep(0.5)
    assert agent.end() < 1.5


def test_an_agent_waits_for_its_server_and_survives_its_restarts(daemon: Daemon) -> None:
    bundle = daemon.enroll("a")
    daemon.stop()
    agent = Agent(bundle, app_that(lambda _: None))
    time.sleep(0.5)
    assert agent.states == ["connecting"]
    daemon.start()
    agent.wait_for("online")
    daemon.stop()
    agent.wait_for("disconnected")
    daemon.start()
    agent.wait_for("online", times=2)
    with daemon.engine.open_run("x") as run:
        assert [reply.has_content() for reply in ask(run)] == [True]
    assert agent.error is None
    agent.end()


def test_a_reply_to_a_run_that_is_over_is_dropped(daemon: Daemon) -> None:
    busy, wanted = threading.Event(), app_that(lambda _: busy.wait(10))
    agent = Agent(daemon.enroll("a"), wanted)
    agent.wait_for("online")
    with daemon.engine.open_run("x") as run:
        assert ask(run, timeout=0.5) == []
    busy.set()
    with daemon.engine.open_run("y") as run:
        assert [reply.has_content() for reply in ask(run)] == [True]
    agent.end()


def test_a_bundle_used_twice_is_an_error_after_a_while(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_IDENTITY_IN_USE_S", 1.0)
    bundle = daemon.enroll("a")
    first = Agent(bundle)
    first.wait_for("online")
    second = Agent(bundle)
    second.wait_for("waiting")
    second.thread.join(10)
    assert "another agent is running with the bundle of a" in str(second.error)
    # The second one, on its way out, has not signed the first one off.
    assert daemon.engine.nodes()[0].online
    first.end()


def test_a_wrong_clock_is_named(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_module.now
    monkeypatch.setattr(engine_module, "now", lambda: right() + timedelta(hours=1))
    agent = Agent(daemon.enroll("a"))
    agent.thread.join(10)
    assert "clock: the server refused the time of this machine" in str(agent.error)


def test_a_certificate_that_the_server_refuses_ends_the_session(daemon: Daemon, tmp_path: Path) -> None:
    # Ours trusts the server; the server does not trust ours. gRPC alone says "unavailable" to that.
    endpoint = f"127.0.0.1:{daemon.port}"
    other = init_authority(tmp_path / "other").issue("eve", "client", endpoints=[endpoint])
    bundle = Bundle(
        "eve",
        "client",
        (endpoint,),
        daemon.authority.certificate_pem,
        other.certificate_pem,
        other.private_key_pem,
    )
    with grpc.secure_channel(endpoint, channel_credentials(bundle), options=channel_options(endpoint)) as channel:
        session = FleetSession(channel, bundle, endpoint)
        with pytest.raises(FedPeftError, match="the server refused the certificate of eve"):
            session.run(ClientApp(), threading.Event())


def test_something_else_on_the_port_is_named(daemon: Daemon) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=server_options())
    credentials = server_credentials(load_server_tls(daemon.authority.directory))
    endpoint = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    bundle = daemon.authority.issue("a", "client", endpoints=[endpoint])
    channel, _ = open_channel(bundle)
    with channel, pytest.raises(FedPeftError, match="this is not a fedpeft server, or one of another version"):
        FleetSession(channel, bundle, endpoint).run(ClientApp(), threading.Event())
    server.stop(0)
