"""Metrics and a status page over plain HTTP, on the loopback interface only.

``/metrics`` is for Prometheus, ``/`` for a person, ``/status.json`` for a script, ``/ready`` for a supervisor: it
answers 200 only while the state can be read. None of them can change anything, and none is reachable from
outside unless an operator puts a proxy before it.
"""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fedpeft.errors import FedPeftError

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin-bottom: 1.5rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886 }
caption { text-align: left; font-weight: 600; padding: .3rem .6rem }
"""


class Metrics:
    """The daemon's figures for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.deltas = Counter("fedpeft_deltas", "Deltas by outcome", ["outcome"], registry=self.registry)
        self.bytes_up = Counter("fedpeft_upload_bytes", "Bytes of accepted deltas", registry=self.registry)
        self.rounds = Counter("fedpeft_rounds_committed", "Committed rounds", registry=self.registry)
        self.round_seconds = Histogram("fedpeft_round_seconds", "Duration of a round", registry=self.registry,
                                       buckets=(1, 3, 10, 30, 100, 300, 1000, 3000))  # fmt: skip
        self.online = Gauge("fedpeft_agents_online", "Agents with a current heartbeat", registry=self.registry)
        self.enrolled = Gauge("fedpeft_agents_enrolled", "Enrolled clients", registry=self.registry)
        self.running = Gauge("fedpeft_runs_active", "Runs being worked on", registry=self.registry)

    def delta(self, outcome: str, size: int) -> None:
        self.deltas.labels(outcome).inc()
        if outcome == "accepted":
            self.bytes_up.inc(size)


class StatusPage:
    """The HTTP server. Raises :class:`FedPeftError` when the port is taken."""

    def __init__(self, port: int, metrics: Metrics, status: Callable[[], dict[str, Any]]):
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._metrics, self._status = metrics, status
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise FedPeftError(f"cannot listen: {error.strerror}", field="--metrics-port", value=port) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="status-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        code, kind = 200, "text/html; charset=utf-8"
        try:
            if request.path == "/metrics":
                self._refresh()
                kind, body = "text/plain; version=0.0.4", generate_latest(self._metrics.registry)
            elif request.path == "/status.json":
                kind, body = "application/json", json.dumps(self._status()).encode()
            elif request.path == "/ready":
                self._status()
                kind, body = "text/plain", b"ready\n"
            elif request.path == "/":
                body = self._page().encode()
            else:
                code, kind, body = 404, "text/plain", b"not found\n"
        except FedPeftError as error:
            code, kind, body = 503, "text/plain", f"{error}\n".encode()
        request.send_response(code)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        request.end_headers()
        request.wfile.write(body)

    def _refresh(self) -> None:
        agents = self._status()["agents"]
        self._metrics.enrolled.set(len(agents))
        self._metrics.online.set(sum(a["online"] for a in agents))

    def _page(self) -> str:
        status = self._status()
        runs = [
            [r["run_id"], r["state"], f"{r['round']}/{r['rounds_total']}", r["error"] or ""] for r in status["runs"]
        ]
        agents = [[a["name"], "online" if a["online"] else "offline", a["version"]] for a in status["agents"]]
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
            '<meta name="viewport" content="width=device-width"><title>fedpeft</title>'
            f"<style>{_STYLE}</style><h1>fedpeft {html.escape(status['version'])}</h1>"
            + _table("Runs", ["run", "state", "round", "error"], runs)
            + _table("Clients", ["client", "link", "agent"], agents)
        )


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows) or f'<tr><td colspan="{len(head)}">none</td></tr>'
    return f"<table><caption>{caption}</caption>{line(head, 'th')}{body}</table>"
