"""Bundles: what is written is read again, and a spoiled one is refused with its reason."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedpeft.bundle import Bundle, check_validity, load_bundle, write_bundle
from fedpeft.errors import FedPeftError
from fedpeft_server.pki import Authority, init_authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return init_authority(tmp_path_factory.mktemp("pki") / "server")


@pytest.fixture
def bundle(authority: Authority) -> Bundle:
    return authority.issue("hospital-a", "client", endpoints=["localhost:9443", "[::1]:9443"])


def test_a_written_bundle_reads_back_equal_and_is_private(bundle: Bundle, tmp_path: Path) -> None:
    os.umask(0o022)
    path = write_bundle(bundle, tmp_path / "a.toml")
    assert load_bundle(path) == bundle
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.toml"]


def test_the_private_key_is_not_shown(bundle: Bundle) -> None:
    assert "PRIVATE" not in repr(bundle)


def spoil(path: Path, bundle: Bundle, old: str, new: str) -> Path:
    text = write_bundle(bundle, path).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("schema = 1", "schema = 2", "schema 2, this program reads schema 1"),
        ("schema = 1", "schema = 'x'", "not a fedpeft bundle: 'schema'"),
        ('name = "hospital-a"', "", "key 'name' is missing"),
        ('name = "hospital-a"', 'name = "hospital-b"', "its certificate was issued to client 'hospital-a'"),
        ('role = "client"', 'role = "operator"', "its certificate was issued to client"),
        ('role = "client"', 'role = "king"', "none of client, operator"),
        ('role = "client"', "role = 7", "'role' is not a string"),
        ("localhost:9443", "localhost", "not of the form host:port"),
        ("schema = 1", "schema = 1\nextra = 1", "unknown key 'extra'"),
        ("BEGIN PRIVATE KEY", "BEGIN", "private key cannot be read"),
        ("schema = 1", "schema =", "not a TOML file"),
    ],
)
def test_a_spoiled_bundle_is_refused_with_its_reason(
    bundle: Bundle, tmp_path: Path, old: str, new: str, reason: str
) -> None:
    with pytest.raises(FedPeftError) as caught:
        load_bundle(spoil(tmp_path / "a.toml", bundle, old, new))
    assert reason in str(caught.value)


def test_a_key_of_someone_else_is_refused(authority: Authority, bundle: Bundle, tmp_path: Path) -> None:
    other = authority.issue("hospital-b", "client", endpoints=["localhost:1"])
    mixed = Bundle(
        bundle.name,
        bundle.role,
        bundle.endpoints,
        bundle.ca_certificate_pem,
        bundle.certificate_pem,
        other.private_key_pem,
    )
    with pytest.raises(FedPeftError, match="the private key does not belong to the certificate"):
        load_bundle(write_bundle(mixed, tmp_path / "a.toml"))


def test_a_foreign_authority_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = init_authority(tmp_path / "other")
    mixed = Bundle(
        bundle.name,
        bundle.role,
        bundle.endpoints,
        other.certificate_pem,
        bundle.certificate_pem,
        bundle.private_key_pem,
    )
    with pytest.raises(FedPeftError, match="not issued by the authority in the bundle"):
        load_bundle(write_bundle(mixed, tmp_path / "a.toml"))


def test_expiry_names_participant_date_and_way_out(authority: Authority, tmp_path: Path) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    path = write_bundle(
        authority.issue("a", "client", endpoints=["localhost:1"], valid_days=1, now=begin), tmp_path / "a.toml"
    )
    with pytest.raises(FedPeftError) as caught:
        load_bundle(path, now=begin + timedelta(days=2))
    assert str(caught.value) == (
        "certificate of a expired on 2026-01-02; ask the operator for a new bundle: fedpeft server enroll a --renew"
    )
    check_validity(load_bundle(path, now=begin), now=begin)
    with pytest.raises(FedPeftError, match="set this machine's clock"):
        load_bundle(path, now=begin - timedelta(days=1))


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match=r"bundle: no such file .*fedpeft server enroll NAME"):
        load_bundle(tmp_path / "none.toml")
    with pytest.raises(FedPeftError, match="cannot be read"):
        load_bundle(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FedPeftError, match="not a TOML file"):
        load_bundle(tmp_path / "binary")
