"""The authority: what it issues, who gets in, and who is told what."""

from __future__ import annotations

import os
import stat
import threading
from concurrent import futures
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedpeft.bundle import Bundle, load_bundle
from fedpeft.errors import FedPeftError
from fedpeft_client.bundle import open_channel, why_refused
from fedpeft_server.pki import (
    Authority,
    PeerIdentity,
    init_authority,
    load_authority,
    load_server_tls,
    peer_identity,
    server_credentials,
    server_options,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return init_authority(tmp_path / "server", hosts=["fed.example.org", "10.1.2.3"])


def mode(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_private_keys_are_readable_by_their_owner_alone(authority: Authority) -> None:
    folder = authority.directory
    assert mode(folder) == 0o700
    for name in ("ca.key", "server.key", "operator.toml"):
        assert mode(folder / name) == 0o600, name


def test_server_certificate_names_loopback_and_the_given_hosts(authority: Authority) -> None:
    certificate = x509.load_pem_x509_certificate((authority.directory / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1", "10.1.2.3"]


def test_a_bundle_certifies_one_p384_key_for_client_use_only(authority: Authority) -> None:
    bundle = authority.issue("hospital-a", "client", endpoints=["fed.example.org:9443"], valid_days=30)
    certificate = bundle.certificate
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert certificate.public_key().curve.name == "secp384r1"
    assert bundle.private_key.public_key() == certificate.public_key()
    assert certificate.subject.rfc4514_string() == "CN=hospital-a,OU=client,O=fedpeft"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert timedelta(days=29.9) < bundle.expires_at - datetime.now(UTC) < timedelta(days=30.1)
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert bundle.fingerprint == sha256(spki).hexdigest()


def test_init_leaves_a_usable_operator_bundle(authority: Authority) -> None:
    bundle = load_bundle(authority.directory / "operator.toml")
    assert (bundle.name, bundle.role) == ("operator", "operator")
    assert bundle.endpoints == ("fed.example.org:9443", "10.1.2.3:9443")


def test_renewal_over_the_same_key_keeps_the_identity(authority: Authority) -> None:
    first = authority.issue("a", "client", endpoints=["localhost:1"])
    same = load_authority(authority.directory).issue(
        "a", "client", endpoints=["localhost:1"], private_key_pem=first.private_key_pem
    )
    assert same.fingerprint == first.fingerprint
    assert same.certificate.serial_number != first.certificate.serial_number
    assert authority.issue("a", "client", endpoints=["localhost:1"]).fingerprint != first.fingerprint


def test_a_second_authority_never_replaces_the_first(authority: Authority) -> None:
    before = (authority.directory / "ca.key").read_bytes()
    with pytest.raises(FedPeftError, match="already holds an authority"):
        init_authority(authority.directory)
    assert (authority.directory / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "Hospital A"}, "name: not a valid participant name"),
        ({"name": "-a"}, "name:"),
        ({"name": "a" * 65}, "name:"),
        ({"role": "clint"}, "role: unknown role (got 'clint'); did you mean 'client'?"),
        ({"valid_days": 0}, "valid_days: must be more than 0"),
        ({"endpoints": []}, "endpoints: at least one"),
        ({"endpoints": ["nowhere"]}, "endpoints: not of the form host:port (got 'nowhere')"),
        ({"endpoints": ["::1:80"]}, "endpoints: not of the form"),
        ({"private_key_pem": b"x"}, "private_key_pem: cannot be read"),
    ],
)
def test_impossible_requests_name_field_and_value(authority: Authority, arguments: dict, named: str) -> None:
    request = {"name": "a", "role": "client", "endpoints": ["localhost:1"], **arguments}
    with pytest.raises(FedPeftError) as caught:
        authority.issue(request.pop("name"), request.pop("role"), **request)
    assert named in str(caught.value)


def test_missing_folder_and_bad_host_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match="make a server folder first"):
        load_authority(tmp_path)
    with pytest.raises(FedPeftError, match="make a server folder first"):
        load_server_tls(tmp_path)
    with pytest.raises(FedPeftError, match="without scheme and port"):
        init_authority(tmp_path / "x", hosts=["https://fed.example.org:1"])
    assert not (tmp_path / "x").exists()


class _WhoAmI(grpc.GenericRpcHandler):
    """One method that answers with the caller's identity."""

    def __init__(self) -> None:
        self.seen: list[PeerIdentity] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            self.seen.append(peer_identity(context))
            return self.seen[-1].name.encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def who_am_i(authority: Authority):
    handler = _WhoAmI()
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[handler], options=server_options())
    port = server.add_secure_port("127.0.0.1:0", server_credentials(load_server_tls(authority.directory)))
    server.start()
    yield handler, f"127.0.0.1:{port}"
    server.stop(0)


def call(bundle: Bundle, endpoint: str) -> bytes:
    channel, _ = open_channel(bundle, endpoint=endpoint)
    with channel:
        return channel.unary_unary("/x/Who")(b"", timeout=5)


def test_handlers_see_the_certified_name_role_and_key(authority: Authority, who_am_i) -> None:
    handler, endpoint = who_am_i
    client = authority.issue("hospital-a", "client", endpoints=[endpoint])
    operator = authority.issue("ops", "operator", endpoints=[endpoint])
    assert call(client, endpoint) == b"hospital-a"
    assert call(operator, endpoint) == b"ops"
    assert handler.seen[0] == PeerIdentity("hospital-a", "client", client.fingerprint, client.public_key_pem)
    assert handler.seen[1].role == "operator"


def test_strangers_and_expired_certificates_do_not_reach_any_handler(
    tmp_path: Path, authority: Authority, who_am_i
) -> None:
    handler, endpoint = who_am_i
    past = datetime.now(UTC) - timedelta(days=10)
    expired = authority.issue("late", "client", endpoints=[endpoint], valid_days=1, now=past)
    stranger = init_authority(tmp_path / "other").issue("eve", "client", endpoints=[endpoint])
    # A certificate of another authority, with ours as the trusted one: only the server can refuse it.
    forged = Bundle("eve", "client", (endpoint,), authority.certificate_pem, *_key_and_certificate(stranger))

    with pytest.raises(FedPeftError, match=r"certificate of late expired on .*fedpeft server enroll late --renew"):
        call(expired, endpoint)
    with pytest.raises(grpc.RpcError) as refused:
        _call_without_precheck(expired, endpoint)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    for bundle in (stranger, forged):
        with pytest.raises(grpc.RpcError):
            call(bundle, endpoint)
    assert handler.seen == []

    # gRPC says the same for all of these as for a server that is away; the diagnosis tells them apart.
    assert "expired on" in str(why_refused(expired, endpoint))
    assert "the server's certificate is not accepted" in str(why_refused(stranger, endpoint))
    assert "refused the certificate of eve" in str(why_refused(forged, endpoint))
    good = authority.issue("good", "client", endpoints=[endpoint])
    assert why_refused(good, endpoint) is None
    assert why_refused(good, "127.0.0.1:1") is None


def _key_and_certificate(bundle: Bundle) -> tuple[bytes, bytes]:
    return bundle.certificate_pem, bundle.private_key_pem


def _call_without_precheck(bundle: Bundle, endpoint: str) -> bytes:
    from fedpeft_client.bundle import channel_credentials, channel_options

    with grpc.secure_channel(endpoint, channel_credentials(bundle), options=channel_options(endpoint)) as channel:
        return channel.unary_unary("/x/Who")(b"", timeout=5)


def test_a_port_in_use_is_not_shared(authority: Authority, who_am_i) -> None:
    _, endpoint = who_am_i
    second = grpc.server(futures.ThreadPoolExecutor(1), options=server_options())
    with pytest.raises(RuntimeError):
        second.add_secure_port(endpoint, server_credentials(load_server_tls(authority.directory)))


def test_an_idle_channel_outlives_its_keepalive_pings(authority: Authority, who_am_i) -> None:
    _, endpoint = who_am_i
    bundle = authority.issue("idle", "client", endpoints=[endpoint])
    channel, _ = open_channel(bundle)
    with channel:
        method = channel.unary_unary("/x/Who")
        assert method(b"", timeout=5) == b"idle"
        threading.Event().wait(0.2)
        assert method(b"", timeout=5) == b"idle"
