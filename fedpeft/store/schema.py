"""Bringing a database to the schema of this version, without an ``alembic.ini``.

The migrations ship inside the package. :func:`upgrade` runs them all in *one* transaction under a lock, so two
processes that open the same database at once do not collide, and a process killed in the middle leaves the old schema
behind, not half of the new one. A database that a newer fedpeft has written is refused rather than misread.

A new revision (in a checkout): change ``models.py``, then
``alembic.command.revision(schema.alembic_config(), "what changes", autogenerate=True)`` with a connection in
``config.attributes["connection"]``; SQLite's missing ``ALTER`` is worked around by batch mode, which is always on.
"""

from __future__ import annotations

import threading

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedpeft.errors import FedPeftError

_PROCESS_LOCK = threading.Lock()  # Alembic keeps the running migration in module globals
_ADVISORY_LOCK = 0x66656470656674  # "fedpeft": the number by which PostgreSQL knows our lock


def alembic_config() -> Config:
    """Alembic's configuration, built in memory."""
    config = Config()
    config.set_main_option("script_location", "fedpeft.store:migrations")
    return config


def upgrade(connection: sa.Connection) -> None:
    """Run the migrations that this database lacks, inside the transaction of ``connection``.

    For SQLite the caller has begun it with ``BEGIN IMMEDIATE`` and switched foreign keys off: a table that is rebuilt
    would otherwise take the rows that refer to it along.

    Raises:
        FedPeftError: (field ``storage``) the database belongs to a newer version, or is not ours.
    """
    with _PROCESS_LOCK:
        lock_database(connection)
        config = alembic_config()
        scripts = ScriptDirectory.from_config(config)
        known = {script.revision for script in scripts.walk_revisions()}
        present = MigrationContext.configure(connection).get_current_heads()
        for revision in present:
            if revision not in known:
                raise FedPeftError(
                    f"the database has schema {revision!r}, which this version of fedpeft does not know",
                    field="storage",
                    value=connection.engine.url.render_as_string(hide_password=True),
                    hint=f"open it with the newer fedpeft that wrote it (this one knows up to {known_head()!r})",
                )
        if set(present) != set(scripts.get_heads()):
            if not present and (foreign := set(sa.inspect(connection).get_table_names()) & {"runs", "ledger"}):
                raise FedPeftError(
                    f"the database holds tables of another program ({', '.join(sorted(foreign))})",
                    field="storage",
                    value=connection.engine.url.render_as_string(hide_password=True),
                    hint="give fedpeft a database of its own",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def lock_database(connection: sa.Connection) -> None:
    """Wait until no other transaction holds this lock, and hold it to the end of this one.

    SQLite needs none: ``BEGIN IMMEDIATE`` has locked the whole file.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))


def known_head() -> str:
    """The newest schema that this version knows."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head
