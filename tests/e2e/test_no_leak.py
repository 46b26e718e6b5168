"""Nothing leaves the machine that the federation did not send: no telemetry, no update check, no model hub.

Seen from inside and from outside. Inside, an audit hook that is in place before the first line of ours runs writes
down every target that Python is asked to connect to or to look up. gRPC opens its sockets in C++, which no audit hook
sees, so the connections of every process are also read from the kernel while the run goes on.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import federation as harness
import psutil
import pytest
from federation import ROOT, Federation, ok

pytestmark = pytest.mark.e2e

JOB = ROOT / "simulations" / "jobs" / "quickstart.toml"
SMALL = ("aggregation.rounds=1", "train.local_steps=1", "train.batch_size=2", "data.max_length=32",
         "evaluation.max_examples=4", "evaluation.baselines=[]")  # fmt: skip
LOOPBACK = {"127.0.0.1", "::1", "localhost"}

HOOK = """
import os, sys

def hook(event, arguments):
    if event == "socket.connect" or event == "socket.sendto":
        target = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        target = arguments[0]
    else:
        return
    host = target[0] if isinstance(target, tuple) else target
    line = f"{os.getpid()} {event} {host!r}\\n"
    file = os.open(os.environ["FEDPEFT_TEST_SOCKETS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line.encode())
    os.close(file)

sys.addaudithook(hook)
hook("socket.connect", (None, ("hook in place", 0)))
"""


class Watch:
    """The remote addresses of this process's descendants, read again and again."""

    def __init__(self) -> None:
        self.remote: set[str] = set()
        self.connections = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.05):
            for child in me.children(recursive=True):
                try:
                    found = [c.raddr.ip.removeprefix("::ffff:") for c in child.net_connections("inet") if c.raddr]
                except psutil.Error:
                    continue
                self.connections += len(found)
                self.remote.update(found)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which every process that is started from here writes its targets.

    The environment is as a user has it: without the variables that forbid the hub.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOOK)
    plain = harness.environment

    def environment() -> dict[str, str]:
        variables = {k: v for k, v in plain().items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
        path = os.pathsep.join(filter(None, [str(tmp_path / "site"), variables.get("PYTHONPATH", "")]))
        return {**variables, "PYTHONPATH": path, "FEDPEFT_TEST_SOCKETS": str(tmp_path / "sockets.txt")}

    monkeypatch.setattr(harness, "environment", environment)
    return tmp_path / "sockets.txt"


def test_a_whole_run_connects_to_loopback_only(sockets, tmp_path):
    watch = Watch()
    federation = Federation(tmp_path)
    try:
        for name in ("asyncio", "email"):
            federation.enroll(name, f"builtin:stdlib/{name}")
        federation.start_server()
        federation.start_agents()
        run = federation.submit(JOB, *SMALL)
        status = federation.wait_until_ended(run)
        assert status["state"] == "finished", status["error"]
        ok("watch", run, "--bundle", federation.operator)
        ok("fetch", run, "--bundle", federation.operator, "--out", tmp_path / "fetched")
        ok("verify", tmp_path / "fetched")
        pids = {str(p.process.pid) for p in (federation.server, *federation.agents.values()) if p.process}
        assert [p.stop() for p in (*federation.agents.values(), federation.server)] == [0, 0, 0]
    finally:
        federation.close()
        watch.close()

    lines = [line.split(" ", 2) for line in sockets.read_text().splitlines()]
    hooked = {pid for pid, _, target in lines if target == "'hook in place'"}
    assert pids <= hooked  # the hook was at work in the daemon and in both agents
    assert len(hooked) >= len(pids) + 8  # and in every command
    targets = {target.strip("'\"") for _, event, target in lines if target != "'hook in place'"}
    print(f"{len(hooked)} processes, {len(lines) - len(hooked)} targets seen by Python: {sorted(targets)}")
    assert targets <= LOOPBACK
    assert watch.connections > 0
    assert watch.remote <= LOOPBACK, watch.remote
