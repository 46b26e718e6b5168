"""The client agent: one resident process at a data owner.

:mod:`~fedpeft_client.agent` does the work of a round, :mod:`~fedpeft_client.policy` decides whether it may,
:mod:`~fedpeft_client.exchange` moves payloads, :mod:`~fedpeft_client.engine` is the only importer of Flower's private
names, and :mod:`~fedpeft_client.bundle` turns credentials into a channel.
"""

import os

# Flower reads both when it is first imported, by whatever module of ours.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
