"""`fedpeft server enroll`: keys of a known client are replaced only when asked, and nothing is done by halves."""

from __future__ import annotations

import pytest

from fedpeft.bundle import load_bundle
from fedpeft.cli.server import enroll, init
from fedpeft.errors import FedPeftError
from fedpeft_server.config import load_config


@pytest.fixture
def folder(tmp_path):
    init(tmp_path / "server", [], 9443, renew=False)
    enroll(tmp_path / "server", ["ada", "bob"], None, 365, renew=False, as_json=False)
    return tmp_path / "server"


def test_renewal_replaces_the_key_and_the_bundle(folder):
    before = load_bundle(folder / "bundles" / "ada.toml")
    enroll(folder, ["ada"], None, 30, renew=True, as_json=False)
    after = load_bundle(folder / "bundles" / "ada.toml")
    assert after.fingerprint != before.fingerprint
    with load_config(folder).open_store() as store:
        row = store.client_by_name("ada")
        assert row is not None
        assert (row.fingerprint, row.active) == (after.fingerprint, True)
        assert store.client_by_key(before.public_key_pem) is None


def test_a_known_name_among_several_leaves_everything_as_it_was(folder):
    with pytest.raises(FedPeftError, match="is enrolled already"):
        enroll(folder, ["eve", "ada"], None, 365, renew=False, as_json=False)
    with load_config(folder).open_store() as store:
        assert [c.name for c in store.clients()] == ["ada", "bob"]
    assert not (folder / "bundles" / "eve.toml").exists()
