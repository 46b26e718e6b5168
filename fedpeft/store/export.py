"""One run out of a store of many: the ``ledger.db`` that stands in a run folder.

A run folder fetched from a daemon can then be read, checked and reported on with the same commands as the folder of a
simulation. Rows are copied as they are, so the chain verifies to the same head; enrolled clients (keys) are not copied,
nor are payloads.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import sqlalchemy as sa

from fedpeft.store import models
from fedpeft.store.store import RunStore

_TABLES = (models.Run, models.Round, models.Delta, models.Refusal, models.Evaluation, models.Ledger)


def export_run(store: RunStore, run_id: str, target: Path) -> None:
    """Write the rows of one run to a new SQLite store at ``target``, replacing what is there.

    Raises:
        FedPeftError: no such run, or the disk is full.
    """
    store.run(run_id)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        path = Path(folder) / target.name
        with RunStore.open(f"sqlite:///{path}", Path(folder) / "blobs") as copy:
            with store._read() as source, copy._write() as sink:
                for model in _TABLES:
                    table = models.Base.metadata.tables[model.__tablename__]
                    key = table.c.id if model is models.Run else table.c.run_id
                    for row in source.execute(sa.select(table).where(key == run_id)).mappings():
                        sink.execute(sa.insert(table).values(dict(row)))
            with copy._engine.connect() as connection:  # the journal's content goes into the one file that is kept
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(path, target)
