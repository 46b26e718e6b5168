"""What must outlive the process: the state of runs, their ledgers, and the payloads.

- :mod:`~fedpeft.store.store`: :class:`RunStore`, the database of runs, rounds, deltas, evaluations and clients
- :mod:`~fedpeft.store.blobs`: :class:`BlobStore` and :class:`BlobWriter`, content-addressed files, resumable uploads
- :mod:`~fedpeft.store.ledger`: the hash chain as pure functions, for auditors without a database
- :mod:`~fedpeft.store.rows`: the values handed out
- :mod:`~fedpeft.store.models`, :mod:`~fedpeft.store.schema`: tables and migrations, behind the curtain
"""

from fedpeft.store.blobs import BlobStore, BlobWriter
from fedpeft.store.ledger import LedgerEntry
from fedpeft.store.rows import ClientRow, DeltaRow, EvaluationRow, RefusalRow, RoundRow, RunRow
from fedpeft.store.store import RunStore

__all__ = [
    "BlobStore",
    "BlobWriter",
    "ClientRow",
    "DeltaRow",
    "EvaluationRow",
    "LedgerEntry",
    "RefusalRow",
    "RoundRow",
    "RunRow",
    "RunStore",
]
