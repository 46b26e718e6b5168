"""Data: where records come from, who owns them, and how they become tensors.

:func:`~fedpeft.data.sources.load_source` reads natural clients, :func:`~fedpeft.data.partition.partition` turns them
into the clients of a run, :func:`~fedpeft.data.encode.encode` makes tensors for a base model. The three are apart
because they happen at different places: in a deployment a client only ever does the first and the last, on its own
disk.
"""

from fedpeft.data.partition import partition
from fedpeft.data.records import ClientData, DataSource, Record
from fedpeft.data.sources import load_source, write_client_folder

__all__ = ["ClientData", "DataSource", "Record", "load_source", "partition", "write_client_folder"]
