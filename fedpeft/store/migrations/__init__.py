"""The Alembic environment of the store; see :mod:`fedpeft.store.schema`."""
