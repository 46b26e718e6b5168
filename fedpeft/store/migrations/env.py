"""Run by Alembic for every command; works on the connection that the caller opened, inside its transaction."""

from __future__ import annotations

from alembic import context

from fedpeft.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,  # true of SQLite too, as our connections send BEGIN themselves
)
context.run_migrations()
