"""The status page and metrics: loopback only, read only, and honest about readiness."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedpeft.errors import FedPeftError
from fedpeft_server.status_page import Metrics, StatusPage

STATUS = {
    "version": "1.2.3",
    "agents": [
        {"name": "hospital-a", "online": True, "version": "1.2.3", "limits": {}},
        {"name": "<script>alert(1)</script>", "online": False, "version": "", "limits": {}},
    ],
    "runs": [{"run_id": "quick-1", "state": "running", "round": 2, "rounds_total": 5, "error": None}],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served():
    state = {"status": lambda: STATUS}
    port, metrics = free_port(), Metrics()
    page = StatusPage(port, metrics, lambda: state["status"]())
    yield f"http://127.0.0.1:{port}", metrics, state
    page.close()


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_metrics_are_what_prometheus_reads(served):
    url, metrics, _ = served
    metrics.delta("accepted", 1000)
    metrics.delta("shape", 10)
    metrics.rounds.inc()
    families = {f.name: f for f in text_string_to_metric_families(get(url + "/metrics")[2])}
    outcomes = {s.labels["outcome"]: s.value for s in families["fedpeft_deltas"].samples if s.name.endswith("_total")}
    assert outcomes == {"accepted": 1.0, "shape": 1.0}
    assert families["fedpeft_upload_bytes"].samples[0].value == 1000
    assert families["fedpeft_agents_online"].samples[0].value == 1
    assert families["fedpeft_agents_enrolled"].samples[0].value == 2


def test_the_page_shows_runs_and_clients_and_trusts_no_name(served):
    code, kind, page = get(served[0] + "/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "quick-1" in page
    assert "hospital-a" in page
    assert "<script>alert" not in page
    assert json.loads(get(served[0] + "/status.json")[2]) == STATUS


def test_a_state_that_cannot_be_read_is_not_ready(served):
    url, _, state = served
    assert get(url + "/ready")[0] == 200

    def broken():
        raise FedPeftError("the disk is full", field="storage")

    state["status"] = broken
    assert get(url + "/ready")[0] == 503
    assert get(url + "/nowhere")[0] == 404


def test_a_port_in_use_is_one_clear_error(served):
    port = int(served[0].rsplit(":", 1)[1])
    with pytest.raises(FedPeftError, match="--metrics-port: cannot listen"):
        StatusPage(port, Metrics(), lambda: STATUS)
