"""A federation of real processes on the loopback interface, for end-to-end tests.

Every daemon and agent is the installed ``fedpeft`` command in a process of its own, with mutual TLS and node keys on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FEDPEFT = [sys.executable, "-m", "fedpeft.cli"]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


def fedpeft(*args: object, timeout: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*FEDPEFT, *map(str, args)], capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd
    )


def ok(*args: object, timeout: float = 240) -> str:
    """Run the command, which must succeed; its standard output."""
    done = fedpeft(*args, timeout=timeout)
    assert done.returncode == 0, f"fedpeft {' '.join(map(str, args))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 120) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {timeout} s")


class Process:
    """A long-running ``fedpeft`` command; its log is kept in a file."""

    def __init__(self, log: Path, *args: object):
        self.log, self.args = log, args
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(
                [*FEDPEFT, *map(str, self.args)], stdout=file, stderr=file, env=environment(), cwd=self.log.parent
            )
        return self

    def kill(self) -> None:
        """As ``kill -9`` does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                return self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)

    def says(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")


class Federation:
    """One server folder and its agents."""

    def __init__(self, root: Path):
        self.root, self.port = root, free_port()
        self.server_dir = root / "server"
        self.operator = self.server_dir / "operator.toml"
        ok("server", "init", self.server_dir, "--port", self.port)
        self.server = Process(root / "server.log", "server", "up", self.server_dir)
        self.agents: dict[str, Process] = {}

    def enroll(self, name: str, data: object, client_toml: str = "") -> Process:
        """Enrol a client and prepare (not start) its agent."""
        home = self.root / name
        home.mkdir()
        ok("server", "enroll", name, "--dir", self.server_dir, "--out", home / f"{name}.toml")
        (home / "client.toml").write_text(f'data = "{data}"\n{client_toml}')
        self.agents[name] = Process(home / "agent.log", "client", "up", "--bundle", home / f"{name}.toml")
        return self.agents[name]

    def start_server(self) -> None:
        seen = self.server.log.read_text().count("ready") if self.server.log.exists() else 0
        self.server.start()
        wait_for("the daemon's start", lambda: self.server.log.read_text().count("ready") > seen or self._died())

    def start_agents(self) -> None:
        for agent in self.agents.values():
            agent.start()
        wait_for("all agents online", lambda: all(a.says("online") for a in self.agents.values()))

    def submit(self, job: Path, *overrides: str) -> str:
        sets = [part for o in overrides for part in ("--set", o)]
        return ok("submit", job, "--bundle", self.operator, *sets).strip()

    def status(self, run: str) -> dict[str, Any]:
        return json.loads(ok("status", run, "--bundle", self.operator, "--json"))

    def wait_until_ended(self, run: str, timeout: float = 300) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            done = fedpeft("status", run, "--bundle", self.operator, "--json")
            status = json.loads(done.stdout) if done.returncode == 0 else {"state": "unreachable"}
            return status if status["state"] in ("finished", "failed", "stopped") else None

        return wait_for(f"the end of {run}", ended, timeout)  # type: ignore[no-any-return]

    def events(self, run: str) -> list[dict[str, Any]]:
        """The run's events so far, read from the server's folder."""
        path = self.server_dir / "runs" / run / "events.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def happened(self, run: str, kind: str, **facts: object) -> bool:
        return any(e["kind"] == kind and all(e[k] == v for k, v in facts.items()) for e in self.events(run))

    def close(self) -> None:
        for process in (*self.agents.values(), self.server):
            if process.process is not None and process.process.poll() is None:
                process.kill()

    def _died(self) -> bool:
        assert self.server.process is not None
        if self.server.process.poll() is not None:
            raise AssertionError(self.server.log.read_text())
        return False
