"""The embedded Flower: its private names are as we know them, and the engine keeps its promises in one process.

Agents here are real sessions over mutual TLS, in threads; ``test_engine_processes.py`` kills processes.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import Message as WireMessage
from flwr.proto.message_pb2 import Metadata as WireMetadata
from flwr.proto.node_pb2 import Node
from flwr.serverapp.strategy import FedAvg

import fedpeft_server.engine as engine_module
from fedpeft.bundle import Bundle
from fedpeft.errors import FedPeftError
from fedpeft_client.bundle import open_channel
from fedpeft_client.engine import FleetSession, _SignTimestamp
from fedpeft_server.engine import EngineRun, FlowerEngine, require_flower
from fedpeft_server.pki import Authority, init_authority, load_server_tls, server_credentials, server_options

# Every private name of Flower that the engine calls, with the parameters that it relies on.
CONTRACT = {
    "flwr.app.message:remove_content_from_message": ["message"],
    "flwr.app.metadata:Metadata": [
        "run_id",
        "message_id",
        "src_node_id",
        "dst_node_id",
        "reply_to_message_id",
        "group_id",
        "created_at",
        "ttl",
        "message_type",
        "src_task_id",
        "dst_task_id",
    ],
    "flwr.proto.fleet_pb2_grpc:add_FleetServicer_to_server": ["servicer", "server"],
    "flwr.server.superlink.fleet.grpc_rere.fleet_servicer:FleetServicer": [
        "state_factory",
        "objectstore_factory",
        "enable_supernode_auth",
    ],
    "flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor:NodeAuthServerInterceptor": ["state_factory"],
    "flwr.server.superlink.linkstate:LinkStateFactory": ["database", "federation_manager", "objectstore_factory"],
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ["obj"],
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": ["tree"],
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": [],
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": [
        "object_id",
        "object_contents",
        "keep_object_contents",
        "objects",
    ],
    "flwr.supercore.interceptors:RpcErrorTranslationServerInterceptor": [],
    "flwr.supercore.object_store:ObjectStoreFactory": ["database"],
    "flwr.superlink.federation:NoOpFederationManager": ["simulation"],
    "flwr.supercore.primitives.asymmetric:sign_message": ["private_key", "message"],
    "flwr.common.serde:message_from_proto": ["message_proto"],
    "flwr.common.serde:message_to_proto": ["message"],
    "flwr.supercore.date:now": [],
}
STATE_CONTRACT = {
    "acknowledge_task_heartbeat": ["task_id"],
    "activate_task": ["task_id"],
    "claim_task": ["task_id"],
    "create_node": ["owner_aid", "owner_name", "public_key", "heartbeat_interval", "location", "name"],
    "delete_messages": ["message_ins_ids"],
    "delete_node": ["owner_aid", "node_id"],
    "get_message_res": ["message_ids", "run_id"],
    "get_node_id_by_public_key": ["public_key"],
    "get_node_info": ["node_ids", "owner_aids", "statuses"],
    "get_nodes": ["run_id"],
    "get_object": ["run_id", "object_id"],
    "start_session": ["run_id"],
    "stop_run": ["run_id"],
    "store_message_and_object_tree": ["message", "object_tree", "session_id"],
    "store_object": ["run_id", "session_id", "object_id", "object_content"],
}


def parameters(thing: object) -> list[str]:
    assert callable(thing)
    return [name for name in inspect.signature(thing).parameters if name != "self"]


@pytest.mark.parametrize("name", CONTRACT)
def test_private_names_of_flower_have_the_signatures_we_use(name: str) -> None:
    module, attribute = name.split(":")
    assert parameters(getattr(importlib.import_module(module), attribute)) == CONTRACT[name]


@pytest.mark.parametrize("name", STATE_CONTRACT)
def test_flowers_state_has_the_methods_we_use(name: str) -> None:
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

    assert parameters(getattr(SqlLinkState, name)) == STATE_CONTRACT[name]


def test_flowers_constants_are_as_documented() -> None:
    from flwr.common import constant
    from flwr.supercore.task_identity import TaskIdentity

    assert constant.HEARTBEAT_MIN_INTERVAL == 10  # docs/flower.md: a killed agent is back within 20 s
    assert constant.HEARTBEAT_PATIENCE == 2
    assert constant.HEARTBEAT_DEFAULT_INTERVAL == 30
    assert constant.PUBLIC_KEY_HEADER == "flwr-public-key-bin"
    assert constant.TIMESTAMP_HEADER == "flwr-timestamp"
    assert constant.SIGNATURE_HEADER == "flwr-signature-bin"
    assert constant.SYSTEM_TIME_TOLERANCE == 5
    assert constant.SUPERLINK_NODE_ID == 1
    assert constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert constant.ErrorCode.NODE_UNAVAILABLE == 5
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(TaskIdentity)))


def test_another_flower_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    require_flower()
    monkeypatch.setattr(engine_module, "version", lambda _: "1.42.0")
    with pytest.raises(FedPeftError) as caught:
        require_flower()
    assert str(caught.value) == (
        "flwr: this version of fedpeft works with flwr 1.41.0 only (got '1.42.0'); pip install 'flwr==1.41.0'"
    )


# --- a daemon in this process ------------------------------------------------------------------------------------


class Daemon:
    def __init__(self, folder: Path):
        self.authority: Authority = init_authority(folder / "server")
        self.engine = FlowerEngine(folder / "flower.db")
        self.server = grpc.server(
            futures.ThreadPoolExecutor(24), interceptors=self.engine.interceptors(), options=server_options()
        )
        self.engine.add_to(self.server)
        credentials = server_credentials(load_server_tls(self.authority.directory))
        self.endpoint = f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', credentials)}"
        self.server.start()

    def enroll(self, name: str) -> tuple[Bundle, int]:
        bundle = self.authority.issue(name, "client", endpoints=[self.endpoint])
        return bundle, self.engine.register_node(bundle.public_key_pem, name)

    def stub(self, bundle: Bundle, *, signed_by: Bundle | None = None) -> FleetStub:
        channel, _ = open_channel(bundle)
        return FleetStub(grpc.intercept_channel(channel, _SignTimestamp(signed_by or bundle)))

    @contextmanager
    def agent(self, bundle: Bundle, app: ClientApp) -> Iterator[FleetSession]:
        channel, endpoint = open_channel(bundle)
        session, stop, online = FleetSession(channel, bundle, endpoint), threading.Event(), threading.Event()
        states: Callable[[str], object] = lambda state: online.set() if state == "online" else None  # noqa: E731
        thread = threading.Thread(target=session.run, args=(app, stop, states), daemon=True)
        thread.start()
        assert online.wait(10)
        yield session
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
        channel.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.engine.close()
    daemon.server.stop(0)


def counting_app() -> ClientApp:
    """Answers with the number that it was sent and how often it was called in this session."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = int(context.state["n"]["calls"]) + 1 if "n" in context.state else 1
        context.state["n"] = MetricRecord({"calls": calls})
        number = message.content["c"]["number"]
        return Message(RecordDict({"m": MetricRecord({"number": number, "calls": calls})}), reply_to=message)

    return app


def question(run: EngineRun, node_id: int, number: int) -> Message:
    return run.grid.create_message(RecordDict({"c": ConfigRecord({"number": number})}), "train", node_id, "1")


def test_several_runs_share_one_process_and_one_agent(daemon: Daemon) -> None:
    bundle, node_id = daemon.enroll("hospital-a")
    with daemon.agent(bundle, counting_app()), daemon.engine.open_run("x") as x, daemon.engine.open_run("y") as y:
        assert x.run_id != y.run_id
        assert x.grid.get_node_ids() == y.grid.get_node_ids() == [node_id]
        # Two messages at once to one node, in two runs; Flower's own id of the run is process-global.
        asked_x = x.grid.push_messages([question(x, node_id, 1), question(x, node_id, 2)])
        asked_y = y.grid.push_messages([question(y, node_id, 3)])
        replies: list[Message] = []
        deadline = time.monotonic() + 10
        while len(replies) < 3 and time.monotonic() < deadline:
            replies += [*x.grid.pull_messages(asked_x), *y.grid.pull_messages(asked_y)]
            time.sleep(0.02)
        got = {(reply.metadata.run_id, reply.content["m"]["number"]) for reply in replies}
        assert got == {(x.run_id, 1), (x.run_id, 2), (y.run_id, 3)}
        # The app's state lasts for the session.
        assert sorted(reply.content["m"]["calls"] for reply in replies) == [1, 2, 3]
        # Each reply is handed out once, and nothing stays behind.
        assert x.grid.pull_messages(asked_x) == []
        assert len(daemon.engine._objects.store()) == 0


def test_the_same_message_object_can_be_sent_again(daemon: Daemon) -> None:
    bundle, node_id = daemon.enroll("hospital-a")
    with daemon.agent(bundle, counting_app()), daemon.engine.open_run("x") as run:
        message = question(run, node_id, 7)
        first, second = (run.grid.send_and_receive([message], timeout=10) for _ in range(2))
        assert first[0].content["m"]["calls"] == 1
        assert second[0].content["m"]["calls"] == 2


def test_a_stock_strategy_runs_on_the_grid(daemon: Daemon) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        array = message.content["arrays"]["w"].numpy() + 1 + (context.node_id == nodes[0])
        content = {"arrays": ArrayRecord({"w": Array(array)}), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    enrolled = [daemon.enroll(name) for name in ("a", "b")]
    nodes = [node_id for _, node_id in enrolled]
    with daemon.agent(enrolled[0][0], app), daemon.agent(enrolled[1][0], app), daemon.engine.open_run("x") as run:
        start = ArrayRecord({"w": Array(np.zeros(3, np.float32))})
        result = FedAvg(fraction_evaluate=0).start(run.grid, start, num_rounds=2, timeout=20)
    assert result.arrays["w"].numpy().tolist() == [3.0, 3.0, 3.0]


def test_a_run_that_flower_gave_up_is_opened_anew(daemon: Daemon) -> None:
    bundle, node_id = daemon.enroll("hospital-a")
    with daemon.engine.open_run("x") as run:
        before = run.run_id
        asked = run.grid.push_messages([question(run, node_id, 1)])
        assert asked == [""]  # never was online
        with daemon.agent(bundle, counting_app()):
            pass
        (asked,) = run.grid.push_messages([question(run, node_id, 1)])
        daemon.engine.state.finish_task(run._task_id, "failed", "no heartbeat")
        run.heartbeat()
        assert run.run_id != before
        (lost,) = run.grid.pull_messages([asked])
        assert (lost.metadata.src_node_id, lost.error.code) == (node_id, 5)
        with daemon.agent(bundle, counting_app()):
            replies = run.grid.send_and_receive([question(run, node_id, 2)], timeout=10)
            assert replies[0].content["m"]["number"] == 2
            assert replies[0].metadata.run_id == run.run_id


def test_nodes_keep_their_ids_over_a_restart_and_removed_keys_stay_out(tmp_path: Path) -> None:
    authority = init_authority(tmp_path / "server")
    bundles = [authority.issue(name, "client", endpoints=["localhost:1"]) for name in ("a", "b")]
    engine = FlowerEngine(tmp_path / "flower.db")
    ids = [engine.register_node(bundle.public_key_pem, bundle.name) for bundle in bundles]
    engine.open_run("left open when the process dies")
    engine.close()

    engine = FlowerEngine(tmp_path / "flower.db")
    assert [engine.register_node(bundle.public_key_pem, bundle.name) for bundle in bundles] == ids
    assert [(view.node_id, view.name, view.online) for view in engine.nodes()] == [
        (ids[0], "a", False),
        (ids[1], "b", False),
    ]
    assert engine.nodes()[0].public_key == bundles[0].public_key_pem
    assert engine.nodes()[0].joined_at is None
    engine.unregister_node(ids[0])
    assert [view.name for view in engine.nodes()] == ["b"]
    with pytest.raises(FedPeftError, match="this key was removed"):
        engine.register_node(bundles[0].public_key_pem, "a")
    with pytest.raises(FedPeftError, match="node_id: no such node"):
        engine.unregister_node(ids[0])
    engine.close()


def test_a_database_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database, but long enough to look at" * 40)
    with pytest.raises(FedPeftError, match="state_db: Flower's state database failed"):
        FlowerEngine(tmp_path / "text.db")
    with pytest.raises(FedPeftError, match="state_db: no such folder"):
        FlowerEngine(tmp_path / "none" / "flower.db")


# --- admission ---------------------------------------------------------------------------------------------------


def status(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code = caught.value.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def test_no_one_acts_for_someone_else(daemon: Daemon) -> None:
    (alice, alice_id), (mallory, mallory_id) = daemon.enroll("alice"), daemon.enroll("mallory")
    request = ActivateNodeRequest(public_key=alice.public_key_pem, heartbeat_interval=10)
    # With another's public key in the request, and with another's (stolen or replayed) signature.
    assert status(lambda: daemon.stub(mallory).ActivateNode(request)) is grpc.StatusCode.UNAUTHENTICATED
    stolen = daemon.stub(mallory, signed_by=alice)
    assert status(lambda: stolen.ActivateNode(request)) is grpc.StatusCode.UNAUTHENTICATED
    assert not any(view.online for view in daemon.engine.nodes())

    # An enrolled node cannot sign a reply with another's id.
    mine = ActivateNodeRequest(public_key=mallory.public_key_pem, heartbeat_interval=10)
    assert daemon.stub(mallory).ActivateNode(mine).node_id == mallory_id
    forged = WireMessage(metadata=WireMetadata(src_node_id=alice_id, dst_node_id=1, reply_to_message_id="x", ttl=60))
    push = PushMessagesRequest(node=Node(node_id=mallory_id), messages_list=[forged])
    assert status(lambda: daemon.stub(mallory).PushMessages(push)) is grpc.StatusCode.INVALID_ARGUMENT


def test_only_the_calls_of_an_agent_are_answered(daemon: Daemon) -> None:
    bundle = daemon.authority.issue("new", "client", endpoints=[daemon.endpoint])
    register = RegisterNodeFleetRequest(public_key=bundle.public_key_pem)
    assert status(lambda: daemon.stub(bundle).RegisterNode(register)) is grpc.StatusCode.UNIMPLEMENTED
    assert daemon.engine.nodes() == []
    channel, _ = open_channel(bundle)
    with channel:
        control = channel.unary_unary("/flwr.proto.Control/StartRun")
        assert status(lambda: control(b"", timeout=5)) is grpc.StatusCode.UNIMPLEMENTED
        unsigned = FleetStub(channel)
        request = ActivateNodeRequest(public_key=bundle.public_key_pem, heartbeat_interval=10)
        assert status(lambda: unsigned.ActivateNode(request)) is grpc.StatusCode.UNAUTHENTICATED


def test_a_reply_cut_off_by_a_dying_node_does_not_block_the_grid(daemon: Daemon) -> None:
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import get_object_tree

    bundle, node_id = daemon.enroll("hospital-a")
    fleet, node = daemon.stub(bundle), Node(node_id=node_id)
    activate = ActivateNodeRequest(public_key=bundle.public_key_pem, heartbeat_interval=10)
    fleet.ActivateNode(activate)
    with daemon.engine.open_run("x") as run:
        asked = run.grid.push_messages([question(run, node_id, 1)])
        pulled = fleet.PullMessages(PullMessagesRequest(node=node))
        envelope = message_from_proto(pulled.messages_list[0])
        reply = Message(RecordDict({"m": MetricRecord({"number": 1})}), reply_to=envelope)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        # The reply is announced, its objects never follow.
        fleet.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        )
        started = time.monotonic()
        assert run.grid.pull_messages(asked) == []
        assert run.grid.pull_messages(asked) == []
        assert time.monotonic() - started < 1
        # The node starts again: what its former session owed is now known to be lost, and said once.
        second = run.grid.push_messages([question(run, node_id, 2)])
        fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        fleet.ActivateNode(activate)
        (lost,) = run.grid.pull_messages(asked)
        assert (lost.metadata.src_node_id, lost.error.code) == (node_id, 5)
        assert "send it again" in (lost.error.reason or "")
        assert run.grid.pull_messages(asked) == []
        # The other one is still waiting for it. It takes it, the connection breaks, and it asks again.
        assert run.grid.pull_messages(second) == []
        assert len(fleet.PullMessages(PullMessagesRequest(node=node)).messages_list) == 1
        assert run.grid.pull_messages(second) == []
        assert len(fleet.PullMessages(PullMessagesRequest(node=node)).messages_list) == 0
        assert [reply.error.code for reply in run.grid.pull_messages(second)] == [5]
        assert len(daemon.engine._objects.store()) == 0


def test_a_reply_beyond_the_limit_costs_its_sender_the_round_and_nothing_else(daemon: Daemon) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Context) -> Message:
        size = (5 << 20) if message.content["c"]["number"] == 1 else 8
        return Message(RecordDict({"b": ConfigRecord({"bytes": bytes(size)})}), reply_to=message)

    bundle, node_id = daemon.enroll("hospital-a")
    with daemon.agent(bundle, app), daemon.engine.open_run("x") as run:
        (lost,) = run.grid.send_and_receive([question(run, node_id, 1)], timeout=10)
        assert (lost.metadata.src_node_id, lost.error.code) == (node_id, 5)
        (reply,) = run.grid.send_and_receive([question(run, node_id, 2)], timeout=10)
        assert len(reply.content["b"]["bytes"]) == 8


def test_a_complete_reply_counts_although_its_node_asks_for_more_before_it_is_read(daemon: Daemon) -> None:
    bundle, node_id = daemon.enroll("hospital-a")
    with daemon.agent(bundle, counting_app()), daemon.engine.open_run("x") as run:
        asked = run.grid.push_messages([question(run, node_id, 1)])
        time.sleep(1)
        assert run.grid._lost == set(asked)
        (reply,) = run.grid.pull_messages(asked)
        assert reply.content["m"]["number"] == 1
        assert run.grid._lost == set()


def test_what_a_reply_claims_in_its_own_bytes_is_not_believed(daemon: Daemon) -> None:
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    (mallory, mallory_id), (_, alice_id) = daemon.enroll("mallory"), daemon.enroll("alice")
    fleet, node = daemon.stub(mallory), Node(node_id=mallory_id)
    fleet.ActivateNode(ActivateNodeRequest(public_key=mallory.public_key_pem, heartbeat_interval=10))
    with daemon.engine.open_run("x") as run:
        asked = run.grid.push_messages([question(run, mallory_id, 1)])
        envelope = message_from_proto(fleet.PullMessages(PullMessagesRequest(node=node)).messages_list[0])
        reply = Message(RecordDict({"m": MetricRecord({"number": 1})}), reply_to=envelope)
        honest = dict(reply.metadata.__dict__)
        reply.metadata.__dict__.update(_src_node_id=alice_id, _reply_to_message_id="0" * 64)
        objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
        contents = {object_id: each.deflate() for object_id, each in objects.items()}
        reply.metadata.__dict__.update(honest, _message_id=tree.object_id)
        pushed = fleet.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
            )
        )
        for object_id in pushed.objects_to_push:
            push = PushObjectRequest(
                node=node,
                run_id=run.run_id,
                session_id=pushed.session_id,
                object_id=object_id,
                object_content=contents[object_id],
            )
            assert fleet.PushObject(push).stored
        (received,) = run.grid.pull_messages(asked)
        assert received.metadata.src_node_id == mallory_id
        assert received.metadata.reply_to_message_id == asked[0]
