"""Channels made from a bundle: where they go and what they ask of gRPC."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.bundle import Bundle
from fedpeft.errors import FedPeftError
from fedpeft_client.bundle import channel_options, choose_endpoint, load_bundle, open_channel, why_refused
from fedpeft_server.pki import Authority, init_authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return init_authority(tmp_path_factory.mktemp("pki") / "server")


def bundle(authority: Authority, *endpoints: str) -> Bundle:
    return authority.issue("hospital-a", "client", endpoints=endpoints)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_loopback_never_goes_through_a_proxy(host: str) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options(f"{host}:1")


def test_other_hosts_may_and_limits_hold_both_ways() -> None:
    options = dict(channel_options("fed.example.org:1"))
    assert "grpc.enable_http_proxy" not in options
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 64 * 2**20


def test_the_first_endpoint_that_answers_is_used(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        up = f"127.0.0.1:{listening.getsockname()[1]}"
        assert choose_endpoint(bundle(authority, "127.0.0.1:1", up)) == up
    assert choose_endpoint(bundle(authority, "127.0.0.1:1", "127.0.0.1:2")) == "127.0.0.1:1"
    channel, endpoint = open_channel(bundle(authority, "127.0.0.1:1"))
    channel.close()
    assert endpoint == "127.0.0.1:1"


def test_an_expired_bundle_opens_no_channel(authority: Authority) -> None:
    past = datetime.now(UTC) - timedelta(days=3)
    expired = authority.issue("a", "client", endpoints=["127.0.0.1:1"], valid_days=1, now=past)
    with pytest.raises(FedPeftError, match=r"certificate of a expired on \d{4}-\d\d-\d\d; ask the operator"):
        open_channel(expired)


def test_a_server_that_is_away_or_silent_is_no_refusal(authority: Authority, tmp_path: Path) -> None:
    assert why_refused(bundle(authority, "127.0.0.1:1"), "127.0.0.1:1", timeout_s=0.5) is None
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = f"127.0.0.1:{listening.getsockname()[1]}"
        assert why_refused(bundle(authority, endpoint), endpoint, timeout_s=0.3) is None


def test_the_parser_is_the_librarys() -> None:
    from fedpeft.bundle import load_bundle as parser

    assert load_bundle is parser
