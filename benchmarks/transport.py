"""What a round costs in transport: AdapterExchange, Flower's message payloads over HTTP and gRPC, and a bare stream.

    python benchmarks/transport.py --quick          # 1 and 16 MB, two rounds each
    python benchmarks/transport.py --report         # all sizes, some minutes, writes results/transport.md

One round moves X MB from the server to each of N clients and X MB of the client's own from each back. Counted is what a
server waits for:

- *AdapterExchange*: the server stores the new state (hash, write, flush to the device), every client fetches it to a
  file and verifies it, every client sends a file, which the server checks, hashes, stores durably and acknowledges.
- *Flower HTTP / gRPC*: ``push_messages`` of one array of X MB to N nodes until N replies are inflated at the server;
  in-memory object store (its fastest), nodes resident and polling every 10 ms, Flower's own pull and push functions.
- *bare stream*: a download stream and an upload stream of 1 MiB ``bytes`` messages per client that nobody checks,
  hashes or stores: what gRPC in Python can do at all.

Not counted: making the payload and, for AdapterExchange, its digest (the delta has it already). MB are 2**20 bytes, and
MB/s is 2 N X / seconds, both directions together. Server and clients are separate processes on 127.0.0.1; the clients
are threads in two processes. Each point runs one small round first, then the rounds that count; the median is shown.
CPU is the processor time of a round over all processes, which depends less than seconds do on what else the machine
does. Memory is the server's peak resident set (the kernel's own high-water mark) above its resident set after the small
round.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing as mp
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

MB = 1 << 20
CHUNK = 1 << 20
LOAD_PROCESSES = 2
RESULT = Path(__file__).parent / "results" / "transport.md"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True)
class Point:
    """One contender with one load."""

    contender: str
    clients: int
    payload_mb: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """What was measured at a point. ``mb_per_s`` counts both directions."""

    contender: str
    clients: int
    payload_mb: int
    rounds: int
    seconds: float
    best_seconds: float
    mb_per_s: float
    cpu_seconds: float
    idle_mb: float
    peak_above_idle_mb: float


# -- the servers: run in their own process, one command at a time over a pipe ---------------------------------------


@contextlib.contextmanager
def serve_ours(folder: Path, tls: bool) -> Iterator[tuple[int, Callable[[int, int], Any]]]:
    """AdapterExchange over a blob store on disk, everybody allowed."""
    import grpc

    from fedpeft.store.blobs import BlobStore
    from fedpeft_server import exchange, pki

    class Everyone:
        def may_upload(self, peer: object, header: exchange.UploadHeader) -> None: ...
        def may_download(self, peer: object, digest: str, run_id: str) -> None: ...
        def accept(self, peer: object, header: exchange.UploadHeader, path: Path) -> str:
            arrived.append(header.digest)
            return ""

    @dataclass(frozen=True)
    class Named:
        name: str
        role: str = "client"

    arrived: list[str] = []
    exchange.bound_heap()
    blobs = BlobStore(folder / "blobs")
    service = exchange.AdapterExchangeService(blobs, Everyone(), identify=lambda context: Named(context.peer()))
    server = grpc.server(
        futures.ThreadPoolExecutor(16),
        options=pki.server_options() + exchange.SERVER_OPTIONS,
    )
    service.add_to(server)
    if tls:
        authority = pki.init_authority(folder / "pki", hosts=["127.0.0.1"])
        authority.issue("bench", "client", endpoints=["127.0.0.1:1"])
        bundle = authority.issue("bench", "client", endpoints=["127.0.0.1:1"])
        credentials = pki.server_credentials(pki.load_server_tls(folder / "pki"))
        port = server.add_secure_port("127.0.0.1:0", credentials)
        for name, text in (
            ("ca", bundle.ca_certificate_pem),
            ("cert", bundle.certificate_pem),
            ("key", bundle.private_key_pem),
        ):
            (folder / f"client.{name}").write_bytes(text if isinstance(text, bytes) else text.encode())
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    source = memoryview(os.urandom(MB))

    def begin(number: int, payload: int) -> str:
        # The state reaches the store as a stream of parts, as an aggregation would write it.
        arrived.clear()
        head = number.to_bytes(8, "big") + os.urandom(8)
        running = hashlib.sha256()
        for part in _parts(head, source, payload):
            running.update(part)
        digest = running.hexdigest()
        with blobs.resume(digest, payload) as writer:
            for part in _parts(head, source, payload):
                writer.write(part)
            writer.finish()
        return digest

    try:
        yield port, begin
    finally:
        server.stop(0)
        service.close()


@contextlib.contextmanager
def serve_bare(folder: Path, tls: bool) -> Iterator[tuple[int, Callable[[int, int], Any]]]:
    """Streams of bytes that go nowhere."""
    import grpc

    chunk = os.urandom(CHUNK)

    def upload(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(len(message) for message in messages)).encode()

    def download(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(max(int(request) // CHUNK, 1)):
            yield chunk

    server = grpc.server(futures.ThreadPoolExecutor(64), options=UNLIMITED)
    handlers = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Download": grpc.unary_stream_rpc_method_handler(download),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, lambda number, payload: ""
    finally:
        server.stop(0)


class _FlowerRounds:
    """A Grid over Flower's LinkState that can serve remote nodes; what ``begin`` of both Flower servers runs."""

    def __init__(self, state: Any, run_id: int):
        self.state, self.run_id = state, run_id

    def __call__(self, number: int, payload: int) -> str:
        import numpy as np
        from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )

        content = RecordDict(
            {
                "arrays": ArrayRecord({"a": Array(np.full(payload // 4, number, dtype=np.float32))}),
                "config": ConfigRecord({"server-round": number}),
            }
        )
        waiting, missing, objects = set(), [], {}
        with no_object_id_recompute():
            session = self.state.start_session(self.run_id)
            for node in self.nodes():
                message = Message(content, node, "train")
                message.metadata.__dict__["_message_id"] = message.object_id
                objects.update(get_all_nested_objects(message))
                _, todo = self.state.store_message_and_object_tree(
                    remove_content_from_message(message), get_object_tree(message), session
                )
                missing += todo
                waiting.add(message.metadata.message_id)
            for oid in dict.fromkeys(missing):
                self.state.store_object(self.run_id, session, oid, objects[oid].deflate())
        del content, objects, message
        while waiting:
            for reply in self._pull(waiting):
                waiting.discard(reply)
            time.sleep(0.01)
        return ""

    def nodes(self) -> list[int]:
        return list(self.state.get_nodes(self.run_id))

    def _pull(self, waiting: set[str]) -> list[str]:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        answered = []
        for message in self.state.get_message_res(message_ids=set(waiting), run_id=self.run_id):
            self.state.delete_messages(message_ins_ids={message.metadata.reply_to_message_id})
            mid, contents = message.metadata.message_id, {}
            for node in iterate_object_tree(self.state.object_store.get_object_tree(mid)):
                while (content := self.state.get_object(self.run_id, node.object_id)) == b"":
                    time.sleep(0.01)
                contents[node.object_id] = content
            self.state.object_store.delete(mid)
            reply = inflate_object_from_contents(mid, contents)
            if reply.has_error():
                raise RuntimeError(reply.error)
            assert reply.content["arrays"]["a"].data  # here an aggregation would fold it in; then it is dropped
            answered.append(message.metadata.reply_to_message_id)
        return answered


def _flower_run(state: Any) -> _FlowerRounds:
    """A run that Flower believes to be alive; its task needs a heartbeat."""
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.supercore.fab import Fab
    from flwr.supercore.task_identity import TaskIdentity

    stub = b"stub"
    digest = hashlib.sha256(stub).hexdigest()
    state.store_fab(Fab(digest, stub, {}))
    run_id = state.create_run(
        "fedpeft/bench", "1.0.0", digest, {}, NOOP_FEDERATION_ID, None, "<id:none>", TaskType.SERVER_APP
    )
    task = state.get_run_info(run_ids=[run_id])[0].primary_task_id
    state.claim_task(task)
    state.activate_task(task)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run_id, 1

    def beat() -> None:
        while True:
            time.sleep(10)
            state.acknowledge_task_heartbeat(task)

    threading.Thread(target=beat, daemon=True).start()
    return _FlowerRounds(state, run_id)


@contextlib.contextmanager
def serve_flower_http(folder: Path, tls: bool) -> Iterator[tuple[int, Callable[[int, int], Any]]]:
    """Flower's SuperLink application as shipped, hosted by uvicorn in this process, in-memory state."""
    import socket

    import uvicorn
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=None,
        host="127.0.0.1",
        port=port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=False,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield port, _flower_run(app.state.linkstate_factory.state())
    finally:
        server.should_exit = True


@contextlib.contextmanager
def serve_flower_grpc(folder: Path, tls: bool) -> Iterator[tuple[int, Callable[[int, int], Any]]]:
    """Flower's FleetServicer in a grpc.Server, in-memory state."""
    import grpc
    from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server
    from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
    from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.supercore.interceptors import RpcErrorTranslationServerInterceptor
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    links = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects)
    server = grpc.server(
        futures.ThreadPoolExecutor(64),
        options=UNLIMITED,
        interceptors=[RpcErrorTranslationServerInterceptor(), NodeAuthServerInterceptor(links)],
    )
    servicer = FleetServicer(state_factory=links, objectstore_factory=objects, enable_supernode_auth=False)
    add_FleetServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, _flower_run(links.state())
    finally:
        server.stop(0)


# -- the clients: each is a thread that serves rounds until its queue of work ends ----------------------------------


class OurClient:
    """Fetches the state to a file, sends a file. ``prepare`` makes the file and its digest, outside of the time."""

    def __init__(self, number: int, port: int, folder: Path, tls: bool):
        import grpc

        from fedpeft_client import bundle as client_bundle
        from fedpeft_client.exchange import CHANNEL_OPTIONS, ExchangeClient

        self.state, self.delta = folder / f"state-{number}", folder / f"delta-{number}"
        options = [*client_bundle.channel_options(f"127.0.0.1:{port}"), *CHANNEL_OPTIONS]
        options.append(("grpc.use_local_subchannel_pool", 1))  # a connection of its own, as if in its own process
        if tls:
            credentials = grpc.ssl_channel_credentials(
                *((folder / f"client.{name}").read_bytes() for name in ("ca", "key", "cert"))
            )
            channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)
        else:
            channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.exchange = ExchangeClient(channel)
        self.block = memoryview(os.urandom(MB))
        self.digest = ""

    def prepare(self, payload: int) -> None:
        running, head = hashlib.sha256(), os.urandom(16)
        with self.delta.open("wb") as file:
            for part in _parts(head, self.block, payload):
                file.write(part)
                running.update(part)
        self.digest = running.hexdigest()
        self.state.unlink(missing_ok=True)

    def round(self, state: str, payload: int) -> None:
        self.exchange.download(state, "bench", self.state)
        receipt = self.exchange.upload(self.delta, "bench", 1, self.digest)
        if not receipt.accepted or receipt.sent_bytes != payload:
            raise RuntimeError(receipt)


class BareClient:
    """Streams of one chunk, over and over."""

    def __init__(self, number: int, port: int, folder: Path, tls: bool):
        import grpc

        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.upload, self.download = channel.stream_unary("/bare/Upload"), channel.unary_stream("/bare/Download")
        self.chunk = os.urandom(CHUNK)

    def prepare(self, payload: int) -> None: ...

    def round(self, state: str, payload: int) -> None:
        for _ in self.download(str(payload).encode()):
            pass
        self.upload(self.chunk for _ in range(max(payload // CHUNK, 1)))


class FlowerClient:
    """A resident node with Flower's own pull and push functions; subclasses differ in the connection."""

    def __init__(self, number: int, port: int, folder: Path, tls: bool):
        import numpy as np

        self.number, self.port = number, port
        self.reply = np.zeros(0, dtype=np.float32)
        self.connect()
        threading.Thread(target=self._serve, daemon=True).start()

    def connect(self) -> None:
        raise NotImplementedError

    def prepare(self, payload: int) -> None:
        import numpy as np

        self.reply = np.random.default_rng(self.number + payload).random(payload // 4, dtype=np.float32)

    def round(self, state: str, payload: int) -> None: ...  # the server starts it

    def _serve(self) -> None:
        while True:
            received = self.receive()
            if received is None:
                time.sleep(0.01)
                continue
            self._answer(*received)

    def _answer(self, head: Any, tree: Any) -> None:
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            iterate_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_utils import (
            inflate_object_from_contents,
            pull_objects,
            push_object_contents_from_iterable,
        )

        run_id, mid = head.metadata.run_id, head.metadata.message_id
        contents = pull_objects(
            [node.object_id for node in iterate_object_tree(tree)], lambda oid: self.pull(run_id, oid)
        )
        self.confirm(run_id, mid)
        message = inflate_object_from_contents(mid, contents)
        message.metadata.__dict__["_message_id"] = mid
        del contents
        record = RecordDict(
            {"arrays": ArrayRecord({"a": Array(self.reply)}), "metrics": MetricRecord({"num-examples": 1})}
        )
        reply = Message(record, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            wanted, session = self.send(remove_content_from_message(reply), get_object_tree(reply))
            push_object_contents_from_iterable(
                ((oid, objects[oid].deflate()) for oid in wanted),
                lambda oid, content: self.push(run_id, session, oid, content),
            )
        del objects, reply, record, message

    receive: Callable[[], Any]
    pull: Callable[[int, str], bytes]
    confirm: Callable[[int, str], None]
    send: Callable[[Any, Any], Any]
    push: Callable[[int, str, str, bytes], None]


class FlowerHttpClient(FlowerClient):
    """Flower's HTTP connection of the SuperNode, as shipped."""

    def connect(self) -> None:
        from flwr.supernode.fleet_http_connection import http_request_response

        self.connection = http_request_response(f"127.0.0.1:{self.port}", insecure=True)
        _, self.receive, send, _, _, self.pull, self.push, self.confirm = self.connection.__enter__()
        self.send = lambda message, tree: send(message, tree, 0.0)


class FlowerGrpcClient(FlowerClient):
    """Flower's gRPC stub with node authentication, the resident agent of a gRPC deployment."""

    def connect(self) -> None:
        import grpc
        from flwr.common.serde import message_from_proto, message_to_proto
        from flwr.proto import fleet_pb2 as fleet
        from flwr.proto import message_pb2 as wire
        from flwr.proto.fleet_pb2_grpc import FleetStub
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.date import now
        from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

        private, public = generate_key_pairs()
        key = public_key_to_bytes(public)

        def signed() -> list[tuple[str, str | bytes]]:
            stamp = now().isoformat()
            return [
                ("flwr-public-key-bin", key),
                ("flwr-timestamp", stamp),
                ("flwr-signature-bin", sign_message(private, stamp.encode("ascii"))),
            ]

        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        stub = FleetStub(grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options))
        stub.RegisterNode(fleet.RegisterNodeFleetRequest(public_key=key), metadata=signed())
        activated = stub.ActivateNode(
            fleet.ActivateNodeRequest(public_key=key, heartbeat_interval=600), metadata=signed()
        )
        node = Node(node_id=activated.node_id)

        def receive() -> Any:
            answer = stub.PullMessages(fleet.PullMessagesRequest(node=node), metadata=signed())
            if not answer.messages_list:
                return None
            return message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]

        def pull(run_id: int, oid: str) -> bytes:
            request = wire.PullObjectRequest(node=node, run_id=run_id, object_id=oid)
            answer = stub.PullObject(request, metadata=signed())
            if not answer.object_available:
                raise ObjectUnavailableError(oid)
            return answer.object_content

        def confirm(run_id: int, mid: str) -> None:
            request = wire.ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=mid)
            stub.ConfirmMessageReceived(request, metadata=signed())

        def send(message: Any, tree: Any) -> Any:
            request = fleet.PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(message)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            answer = stub.PushMessages(request, metadata=signed())
            return set(answer.objects_to_push), answer.session_id

        def push(run_id: int, session: str, oid: str, content: bytes) -> None:
            request = wire.PushObjectRequest(
                node=node, run_id=run_id, session_id=session, object_id=oid, object_content=content
            )
            stub.PushObject(request, metadata=signed())

        self.receive, self.pull, self.confirm, self.send, self.push = receive, pull, confirm, send, push


CONTENDERS: dict[str, tuple[Callable[..., Any], type, bool]] = {
    "AdapterExchange": (serve_ours, OurClient, False),
    "AdapterExchange, mutual TLS": (serve_ours, OurClient, True),
    "Flower HTTP": (serve_flower_http, FlowerHttpClient, False),
    "Flower gRPC": (serve_flower_grpc, FlowerGrpcClient, False),
    "bare stream": (serve_bare, BareClient, False),
}


# -- processes ----------------------------------------------------------------------------------------------------


def _parts(head: bytes, block: memoryview, payload: int) -> Iterator[memoryview | bytes]:
    yield head
    at = len(head)
    while at < payload:
        yield block[: payload - at]
        at += min(len(block), payload - at)


def _server_process(contender: str, folder: str, pipe: Connection) -> None:
    serve, _, tls = CONTENDERS[contender]
    with serve(Path(folder), tls) as (port, begin):
        pipe.send(port)
        while (command := pipe.recv()) is not None:
            if command == "nodes":
                pipe.send(len(begin.nodes()) if isinstance(begin, _FlowerRounds) else None)
            elif command == "settle":
                gc.collect()
                pipe.send(None)
            else:
                pipe.send(begin(*command))
    os._exit(0)  # Flower's threads would hold the process


def _load_process(contender: str, folder: str, numbers: list[int], pipe: Connection) -> None:
    _, kind, tls = CONTENDERS[contender]
    clients: list[Any] = []
    while (command := pipe.recv()) is not None:
        name, *arguments = command
        try:
            if name == "connect":
                clients = [kind(number, arguments[0], Path(folder), tls) for number in numbers]
            else:
                errors: list[str] = []

                def call(client: Any, name: str = name, arguments: list = arguments, errors: list = errors) -> None:
                    try:
                        getattr(client, name)(*arguments)
                    except Exception as error:
                        errors.append(repr(error))

                threads = [threading.Thread(target=call, args=(client,)) for client in clients]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if errors:
                    raise RuntimeError(errors[0])
            pipe.send(None)
        except Exception as error:
            pipe.send(repr(error))
    os._exit(0)


def _memory_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _cpu_s(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(point: Point, parent: Path) -> Row:
    """Start a server and the clients, run the rounds, stop them."""
    context = mp.get_context("spawn")
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="transport-"))
    pipe, end = context.Pipe()
    server = context.Process(target=_server_process, args=(point.contender, str(folder), end), daemon=True)
    server.start()
    loads = []
    count = min(LOAD_PROCESSES, point.clients)
    for first in range(count):
        mine, theirs = context.Pipe()
        numbers = list(range(first, point.clients, count))
        process = context.Process(
            target=_load_process, args=(point.contender, str(folder), numbers, theirs), daemon=True
        )
        process.start()
        loads.append((mine, process))

    def ask(connection: Connection, process: Any, command: Any, patience_s: float = 300.0) -> Any:
        connection.send(command)
        return answer(connection, process, patience_s)

    def answer(connection: Connection, process: Any, patience_s: float = 300.0) -> Any:
        end_at = time.monotonic() + patience_s
        while not connection.poll(0.5):
            if not process.is_alive() or time.monotonic() > end_at:
                raise RuntimeError(f"{point.contender}: a process of the benchmark died or took over {patience_s:g} s")
        return connection.recv()

    def everyone(*command: Any) -> None:
        for connection, _ in loads:
            connection.send(command)
        for connection, process in loads:
            if (error := answer(connection, process)) is not None:
                raise RuntimeError(f"{point.contender}: {error}")

    def play(number: int, payload: int) -> tuple[float, float]:
        everyone("prepare", payload)
        processes = [server, *(process for _, process in loads)]
        started, cpu = time.perf_counter(), sum((_cpu_s(process.pid) for process in processes), 0.0)
        state = ask(pipe, server, (number, payload))
        everyone("round", state, payload)
        return time.perf_counter() - started, sum((_cpu_s(process.pid) for process in processes), 0.0) - cpu

    try:
        port = answer(pipe, server)
        everyone("connect", port)
        while (nodes := ask(pipe, server, "nodes")) is not None and nodes < point.clients:
            time.sleep(0.05)
        play(1, CHUNK)
        ask(pipe, server, "settle")
        assert server.pid is not None
        idle = _memory_mb(server.pid, "VmRSS")
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # resets the high-water mark
        played = [play(number, point.payload_mb * MB) for number in range(2, 2 + point.rounds)]
        peak = _memory_mb(server.pid, "VmHWM")
    finally:
        for connection, process in [*loads, (pipe, server)]:
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    seconds, cpu = [wall for wall, _ in played], [cpu for _, cpu in played]
    middle = statistics.median(seconds)
    return Row(
        point.contender,
        point.clients,
        point.payload_mb,
        point.rounds,
        round(middle, 4),
        round(min(seconds), 4),
        round(2 * point.clients * point.payload_mb / middle, 1),
        round(statistics.median(cpu), 2),
        round(idle, 1),
        round(max(peak - idle, 0.0), 1),
    )


# -- what is run and how it is shown ------------------------------------------------------------------------------


def plan(quick: bool) -> list[Point]:
    """All points, contenders of one size next to each other, so that they see the same machine."""
    ours, ours_tls, http, grpc_, bare = CONTENDERS
    if quick:
        sizes = [(1, 2, list(CONTENDERS)), (16, 2, list(CONTENDERS))]
        extra = [Point(ours, 32, 4, 2)]
    else:
        sizes = [(1, 5, list(CONTENDERS)), (16, 5, list(CONTENDERS)), (64, 3, list(CONTENDERS))]
        extra = [Point(ours, 8, 256, 1), Point(ours_tls, 8, 256, 1), Point(bare, 8, 256, 1)]
        # Flower holds several copies of each payload: eight nodes of 256 MB do not fit beside the rest.
        extra += [Point(http, 2, 256, 1), Point(grpc_, 2, 256, 1), Point(ours, 2, 256, 1)]
        extra += [Point(ours, 64, 16, 2), Point(ours_tls, 64, 16, 2)]
    points = [Point(name, 8, size, rounds) for size, rounds, names in sizes for name in names]
    return points + extra


HEADER = ("contender", "clients", "MB", "rounds", "s/round", "best s", "MB/s", "CPU s", "idle MB", "peak above idle MB")


def table(rows: list[Row]) -> str:
    """The rows, aligned, also valid as a Markdown table."""
    cells = [HEADER] + [
        (
            row.contender,
            str(row.clients),
            str(row.payload_mb),
            str(row.rounds),
            f"{row.seconds:.3f}",
            f"{row.best_seconds:.3f}",
            f"{row.mb_per_s:.0f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.idle_mb:.0f}",
            f"{row.peak_above_idle_mb:.1f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]

    def line(values: tuple[str, ...]) -> str:
        padded = [
            value.ljust(width) if not at else value.rjust(width)
            for at, (value, width) in enumerate(zip(values, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(tuple(rule)), *(line(values) for values in cells[1:])])


def ratios(rows: list[Row]) -> list[str]:
    """AdapterExchange against the others at each load that both ran."""
    found = {(row.contender, row.clients, row.payload_mb): row for row in rows}
    ours, ours_tls, http, grpc_, bare = CONTENDERS
    lines = []
    for (name, clients, size), row in found.items():
        if name != ours:
            continue
        parts = [
            f"{row.mb_per_s / other.mb_per_s:.2f} x {rival}"
            for rival in (http, grpc_, bare, ours_tls)
            if (other := found.get((rival, clients, size)))
        ]
        streams = min(clients, 8)
        memory = f"server memory {row.peak_above_idle_mb / streams:.2f} MB for each of {streams} streams at a time"
        lines.append(f"{clients} x {size} MB: {', '.join(parts) or 'no rival ran'}; {memory}")
    return lines


def machine() -> str:
    """The processor, memory and versions; nothing that names the host."""
    import flwr
    import grpc

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, grpcio {grpc.__version__}, flwr {flwr.__version__}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Transport cost of one federated round: AdapterExchange against Flower and a bare gRPC stream.",
        epilog="example: python benchmarks/transport.py --quick --json",
    )
    parser.add_argument("--quick", action="store_true", help="1 and 16 MB only")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout instead of the table")
    parser.add_argument("--report", action="store_true", help=f"also write {RESULT.parent.name}/{RESULT.name}")
    parser.add_argument("--only", metavar="WORD", help="contenders whose name contains WORD, e.g. Adapter")
    parser.add_argument("--mb", type=int, help="this payload size alone")
    parser.add_argument("--clients", type=int, help="this number of clients alone")
    parser.add_argument("--dir", type=Path, help="where payloads are stored meanwhile (default: the system's)")
    arguments = parser.parse_args()
    points = plan(arguments.quick)
    if arguments.mb or arguments.clients:
        points = [Point(name, arguments.clients or 8, arguments.mb or 64, 3) for name in CONTENDERS]
    points = [point for point in points if not arguments.only or arguments.only.lower() in point.contender.lower()]
    rows = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        for number, point in enumerate(points, 1):
            print(
                f"[{number}/{len(points)}] {point.contender}, {point.clients} x {point.payload_mb} MB",
                file=sys.stderr,
                flush=True,
            )
            try:
                rows.append(measure(point, Path(folder)))
            except RuntimeError as error:  # one contender that fails does not take the others' figures away
                print(f"  failed: {error}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print("\n".join([machine(), "", table(rows), "", *ratios(rows)]))
    if arguments.report:
        write_report(rows, time.monotonic() - started)
    return 0 if len(rows) == len(points) else 1


def write_report(rows: list[Row], elapsed_s: float) -> None:
    """The Markdown page with command, machine, method and figures."""
    command = " ".join(["python benchmarks/transport.py", *sys.argv[1:]])
    what = (__doc__ or "").split("\n\n", 2)[2].strip()
    text = [
        "# Transport: what a round costs",
        f"`{command}` took {elapsed_s:.0f} s on {machine()}.",
        what,
        table(rows),
        "AdapterExchange against the others, by throughput, and its server memory:",
        "\n".join(f"- {line}" for line in ratios(rows)),
        "Flower runs 256 MB with two clients only: several copies of each payload live in the server and in each node. "
        f"Load average of the machine at the end of the run: {os.getloadavg()[0]:.1f}; above {os.cpu_count()}, other "
        "work took part of the processor time, and CPU s is the fairer column.",
    ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    sys.exit(main())
