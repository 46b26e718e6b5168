"""The server daemon: one process, one gRPC port under mutual TLS, Flower embedded.

:mod:`~fedpeft_server.daemon` puts the parts together; :mod:`~fedpeft_server.strategy` is the round loop;
:mod:`~fedpeft_server.coordinator`, :mod:`~fedpeft_server.agents` and :mod:`~fedpeft_server.exchange` are the services;
:mod:`~fedpeft_server.engine` is the only importer of Flower's private names and :mod:`~fedpeft_server.pki` the
authority.
"""

import os

# Flower reads both when it is first imported, by whatever module of ours.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
