"""From a bundle to a gRPC channel under mutual TLS.

The bundle's format is in :mod:`fedpeft.bundle` (re-exported here: :func:`load_bundle`). This module makes the channel
that every client-side service uses: the agent's Flower session, the adapter exchange and the operator's commands.

One thing needs care. When a server refuses a client certificate, TLS 1.3 tells the client only *after* its own
handshake has succeeded, by closing the connection, and gRPC turns that into ``UNAVAILABLE: Socket closed``, the same
words as for a server that is restarting. An agent that retried on that would retry forever. :func:`why_refused` looks
with the standard library's TLS how far one gets, and turns a refusal into a :class:`FedPeftError` with a way out.

>>> dict(channel_options("127.0.0.1:9443"))["grpc.enable_http_proxy"]
0
>>> "grpc.enable_http_proxy" in dict(channel_options("fed.example.org:9443"))
False
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import tempfile
import time

import grpc

from fedpeft.bundle import Bundle, check_validity, load_bundle
from fedpeft.errors import FedPeftError

__all__ = [
    "Bundle",
    "channel_credentials",
    "channel_options",
    "check_validity",
    "choose_endpoint",
    "load_bundle",
    "open_channel",
    "why_refused",
]


def channel_credentials(bundle: Bundle) -> grpc.ChannelCredentials:
    """Mutual TLS: trust the federation's authority alone, show the bundle's certificate."""
    return grpc.ssl_channel_credentials(
        root_certificates=bundle.ca_certificate_pem,
        private_key=bundle.private_key_pem,
        certificate_chain=bundle.certificate_pem,
    )


def channel_options(endpoint: str, max_message_bytes: int = 64 << 20) -> list[tuple[str, int]]:
    """gRPC options of every channel: message limits, keep-alive, quick reconnection, no proxy on loopback."""
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A dead peer or a forgotten NAT entry is noticed within 30 s even when nothing is being sent.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's default waits up to 120 s between attempts; a restarted daemon should have its agents at once.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if _is_loopback(_split(endpoint)[0]):
        # gRPC honours http_proxy even for 127.0.0.1.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def choose_endpoint(bundle: Bundle, timeout_s: float = 3.0) -> str:
    """The first endpoint that accepts a TCP connection, or the first one when none does (yet)."""
    if len(bundle.endpoints) > 1:
        for endpoint in bundle.endpoints:
            try:
                socket.create_connection(_split(endpoint), timeout_s).close()
            except OSError:
                continue
            return endpoint
    return bundle.endpoints[0]


def open_channel(
    bundle: Bundle, *, endpoint: str | None = None, max_message_bytes: int = 64 << 20
) -> tuple[grpc.Channel, str]:
    """A channel to ``endpoint`` (default: :func:`choose_endpoint`), and the endpoint that it goes to.

    Nothing is sent yet; gRPC connects on the first call.

    Raises:
        FedPeftError: when the certificate is not valid now.
    """
    check_validity(bundle)
    endpoint = endpoint or choose_endpoint(bundle)
    options = channel_options(endpoint, max_message_bytes)
    return grpc.secure_channel(endpoint, channel_credentials(bundle), options=options), endpoint


def why_refused(bundle: Bundle, endpoint: str, timeout_s: float = 5.0) -> FedPeftError | None:
    """Whether the server at ``endpoint`` refuses this bundle for good, and why; ``None`` when waiting may help.

    Makes a TLS connection as gRPC would and waits for the server's first HTTP/2 frame or its hanging up.
    """
    try:
        check_validity(bundle)
    except FedPeftError as error:
        return error
    again = f"ask the operator for a new bundle: fedpeft server enroll {bundle.name} --renew"
    for attempt in range(2):
        try:
            if _greeted(bundle, endpoint, timeout_s):
                return None
        except ssl.SSLCertVerificationError as error:
            return FedPeftError(
                f"the server's certificate is not accepted ({error.verify_message})",
                field="endpoint",
                value=endpoint,
                hint="check the host name; if the server was set up anew, " + again,
            )
        except OSError:
            return None
        if attempt == 0:
            # A server that is stopping closes connections as well; it will not do so twice.
            time.sleep(0.5)
    return FedPeftError(
        f"the server refused the certificate of {bundle.name}", field="endpoint", value=endpoint, hint=again
    )


def _greeted(bundle: Bundle, endpoint: str, timeout_s: float) -> bool:
    """Whether the server, after a TLS handshake, says its first word of HTTP/2 (``True``) or hangs up (``False``).

    Raises:
        OSError: when it does not get that far; :class:`ssl.SSLCertVerificationError` when *we* refuse the server.
    """
    host, port = _split(endpoint)
    context = ssl.create_default_context(cadata=bundle.ca_certificate_pem.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    _load_identity(context, bundle)
    with (
        socket.create_connection((host, port), timeout_s) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        try:
            return secured.recv(1) != b""
        except TimeoutError:
            return True
        except OSError:
            return False


def _load_identity(context: ssl.SSLContext, bundle: Bundle) -> None:
    # The standard library reads keys from files only; this one is mode 0600 and lives for this call.
    handle, path = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bundle.private_key_pem + bundle.certificate_pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
