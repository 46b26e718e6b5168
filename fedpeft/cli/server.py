"""``fedpeft server``."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.cli.logs import configure, quiet_flower
from fedpeft.cli.tables import out
from fedpeft.errors import FedPeftError

if TYPE_CHECKING:
    from fedpeft.store.store import RunStore
    from fedpeft_server.config import ServerConfig
    from fedpeft_server.pki import Authority


def init(directory: Path, hosts: list[str], port: int, renew: bool) -> None:
    from fedpeft_server.config import init_server, load_config

    if renew:
        config = load_config(directory)
        config.authority().issue_server(config.hosts)
        out.print(f"the server's certificate in {directory}/ is renewed; restart the daemon to use it", soft_wrap=True)
        return
    config = init_server(directory, hosts, port)
    out.print(f"{directory}/ is ready; it will listen on {config.address}", soft_wrap=True)
    out.print(f"operator's bundle: {directory / 'operator.toml'}", soft_wrap=True)
    out.print(f"next: fedpeft server enroll NAME --dir {directory}; fedpeft server up {directory}", soft_wrap=True)


def up(directory: Path, metrics_port: int | None, as_json: bool) -> None:
    from fedpeft_server.config import load_config

    config = load_config(directory)
    log = configure(as_json)
    from fedpeft_server.daemon import Daemon

    quiet_flower()

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    daemon = Daemon(config, metrics_port)
    daemon.start()
    log.info("ready", address=config.address, clients=len(daemon.roster.nodes()))
    while not stop.wait(0.5):
        pass
    log.info("stopping")
    daemon.close()


def enroll(directory: Path, names: list[str], bundle: Path | None, valid_days: int, renew: bool, as_json: bool) -> None:
    from fedpeft.bundle import check_name
    from fedpeft_server.config import load_config

    if bundle is not None and len(names) > 1:
        raise FedPeftError("names one file for several clients", field="--out", value=str(bundle), hint="leave it out")
    config = load_config(directory)
    for name in names:
        check_name(name)
    with config.open_store() as store:
        for name in names:  # all of them before the first is changed
            known = store.client_by_name(name)
            if known is not None and known.revoked_at is None and not renew:
                raise FedPeftError(
                    "is enrolled already",
                    field="NAME",
                    value=name,
                    hint="use --renew to replace its keys, or another name",
                )
        authority = config.authority()
        made = [
            _enroll(store, authority, config, name, bundle or directory / "bundles" / f"{name}.toml", valid_days)
            for name in names
        ]
    if as_json:
        print(json.dumps(made[0] if len(made) == 1 else made, indent=2))
        return
    for facts in made:
        out.print(
            f"{facts['name']} is enrolled until {facts['expires'][:10]}; bundle: {facts['bundle']}", soft_wrap=True
        )
    out.print("a bundle holds a private key: hand it over safely and delete it here")


def _enroll(
    store: RunStore, authority: Authority, config: ServerConfig, name: str, target: Path, valid_days: int
) -> dict[str, str]:
    from fedpeft.bundle import write_bundle

    made = authority.issue(name, "client", endpoints=config.endpoints, valid_days=valid_days)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bundle(made, target)
    known = store.client_by_name(name)
    if known is not None and known.revoked_at is None:  # --renew: the former key is out from now on
        store.revoke(name)
    store.enroll(name, made.public_key_pem, made.fingerprint)
    return {
        "name": name,
        "bundle": str(target),
        "fingerprint": made.fingerprint,
        "expires": made.expires_at.isoformat(),
    }


def revoke(directory: Path, name: str) -> None:
    from fedpeft_server.config import load_config

    with load_config(directory).open_store() as store:
        if store.client_by_name(name) is None:
            names = ", ".join(c.name for c in store.clients()) or "nobody"
            raise FedPeftError("no such client", field="NAME", value=name, hint=f"enrolled: {names}")
        store.revoke(name)
    out.print(f"{name} is revoked; a running daemon refuses it from now on")
