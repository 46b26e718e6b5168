"""A bundle: everything that one participant needs to join a federation, in one file.

Enrolment hands a data owner (or an operator) a single TOML file, mode 0600: where the server is, which authority to
trust, and one ECDSA P-384 key with its certificate. The same key is used twice, as the TLS client key and as Flower's
node key, so a participant has exactly one identity: the SHA-256 over its public key (SubjectPublicKeyInfo). Ledgers
and privacy budgets refer to that fingerprint, never to a network address or to a number that the server made up.

The file, schema version 1::

    schema = 1
    name = "hospital-a"
    role = "client"                      # or "operator"
    endpoints = ["fed.example.org:9443"] # tried in this order
    ca_certificate = '''-----BEGIN CERTIFICATE----- ...'''
    certificate = '''-----BEGIN CERTIFICATE----- ...'''
    private_key = '''-----BEGIN PRIVATE KEY----- ...'''

Role and name stand in the certificate as well (``OU`` and ``CN``), where the authority's signature protects them; the
copies in the file only let a reader see whose it is, and :func:`load_bundle` refuses a file in which they disagree.

This module is the format alone: it opens no connection. The authority that fills bundles lives with the server, the
channel that is made from one lives with the client.

>>> check_name("hospital-a")
'hospital-a'
>>> check_name("Hospital A")
Traceback (most recent call last):
    ...
fedpeft.errors.FedPeftError: name: not a valid participant name (got 'Hospital A'); use 1 to 64 of a-z, 0-9, '.', \
'_' and '-', starting with a letter or a digit, for example 'hospital-a'
"""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from fedpeft.errors import FedPeftError

SCHEMA = 1
Role = Literal["client", "operator"]
ROLES: tuple[Role, ...] = ("client", "operator")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEYS = ("schema", "name", "role", "endpoints", "ca_certificate", "certificate", "private_key")


@dataclass(frozen=True)
class Bundle:
    """One participant's credentials. Build it with :func:`load_bundle` or by enrolment, not by hand.

    Attributes:
        name: the participant, unique within a federation.
        role: ``"client"`` trains, ``"operator"`` submits and stops jobs.
        endpoints: ``host:port`` of the server, tried in order.
        ca_certificate_pem: the federation's authority, the only one that is trusted.
        certificate_pem: this participant's certificate.
        private_key_pem: PKCS#8, not encrypted; the file's mode protects it. Never shown in a ``repr``.
    """

    name: str
    role: Role
    endpoints: tuple[str, ...]
    ca_certificate_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)

    @cached_property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate_pem)

    @cached_property
    def private_key(self) -> ec.EllipticCurvePrivateKey:
        key = load_pem_private_key(self.private_key_pem, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FedPeftError("is not an elliptic-curve key", field="private_key", hint=_ASK_AGAIN.format(self.name))
        return key

    @cached_property
    def public_key_pem(self) -> bytes:
        """SubjectPublicKeyInfo in PEM: the form in which Flower stores and compares node keys."""
        return public_key_pem(self.certificate)

    @cached_property
    def fingerprint(self) -> str:
        """The participant's identity: hexadecimal SHA-256 over the public key."""
        return fingerprint(self.certificate)

    @property
    def expires_at(self) -> datetime:
        return self.certificate.not_valid_after_utc


_ASK_AGAIN = "ask the operator for a new bundle: fedpeft server enroll {} --renew"


def check_name(name: str) -> str:
    """Return ``name`` if it may name a participant; raise :class:`FedPeftError` otherwise."""
    if not _NAME.fullmatch(name):
        raise FedPeftError(
            "not a valid participant name",
            field="name",
            value=name,
            hint="use 1 to 64 of a-z, 0-9, '.', '_' and '-', starting with a letter or a digit, "
            "for example 'hospital-a'",
        )
    return name


def check_endpoint(endpoint: str) -> str:
    """Return ``endpoint`` if it reads ``host:port`` (an IPv6 address in brackets); raise :class:`FedPeftError`."""
    host, colon, port = endpoint.rpartition(":")
    bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or bare_ipv6 or not port.isdecimal() or not 0 < int(port) < 65536:
        raise FedPeftError(
            "not of the form host:port",
            field="endpoints",
            value=endpoint,
            hint="write for example 'fed.example.org:9443' or '[::1]:9443'",
        )
    return endpoint


def public_key_pem(certificate: x509.Certificate) -> bytes:
    """The certificate's public key as SubjectPublicKeyInfo in PEM."""
    return certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(certificate: x509.Certificate) -> str:
    """Hexadecimal SHA-256 over the certificate's SubjectPublicKeyInfo (DER).

    A renewed certificate over the same key keeps its fingerprint, and with it the participant's history.
    """
    der = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return sha256(der).hexdigest()


def subject(certificate: x509.Certificate) -> tuple[str, str]:
    """``(name, role)`` as the authority certified them; empty strings where a part is missing."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    roles = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return (str(names[0].value) if names else "", str(roles[0].value) if roles else "")


def check_validity(bundle: Bundle, now: datetime | None = None) -> None:
    """Raise :class:`FedPeftError` when the certificate is not valid at ``now`` (default: this moment).

    The server's TLS refuses such a certificate in any case, but without saying why; this says it first.
    """
    now = now or datetime.now(UTC)
    if now >= bundle.expires_at:
        raise FedPeftError(
            f"certificate of {bundle.name} expired on {bundle.expires_at:%Y-%m-%d}",
            hint=_ASK_AGAIN.format(bundle.name),
        )
    begins = bundle.certificate.not_valid_before_utc
    if now < begins:
        raise FedPeftError(
            f"certificate of {bundle.name} is not valid before {begins:%Y-%m-%d %H:%M} UTC",
            hint=f"set this machine's clock, which says {now:%Y-%m-%d %H:%M} UTC",
        )


def load_bundle(path: str | os.PathLike[str], *, now: datetime | None = None) -> Bundle:
    """Read and verify a bundle.

    Checked: the file exists and is TOML of schema 1 with exactly the known keys, name and role are valid and equal to
    the certified ones, the key belongs to the certificate, the authority signed it, and it is valid at ``now``.

    Raises:
        FedPeftError: naming the file or the key in it, and what to do.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FedPeftError(
            "no such file", field="bundle", value=str(path), hint="the operator makes one: fedpeft server enroll NAME"
        ) from None
    except OSError as error:
        raise FedPeftError(f"cannot be read ({error.strerror})", field="bundle", value=str(path)) from None
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise _not_a_bundle(path, "not a TOML file") from None
    bundle = _from_table(table, path)
    check_validity(bundle, now)
    return bundle


def write_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> Path:
    """Write ``bundle`` with mode 0600, atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    table = {
        "schema": SCHEMA,
        "name": bundle.name,
        "role": bundle.role,
        "endpoints": list(bundle.endpoints),
        "ca_certificate": bundle.ca_certificate_pem.decode("ascii"),
        "certificate": bundle.certificate_pem.decode("ascii"),
        "private_key": bundle.private_key_pem.decode("ascii"),
    }
    text = f"# fedpeft bundle of {bundle.name}. It holds a private key: keep it secret, do not commit it.\n"
    write_private(path, (text + tomli_w.dumps(table, multiline_strings=True)).encode("utf-8"))
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` with mode 0600, durable and atomic."""
    # mkstemp creates the file with mode 0600, so the secret is at no moment readable by others.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _not_a_bundle(path: Path, why: str) -> FedPeftError:
    return FedPeftError(
        f"not a fedpeft bundle: {why}",
        field="bundle",
        value=str(path),
        hint="pass the file that 'fedpeft server enroll NAME' wrote, unchanged",
    )


def _from_table(table: Mapping[str, object], path: Path) -> Bundle:
    schema = table.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise FedPeftError(
            f"bundle has schema {schema}, this program reads schema {SCHEMA}",
            field="bundle",
            value=str(path),
            hint="update fedpeft on this machine",
        )
    if schema != SCHEMA:
        raise _not_a_bundle(path, f"'schema' is {schema!r}, expected {SCHEMA}")
    if missing := [key for key in _KEYS if key not in table]:
        raise _not_a_bundle(path, f"key {missing[0]!r} is missing")
    if unknown := [key for key in table if key not in _KEYS]:
        raise _not_a_bundle(path, f"unknown key {unknown[0]!r}")
    texts: dict[str, str] = {}
    for key in ("name", "role", "ca_certificate", "certificate", "private_key"):
        value = table[key]
        if not isinstance(value, str):
            raise _not_a_bundle(path, f"{key!r} is not a string")
        texts[key] = value
    endpoints = table["endpoints"]
    if not isinstance(endpoints, list) or not endpoints or not all(isinstance(item, str) for item in endpoints):
        raise _not_a_bundle(path, "'endpoints' is not a list of at least one 'host:port'")
    role: Role
    if texts["role"] == "client":
        role = "client"
    elif texts["role"] == "operator":
        role = "operator"
    else:
        raise _not_a_bundle(path, f"role {texts['role']!r} is none of {', '.join(ROLES)}")
    bundle = Bundle(
        name=check_name(texts["name"]),
        role=role,
        endpoints=tuple(check_endpoint(item) for item in endpoints),
        ca_certificate_pem=texts["ca_certificate"].encode(),
        certificate_pem=texts["certificate"].encode(),
        private_key_pem=texts["private_key"].encode(),
    )
    _check_keys(bundle, path)
    return bundle


def _check_keys(bundle: Bundle, path: Path) -> None:
    """The cryptographic consistency of a bundle; expiry is checked apart, it has a better message."""
    try:
        authority = x509.load_pem_x509_certificate(bundle.ca_certificate_pem)
        certificate = bundle.certificate
    except ValueError:
        raise _not_a_bundle(path, "a certificate in it cannot be read") from None
    try:
        private_key = bundle.private_key
    except (ValueError, TypeError):
        raise _not_a_bundle(path, "its private key cannot be read") from None
    if private_key.public_key() != certificate.public_key():
        raise FedPeftError(
            "the private key does not belong to the certificate",
            field="bundle",
            value=str(path),
            hint=_ASK_AGAIN.format(bundle.name),
        )
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise FedPeftError(
            "the certificate was not issued by the authority in the bundle",
            field="bundle",
            value=str(path),
            hint=_ASK_AGAIN.format(bundle.name),
        ) from None
    if subject(certificate) != (bundle.name, bundle.role):
        raise FedPeftError(
            f"says {bundle.role} {bundle.name!r}, but its certificate was issued to "
            f"{subject(certificate)[1]} {subject(certificate)[0]!r}",
            field="bundle",
            value=str(path),
            hint="do not edit bundles; " + _ASK_AGAIN.format(bundle.name),
        )
