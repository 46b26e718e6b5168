"""The server's folder and its configuration.

server.toml      where to listen, under which names clients reach it
pki/             certificate authority and server certificate
operator.toml    the first operator's bundle
bundles/         bundles of enrolled clients, to be handed over and deleted
state.db         runs, rounds, deltas, ledger, enrolled clients
flower.db        Flower's nodes and messages
blobs/           content-addressed payloads
runs/            a run folder per run
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedpeft.errors import FedPeftError
from fedpeft.store.store import RunStore
from fedpeft_server.pki import DEFAULT_PORT, Authority, init_authority, load_authority

CONFIG = "server.toml"


@dataclass(frozen=True)
class ServerConfig:
    """A server folder.

    Attributes:
        directory: the folder.
        listen: address to bind.
        port: port to bind.
        hosts: names or addresses under which clients reach the server; they stand in its certificate.
        database: SQLAlchemy URL of the state; SQLite in the folder by default, PostgreSQL by URL.
    """

    directory: Path
    listen: str
    port: int
    hosts: tuple[str, ...]
    database: str

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in self.hosts)

    @property
    def address(self) -> str:
        return f"[{self.listen}]:{self.port}" if ":" in self.listen else f"{self.listen}:{self.port}"

    def open_store(self) -> RunStore:
        return RunStore.open(self.database, self.directory / "blobs")

    def authority(self) -> Authority:
        return load_authority(self.directory / "pki")


def init_server(directory: Path, hosts: list[str], port: int = DEFAULT_PORT) -> ServerConfig:
    """Make a server folder.

    Raises:
        FedPeftError: there is one already, or it cannot be written.
    """
    if (directory / CONFIG).exists():
        raise FedPeftError("is a server folder already", field=str(directory), hint="start it: fedpeft server up DIR")
    names = tuple(hosts or ["localhost"])
    loopback = all(name in ("localhost", "127.0.0.1", "::1") for name in names)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config = ServerConfig(
            directory, "127.0.0.1" if loopback else "0.0.0.0", port, names, _default_database(directory)
        )
        init_authority(directory / "pki", list(hosts), port=port, endpoints=config.endpoints)
        (directory / "pki" / "operator.toml").rename(directory / "operator.toml")
        text = tomli_w.dumps({"listen": config.listen, "port": port, "hosts": list(names)})
        (directory / CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedPeftError(f"cannot be written: {error.strerror}", field=str(directory)) from None
    config.open_store().close()
    return config


def load_config(directory: Path) -> ServerConfig:
    """Read ``server.toml``.

    Raises:
        FedPeftError: the folder is not a server folder, or the file is wrong.
    """
    path = directory / CONFIG
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedPeftError(
            f"is not a server folder (no {CONFIG})", field=str(directory), hint="make one: fedpeft server init DIR"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedPeftError(f"is not valid TOML: {error}", field=str(path)) from None
    known = {"listen": str, "port": int, "hosts": list, "database": str}
    for key, value in table.items():
        if key not in known:
            raise FedPeftError("unknown key", field=f"{CONFIG}: {key}", hint=f"known: {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise FedPeftError(f"should be a {known[key].__name__}", field=f"{CONFIG}: {key}", value=value)
    return ServerConfig(
        directory,
        table.get("listen", "127.0.0.1"),
        table.get("port", DEFAULT_PORT),
        tuple(table.get("hosts", ["localhost"])),
        table.get("database", _default_database(directory)),
    )


def _default_database(directory: Path) -> str:
    return f"sqlite:///{directory.absolute() / 'state.db'}"
