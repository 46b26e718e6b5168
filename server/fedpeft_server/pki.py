"""The federation's own authority: who may speak to the daemon, and as whom.

Everything that reaches the daemon's port passes mutual TLS first, and the only certificates that pass are those signed
by the authority made here. So the authority *is* the guest list: ``fedpeft server init`` makes it, ``fedpeft server
enroll NAME`` adds a participant, and nothing outside the server's folder has to be trusted or asked.

What a participant holds (see :mod:`fedpeft.bundle`) is one ECDSA P-384 key. Its certificate carries the name (``CN``)
and the role (``OU``: ``client`` or ``operator``); its public key is the identity in ledgers and budgets, and Flower's
node key. :func:`peer_identity` gives a gRPC handler the caller's name, role and key from the verified certificate; a
handler must take them from there and never from the request.

Files below the server's folder::

    ca.pem  ca.key           the authority; ca.key signs new bundles and should be backed up
    server.pem  server.key   the daemon's certificate, with the host names that clients may use
    operator.toml            the first operator's bundle

Keys are files of mode 0600 in a folder of mode 0700.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     authority = init_authority(folder, hosts=["fed.example.org"])
...     bundle = authority.issue("hospital-a", "client", endpoints=["fed.example.org:9443"])
>>> bundle.name, bundle.role, len(bundle.fingerprint)
('hospital-a', 'client', 64)
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.bundle import (
    ROLES,
    Bundle,
    Role,
    check_endpoint,
    check_name,
    fingerprint,
    public_key_pem,
    subject,
    write_bundle,
    write_private,
)
from fedpeft.errors import FedPeftError, nearest

__all__ = [
    "DEFAULT_PORT",
    "Authority",
    "PeerIdentity",
    "ServerTls",
    "fingerprint",
    "init_authority",
    "load_authority",
    "load_server_tls",
    "peer_identity",
    "server_credentials",
    "server_options",
]

DEFAULT_PORT = 9443
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_CA_DAYS = 3650.0
_SERVER_DAYS = 825.0
_ORGANISATION = "fedpeft"
# Participants' clocks may be behind ours; a bundle should work the moment it is handed out.
_BACKDATE = timedelta(minutes=5)


@dataclass(frozen=True)
class ServerTls:
    """What a ``grpc.Server`` needs for mutual TLS."""

    certificate_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)
    ca_certificate_pem: bytes = field(repr=False)


@dataclass(frozen=True)
class PeerIdentity:
    """Who is calling, as certified by the authority and proven by TLS.

    Attributes:
        name: the participant's name (``CN``).
        role: ``"client"`` or ``"operator"`` (``OU``).
        public_key_fingerprint: hexadecimal SHA-256 over the public key; the identity in ledgers and budgets.
        public_key_bytes: SubjectPublicKeyInfo in PEM, the form of Flower's node keys.
    """

    name: str
    role: Role
    public_key_fingerprint: str
    public_key_bytes: bytes = field(repr=False)


@dataclass(frozen=True)
class Authority:
    """The signing key of a federation and its folder; see :func:`init_authority` and :func:`load_authority`."""

    directory: Path
    certificate: x509.Certificate = field(repr=False)
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        name: str,
        role: Role,
        *,
        endpoints: Sequence[str],
        valid_days: float = 365.0,
        private_key_pem: bytes | None = None,
        now: datetime | None = None,
    ) -> Bundle:
        """Make a bundle for ``name``. Whether the name is free is for the caller to decide.

        Args:
            endpoints: ``host:port`` of the server as the participant reaches it.
            valid_days: life of the certificate.
            private_key_pem: certify this key again instead of making one. A renewal that does so keeps the
                participant's identity (and Flower's node id); otherwise it becomes a new one.
            now: the first moment of validity; for tests of expiry.

        Raises:
            FedPeftError: for an impossible name, role, endpoint or duration.
        """
        check_name(name)
        if role not in ROLES:
            raise FedPeftError(
                "unknown role", field="role", value=role, hint=f"did you mean {nearest(role, ROLES) or 'client'!r}?"
            )
        if not 0 < valid_days <= _CA_DAYS:
            raise FedPeftError(
                f"must be more than 0 and at most {_CA_DAYS:.0f}",
                field="valid_days",
                value=valid_days,
                hint="a year is usual",
            )
        if not endpoints:
            raise FedPeftError("at least one is needed", field="endpoints", hint="for example localhost:9443")
        key = _new_key() if private_key_pem is None else _load_key(private_key_pem, field="private_key_pem")
        builder = _leaf(name, role, key.public_key(), self.certificate, valid_days, now)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        certificate = builder.sign(self.private_key, hashes.SHA384())
        return Bundle(
            name=name,
            role=role,
            endpoints=tuple(check_endpoint(endpoint) for endpoint in endpoints),
            ca_certificate_pem=self.certificate_pem,
            certificate_pem=certificate.public_bytes(Encoding.PEM),
            private_key_pem=_key_pem(key),
        )

    def issue_server(self, hosts: Iterable[str], *, valid_days: float = _SERVER_DAYS) -> ServerTls:
        """Make and store the daemon's certificate for ``hosts`` and the loopback names; also renews it."""
        key = _new_key()
        builder = _leaf("fedpeft-server", "server", key.public_key(), self.certificate, valid_days, None)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
        alternatives = [_general_name(host) for host in dict.fromkeys([*LOOPBACK, *hosts])]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate_pem = builder.sign(self.private_key, hashes.SHA384()).public_bytes(Encoding.PEM)
        write_private(self.directory / "server.key", _key_pem(key))
        (self.directory / "server.pem").write_bytes(certificate_pem)
        return ServerTls(certificate_pem, _key_pem(key), self.certificate_pem)


def init_authority(
    directory: str | os.PathLike[str],
    hosts: Sequence[str] = (),
    *,
    port: int = DEFAULT_PORT,
    endpoints: Sequence[str] | None = None,
) -> Authority:
    """Make an authority in ``directory``, the daemon's certificate for ``hosts``, and the first operator's bundle.

    Args:
        hosts: names or addresses under which clients will reach the server; the loopback names are always included.
        port: used for the operator's endpoints where ``endpoints`` is not given.
        endpoints: ``host:port`` list for the operator's bundle; default: every host, or localhost, with ``port``.

    Raises:
        FedPeftError: when the folder already holds an authority (a new one would shut out everyone enrolled).
    """
    directory = Path(directory)
    if (directory / "ca.key").exists():
        raise FedPeftError(
            "already holds an authority",
            field="directory",
            value=str(directory),
            hint="choose another folder; a new authority here would shut out everyone who is enrolled",
        )
    for host in hosts:
        _general_name(host)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    key = _new_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft authority"),
        ]
    )
    begin = datetime.now(UTC) - _BACKDATE
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    authority = Authority(directory, certificate, key)
    # ca.key last: its presence means that the rest is complete.
    authority.issue_server(hosts)
    reachable = endpoints or [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts or LOOPBACK[:1]]
    write_bundle(authority.issue("operator", "operator", endpoints=reachable), directory / "operator.toml")
    (directory / "ca.pem").write_bytes(authority.certificate_pem)
    write_private(directory / "ca.key", _key_pem(key))
    return authority


def load_authority(directory: str | os.PathLike[str]) -> Authority:
    """Read the authority that :func:`init_authority` made.

    Raises:
        FedPeftError: when there is none, or its files do not belong together.
    """
    directory = Path(directory)
    certificate = _load_certificate(_read(directory, "ca.pem"), directory / "ca.pem")
    key = _load_key(_read(directory, "ca.key"), field=str(directory / "ca.key"))
    if key.public_key() != certificate.public_key():
        raise FedPeftError("ca.key does not belong to ca.pem", field="directory", value=str(directory))
    return Authority(directory, certificate, key)


def load_server_tls(directory: str | os.PathLike[str]) -> ServerTls:
    """Read the daemon's certificate and key; needs no access to ``ca.key``.

    Raises:
        FedPeftError: when a file is missing or the certificate has expired.
    """
    directory = Path(directory)
    tls = ServerTls(_read(directory, "server.pem"), _read(directory, "server.key"), _read(directory, "ca.pem"))
    certificate = _load_certificate(tls.certificate_pem, directory / "server.pem")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise FedPeftError(
            f"the server's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}",
            field="server.pem",
            value=str(directory / "server.pem"),
            hint="renew it: fedpeft server init DIR --renew",
        )
    return tls


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Mutual TLS for a ``grpc.Server``: a caller without a certificate of our authority is cut off in the handshake."""
    return grpc.ssl_server_credentials(
        [(tls.private_key_pem, tls.certificate_pem)],
        root_certificates=tls.ca_certificate_pem,
        require_client_auth=True,
    )


def server_options(max_message_bytes: int = 64 << 20) -> list[tuple[str, int]]:
    """gRPC options that match the client's (:func:`fedpeft_client.bundle.channel_options`).

    Without the ping interval the server would close channels of clients whose keep-alive it takes for abuse; without
    ``so_reuseport = 0`` a second daemon could bind a port in use and steal half of the connections.
    """
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]


def peer_identity(context: grpc.ServicerContext) -> PeerIdentity:
    """The caller of a gRPC handler, from the certificate that TLS has verified.

    Raises:
        FedPeftError: when the connection has no client certificate or one without name and role, which can only
            happen on a port that was not opened with :func:`server_credentials`.
    """
    certificates = list(context.auth_context().get("x509_pem_cert", ()))
    if not certificates:
        raise FedPeftError("the caller showed no certificate", hint="connect with a bundle: --bundle FILE")
    return _identity(certificates[0])


@lru_cache(maxsize=4096)
def _identity(certificate_pem: bytes) -> PeerIdentity:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    name, role = subject(certificate)
    known: dict[str, Role] = {role: role for role in ROLES}
    if not name or role not in known:
        raise FedPeftError("the caller's certificate names no participant", value=f"{role}/{name}")
    return PeerIdentity(name, known[role], fingerprint(certificate), public_key_pem(certificate))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_key(pem: bytes, *, field: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise FedPeftError("cannot be read as a private key", field=field) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FedPeftError("is not an ECDSA P-384 key", field=field)
    return key


def _load_certificate(pem: bytes, path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise FedPeftError("cannot be read as a certificate", field=path.name, value=str(path)) from None


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise FedPeftError(
            f"{name} cannot be read ({error.strerror})",
            field="directory",
            value=str(directory),
            hint="make a server folder first: fedpeft server init DIR",
        ) from None


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c in host for c in " :/\t\n"):
        raise FedPeftError(
            "not a host name or an address",
            field="hosts",
            value=host,
            hint="give the bare name, without scheme and port, for example fed.example.org",
        )
    return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _leaf(
    name: str,
    role: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate,
    valid_days: float,
    now: datetime | None,
) -> x509.CertificateBuilder:
    begin = now or datetime.now(UTC)
    parts = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ]
    issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name(parts))
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _BACKDATE)
        .not_valid_after(begin + timedelta(days=valid_days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
