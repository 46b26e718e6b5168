"""The engine between real processes, under mutual TLS on the loopback interface.

Run as a program, this file is the daemon or an agent of these tests::

    python test_engine_processes.py server FOLDER PORT      # orders on stdin, answers on stdout, one JSON per line
    python test_engine_processes.py agent BUNDLE            # says its states on stdout

Both install an audit hook that reports every address a socket is asked to connect to or look up, before anything else
is imported.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_OUT = os.fdopen(os.dup(1), "w", buffering=1) if __name__ == "__main__" else sys.stdout


def say(**facts: Any) -> None:
    _OUT.write(json.dumps(facts) + "\n")
    _OUT.flush()


def audit() -> None:
    """Report outgoing addresses. ``socket.connect`` covers TCP and UDP; gRPC's own sockets are checked from outside."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            say(socket=str(arguments[1][0]))
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            say(socket=str(arguments[0]))

    sys.addaudithook(hook)


def serve(folder: str, port: str) -> None:
    from concurrent import futures

    import grpc
    from flwr.app import ConfigRecord, RecordDict

    from fedpeft_server.engine import FlowerEngine
    from fedpeft_server.pki import load_server_tls, server_credentials, server_options

    engine = FlowerEngine(Path(folder) / "flower.db")
    server = grpc.server(futures.ThreadPoolExecutor(32), interceptors=engine.interceptors(), options=server_options())
    engine.add_to(server)
    bound = server.add_secure_port(f"127.0.0.1:{port}", server_credentials(load_server_tls(folder)))
    server.start()
    run = engine.open_run("test")
    grid = run.grid
    say(port=bound)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "register":
            say(node_id=engine.register_node(order["key"].encode(), order["name"]))
        elif order["do"] == "unregister":
            engine.unregister_node(order["node_id"])
            say(done=True)
        elif order["do"] == "nodes":
            say(nodes=[[n.node_id, n.name, n.online] for n in engine.nodes()])
        elif order["do"] == "round":
            started = time.monotonic()
            content = RecordDict({"config": ConfigRecord({"number": order["number"], "how": order.get("how", "")})})
            messages = [grid.create_message(content, "train", node, "1") for node in order["nodes"]]
            replies = grid.send_and_receive(messages, timeout=order.get("timeout", 20))
            say(
                seconds=time.monotonic() - started,
                replies=[
                    [r.metadata.src_node_id, r.error.code, r.error.reason]
                    if r.has_error()
                    else [r.metadata.src_node_id, 0, r.content["metrics"]["number"]]
                    for r in replies
                ],
            )
    run.close()
    engine.close()
    server.stop(0)


def train(path: str) -> None:
    from flwr.app import Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from fedpeft.errors import FedPeftError
    from fedpeft_client.bundle import load_bundle, open_channel
    from fedpeft_client.engine import FleetSession

    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        how = message.content["config"]["how"]
        say(train=message.content["config"]["number"], thread=threading.current_thread().name)
        if how == "decline":
            raise FedPeftError("rank above this client's limit", field="adapter.rank", value=64)
        if how == "crash":
            raise RuntimeError("no such tensor")
        if how == "exit":
            raise SystemExit(3)
        if str(how).startswith("sleep"):
            time.sleep(float(str(how)[5:]))
        calls = int(context.state["n"]["calls"]) + 1 if "n" in context.state else 1
        context.state["n"] = MetricRecord({"calls": calls})
        number = message.content["config"]["number"]
        return Message(RecordDict({"metrics": MetricRecord({"number": number, "calls": calls})}), reply_to=message)

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        channel, endpoint = open_channel(load_bundle(path))
        session = FleetSession(channel, load_bundle(path), endpoint)
        session.run(app, stop, lambda state: say(state=state, node_id=session.node_id))
    except FedPeftError as error:
        say(error=str(error))
        sys.exit(2)


if __name__ == "__main__":
    audit()
    {"server": serve, "agent": train}[sys.argv[1]](*sys.argv[2:])
    sys.exit(0)


import psutil  # noqa: E402  (the programs above need none of this)
import pytest  # noqa: E402

from fedpeft.bundle import Bundle, write_bundle  # noqa: E402
from fedpeft_server.pki import Authority, init_authority  # noqa: E402

pytestmark = pytest.mark.e2e

REJOIN_S = 25.0  # docs/flower.md promises 20 s after the last heartbeat; the rest is for starting the process


class Process:
    """A child process of these tests and everything that it said."""

    def __init__(self, folder: Path, *arguments: str):
        self.said: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._log = open(folder / f"{arguments[0]}.stderr", "a")  # noqa: SIM115 (closed with the process)
        self.child = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            with self._changed:
                self.said.append(json.loads(line))
                self._changed.notify_all()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], since: int = 0, timeout: float = 30) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((facts for facts in self.said[since:] if wanted(facts)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout), self.said[since:]
            result = found()
        assert result is not None
        return result

    def order(self, **order: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        since = len(self.said)
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return self.wait_for(lambda facts: "socket" not in facts, since, timeout=60)

    def end(self, how: signal.Signals) -> int:
        self.child.send_signal(how)
        code = self.child.wait(timeout=15)
        self._log.close()
        return code


class Federation:
    """An authority, one daemon and any number of agents in a temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.authority: Authority = init_authority(folder / "server")
        self.everyone: list[Process] = []
        self.port = 0
        self.server = self.start_server()

    def start_server(self) -> Process:
        process = self._start("server", str(self.authority.directory), str(self.port))
        self.port = process.wait_for(lambda facts: "port" in facts)["port"]
        self.server = process
        return process

    def bundle(self, name: str, **how: Any) -> Bundle:
        return self.authority.issue(name, "client", endpoints=[f"127.0.0.1:{self.port}"], **how)

    def enroll(self, name: str) -> tuple[Path, int]:
        bundle = self.bundle(name)
        node_id = self.server.order(do="register", key=bundle.public_key_pem.decode(), name=name)["node_id"]
        return write_bundle(bundle, self.folder / f"{name}.toml"), node_id

    def agent(self, path: Path) -> Process:
        return self._start("agent", str(path))

    def _start(self, *arguments: str) -> Process:
        process = Process(self.folder, *arguments)
        self.everyone.append(process)
        return process

    def close(self) -> None:
        for process in self.everyone:
            if process.child.poll() is None:
                process.end(signal.SIGKILL)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    federation.close()


def online(facts: dict[str, Any]) -> bool:
    return facts.get("state") == "online"


def test_two_agents_answer_three_rounds_and_speak_to_no_one_else(federation: Federation) -> None:
    enrolled = [federation.enroll(name) for name in ("hospital-a", "hospital-b")]
    nodes = [node_id for _, node_id in enrolled]
    agents = [federation.agent(path) for path, _ in enrolled]
    for agent, node_id in zip(agents, nodes, strict=True):
        assert agent.wait_for(online)["node_id"] == node_id

    for number in (1, 2, 3):
        answer = federation.server.order(do="round", number=number, nodes=nodes)
        assert sorted(answer["replies"]) == sorted([node, 0, number] for node in nodes)
        print(f"round {number}: {answer['seconds'] * 1000:.0f} ms")
    # One resident thread answers all messages.
    assert {facts["thread"] for facts in agents[0].said if "thread" in facts} == {"fedpeft-app"}

    # Errors come back by their type alone (a message may hold a path or a value), and the agent goes on.
    for how, reason in [
        ("decline", "the agent failed (FedPeftError); its own log says why"),
        ("crash", "the agent failed (RuntimeError); its own log says why"),
        ("exit", "the agent failed (SystemExit); its own log says why"),
    ]:
        answer = federation.server.order(do="round", number=4, nodes=nodes[:1], how=how)
        assert answer["replies"] == [[nodes[0], 2, reason]]
    assert federation.server.order(do="round", number=5, nodes=nodes[:1])["replies"] == [[nodes[0], 0, 5]]

    # From inside (Python's sockets) and from outside (gRPC's): loopback only.
    for process in federation.everyone:
        assert {facts["socket"] for facts in process.said if "socket" in facts} <= {"127.0.0.1", "::1", "localhost"}
        remote = {
            c.raddr.ip.removeprefix("::ffff:") for c in psutil.Process(process.child.pid).net_connections() if c.raddr
        }
        assert remote <= {"127.0.0.1", "::1"}

    # An orderly stop signs off: the identity is free at once.
    assert agents[0].end(signal.SIGTERM) == 0
    started = time.monotonic()
    again = federation.agent(enrolled[0][0])
    assert again.wait_for(online)["node_id"] == nodes[0]
    assert time.monotonic() - started < 10
    assert all(facts.get("state") != "waiting" for facts in again.said)


def test_a_killed_agent_rejoins_under_its_node_id_and_its_lost_message_is_reported(federation: Federation) -> None:
    path, node_id = federation.enroll("hospital-a")
    agent = federation.agent(path)
    agent.wait_for(online)
    killer = threading.Thread(
        target=lambda: (agent.wait_for(lambda facts: "train" in facts), agent.end(signal.SIGKILL))
    )
    killer.start()
    started: list[float] = []

    def restart() -> None:
        killer.join()
        started.append(time.monotonic())
        again = federation.agent(path)
        assert again.wait_for(online)["node_id"] == node_id
        started.append(time.monotonic())

    restarter = threading.Thread(target=restart)
    restarter.start()
    # The message dies with the agent. Flower alone would be silent until the timeout.
    answer = federation.server.order(do="round", number=1, nodes=[node_id], how="sleep60", timeout=50)
    restarter.join(timeout=60)
    assert [reply[:2] for reply in answer["replies"]] == [[node_id, 5]]
    print(f"rejoined after {started[1] - started[0]:.1f} s")
    assert started[1] - started[0] < REJOIN_S
    assert federation.server.order(do="round", number=2, nodes=[node_id])["replies"] == [[node_id, 0, 2]]


def test_agents_come_back_to_a_killed_and_restarted_server(federation: Federation) -> None:
    enrolled = [federation.enroll(name) for name in ("hospital-a", "hospital-b")]
    nodes = sorted(node_id for _, node_id in enrolled)
    agents = [federation.agent(path) for path, _ in enrolled]
    for agent in agents:
        agent.wait_for(online)
    assert len(federation.server.order(do="round", number=1, nodes=nodes)["replies"]) == 2
    # One is in the middle of training for the run that dies with the server.
    assert federation.server.child.stdin is not None
    federation.server.child.stdin.write(
        json.dumps({"do": "round", "number": 2, "nodes": [enrolled[0][1]], "how": "sleep3"}) + "\n"
    )
    federation.server.child.stdin.flush()
    agents[0].wait_for(lambda facts: facts.get("train") == 2)
    federation.server.end(signal.SIGKILL)
    since = [len(agent.said) for agent in agents]
    time.sleep(1)

    started = time.monotonic()
    federation.start_server()
    for agent, said in zip(agents, since, strict=True):
        agent.wait_for(online, since=said)
    print(f"back {time.monotonic() - started:.1f} s after the server was")
    assert sorted(node[0] for node in federation.server.order(do="nodes")["nodes"]) == nodes
    answer = federation.server.order(do="round", number=3, nodes=nodes)
    assert sorted(answer["replies"]) == [[node, 0, 3] for node in nodes]
    print(f"next message answered {time.monotonic() - started:.1f} s after the restart")


def test_who_does_not_belong_is_told_so_and_ends(federation: Federation) -> None:
    from datetime import UTC, datetime, timedelta

    # Certified, but not (or no longer) registered with the daemon.
    stranger = federation.agent(write_bundle(federation.bundle("stranger"), federation.folder / "s.toml"))
    error = stranger.wait_for(lambda facts: "error" in facts)["error"]
    assert "does not know the key of stranger" in error
    assert "fedpeft server enroll stranger --renew" in error
    assert stranger.child.wait(10) == 2

    past = datetime.now(UTC) - timedelta(days=10)
    late = federation.agent(
        write_bundle(federation.bundle("late", valid_days=1, now=past), federation.folder / "l.toml")
    )
    error = late.wait_for(lambda facts: "error" in facts)["error"]
    assert error.startswith("certificate of late expired on ")
    assert late.child.wait(10) == 2

    path, node_id = federation.enroll("hospital-a")
    agent = federation.agent(path)
    agent.wait_for(online)
    federation.server.order(do="unregister", node_id=node_id)
    assert "does not know the key of hospital-a" in agent.wait_for(lambda facts: "error" in facts)["error"]
    assert federation.server.order(do="nodes")["nodes"] == []
