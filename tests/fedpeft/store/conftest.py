"""Every test that asks for ``database_url`` runs on SQLite, and on PostgreSQL where its server and driver are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path

import pytest

from fedpeft.store import RunStore


def _postgres_binaries() -> Path | None:
    found = sorted(glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: int(Path(path).parts[-3]))
    if found:
        return Path(found[-1]).parent
    initdb = shutil.which("initdb")
    return None if initdb is None else Path(os.path.realpath(initdb)).parent


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A throw-away PostgreSQL server on a socket in a folder of its own; the URL of its ``postgres`` database."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed here")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed (extra 'postgres')")
    user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("runs as root, and there is no user 'postgres' to run the server as")
        user = ["runuser", "-u", "postgres", "--"]
    with tempfile.TemporaryDirectory(prefix="fedpeft-pg-", dir="/tmp") as folder:
        data = f"{folder}/data"
        if user:
            shutil.chown(folder, "postgres")

        def run(*command: str) -> None:
            subprocess.run([*user, *command], check=True, cwd="/", stdout=subprocess.DEVNULL)

        run(f"{binaries}/initdb", "-D", data, "-U", "fedpeft", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses= -c fsync=off -c unix_socket_directories={folder}"
        run(f"{binaries}/pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://fedpeft@/postgres?host={folder}"
        finally:
            run(f"{binaries}/pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/state.db"
        return
    server = request.getfixturevalue("postgres_url")
    psycopg = pytest.importorskip("psycopg")
    name = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
    yield server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[RunStore]:
    """An empty store."""
    with RunStore.open(database_url, tmp_path / "blobs") as opened:
        yield opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of a given number of KiB, which takes the right to mount."""
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small file system takes root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
