"""Opening a database: from nothing, from the current schema, and never from a newer one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from fedpeft.errors import FedPeftError
from fedpeft.store import RunStore, models, schema


def test_migrations_make_exactly_the_tables_of_the_models(store: RunStore) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, models.Base.metadata) == []
        assert context.get_current_revision() == schema.known_head()
        checks = {
            str(check["name"])
            for table in ("runs", "rounds")
            for check in sa.inspect(connection).get_check_constraints(table)
        }
    assert checks == {"ck_runs_state", "ck_rounds_state", "ck_rounds_committed_has_end_state"}


def test_opening_again_keeps_everything(database_url: str, tmp_path: Path) -> None:
    with RunStore.open(database_url, tmp_path / "blobs") as store:
        run = store.create_run("run-1", "quickstart", "", 2)
        digest = store.blobs.put_bytes(b"state")
    with RunStore.open(database_url, tmp_path / "blobs") as store:
        assert store.runs() == [run]
        assert store.blobs.exists(digest)
        assert store.verify_ledger("run-1") == 1


def test_a_database_of_a_newer_version_is_refused_untouched(database_url: str, tmp_path: Path) -> None:
    with (
        RunStore.open(database_url, tmp_path / "blobs") as store,
        store._engine.execution_options(fedpeft_write=True).begin() as connection,
    ):
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(FedPeftError, match=r"storage: the database has schema '9999'.*newer fedpeft") as caught:
        RunStore.open(database_url, tmp_path / "blobs")
    assert caught.value.field == "storage"


def test_processes_that_open_a_new_database_at_once_do_not_collide(database_url: str, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fedpeft.store import RunStore;"
        "RunStore.open(sys.argv[1], Path(sys.argv[2])).create_run(sys.argv[3], 'n', '', 1)"
    )
    arguments = [database_url, str(tmp_path / "blobs")]
    processes = [subprocess.Popen([sys.executable, "-c", script, *arguments, f"run-{n}"]) for n in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with RunStore.open(database_url, tmp_path / "blobs") as store:
        assert sorted(run.id for run in store.runs()) == ["run-0", "run-1", "run-2"]


def test_sqlite_is_set_to_survive_power_loss(tmp_path: Path) -> None:
    with RunStore.open(f"sqlite:///{tmp_path}/deep/er/state.db", tmp_path / "blobs") as store:
        with store._engine.connect() as connection:
            found = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("state.db", "is not a database URL"),
        ("sqlite://", "only lives in memory"),
        ("sqlite:///:memory:", "only lives in memory"),
        ("mysql://user:secret@host/db", "not supported"),
        ("nosuch://host/db", "not supported|is not a database URL"),
    ],
)
def test_a_wrong_url_is_one_clear_error_without_the_password(url: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(FedPeftError, match=problem) as caught:
        RunStore.open(url, tmp_path / "blobs")
    assert "storage: " in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "sqlite:///FILE" in str(caught.value)


def test_a_file_that_is_no_database_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"these are my notes, not a database\n" * 100)
    with pytest.raises(FedPeftError, match=r"storage: the database is damaged .*restore it"):
        RunStore.open(f"sqlite:///{path}", tmp_path / "blobs")
    assert path.read_bytes().startswith(b"these are my notes")


def test_tables_of_another_program_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (x)")
    connection.close()
    with pytest.raises(FedPeftError, match="tables of another program"):
        RunStore.open(f"sqlite:///{path}", tmp_path / "blobs")


def test_an_unreachable_server_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed (extra 'postgres')")
    with pytest.raises(FedPeftError, match=r"storage: the database failed .*check that it runs") as caught:
        RunStore.open(f"postgresql://me:secret@/db?host={tmp_path}", tmp_path / "blobs")
    assert "secret" not in str(caught.value)


def test_a_missing_driver_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(FedPeftError, match=r"pip install 'fedpeft\[postgres\]'"):
        RunStore.open("postgresql://me@host/db", tmp_path / "blobs")
